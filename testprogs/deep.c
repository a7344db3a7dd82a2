/*
 * Stacks that only unwind information leads out of: main -> run -> recurse (8 times) -> sort -> qsort -> compare, from
 * realigned frames and variable-length ones, in a second thread (worker -> run), and from a signal handler on a stack of
 * its own (on_alarm -> sort). Built without frame pointers. Runs until the pipe on standard input closes.
 *
 * With -DOWN_SORT, no function of the C library is between ours: Debian's static musl has no unwind information.
 */
#include "burn.h"

#include <alloca.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>

static _Thread_local volatile uint64_t sink;

WORK static int compare(const void *a, const void *b)
{
	for (int i = 0; i < 50; i++)
		sink += (uint64_t)i;
	return *(const int *)a - *(const int *)b;
}

#ifdef OWN_SORT
WORK static void sort_by(int *values, size_t count, int (*compare)(const void *, const void *))
{
	for (size_t i = 1; i < count; i++)
		for (size_t j = i; j > 0 && compare(&values[j - 1], &values[j]) > 0; j--) {
			int other = values[j];
			values[j] = values[j - 1];
			values[j - 1] = other;
		}
}
#define SORT(values, count, compare) sort_by(values, count, compare)
#define ALARM_SORTS 1
#else
#define ALARM_SORTS 8
#define SORT(values, count, compare) qsort(values, count, sizeof *(values), compare)
#endif

WORK static void sort(void)
{
	int values[200];
	for (int i = 0; i < 200; i++)
		values[i] = i * 7919 % 200;
	SORT(values, 200, compare);
	sink += (uint64_t)values[0];
}

/* The frame is moved to an address that is a multiple of 64, and grows by as much as the caller says. */
WORK static void realigned(size_t bytes)
{
	_Alignas(64) volatile char line[64];
	char *more = alloca(bytes);
	memset(more, 1, bytes);
	line[0] = more[bytes - 1];
	sort();
	sink += (uint64_t)line[0] + (uint64_t)more[0];
}

WORK static uint64_t recurse(unsigned depth)
{
	if (depth == 0) {
		realigned(100 + sink % 100);
		return 1;
	}
	uint64_t below = recurse(depth - 1);
	sink += below;
	return below + depth;
}

/* Sums what it is given, so that the call is not the last thing it does. */
WORK static uint64_t run(void)
{
	uint64_t sum = 0;
	while (!atomic_load(&stop))
		sum += recurse(8);
	return sum;
}

static void *worker(void *unused)
{
	sink = run();
	return unused;
}

/* Long enough to be sampled, some 20 % of the time, and far shorter than the time between two alarms. */
WORK static void on_alarm(int signal)
{
	for (int i = 0; i < ALARM_SORTS; i++)
		sort();
	sink += (uint64_t)signal;
}

static void handle_alarms_on_another_stack(void)
{
	stack_t stack = { .ss_sp = malloc(65536), .ss_size = 65536 };
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_ONSTACK | SA_RESTART };
	struct itimerval every = { { 0, 5000 }, { 0, 5000 } };
	sigaltstack(&stack, NULL);
	sigaction(SIGPROF, &action, NULL);
	setitimer(ITIMER_PROF, &every, NULL);
}

/* The thread that waits for the end is inside the C library, which may be without unwind information. */
static void stop_at_end_of_input_unalarmed(void)
{
	sigset_t alarm;
	sigemptyset(&alarm);
	sigaddset(&alarm, SIGPROF);
	pthread_sigmask(SIG_BLOCK, &alarm, NULL);
	stop_at_end_of_input();
	pthread_sigmask(SIG_UNBLOCK, &alarm, NULL);
}

int main(void)
{
	pthread_t other;
	stop_at_end_of_input_unalarmed();
	handle_alarms_on_another_stack();
	pthread_create(&other, NULL, worker, NULL);
	say_ready();
	uint64_t sum = run();
	pthread_join(other, NULL);
	return sum == 0;
}
