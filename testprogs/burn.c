/*
 * Stacks main -> outer_work -> hot_loop (90 % of the time) and main -> outer_work -> cold_loop (10 %), with frame
 * pointers; in further threads, worker takes main's place. Ends after -s seconds, after -c seconds of CPU time, or when
 * the pipe on standard input closes, and says what it consumed as the kernel counts it (getrusage(2)).
 */
#include "burn.h"

#include <sys/resource.h>

static volatile uint64_t sink;

/* The two loops differ in their constants, so that no compiler takes them for one function. */
WORK static uint64_t hot_loop(uint64_t x, uint64_t rounds)
{
	FRAME;
	for (uint64_t i = 0; i < rounds; i++)
		x = x * 6364136223846793005u + 1442695040888963407u;
	return x;
}

WORK static uint64_t cold_loop(uint64_t x, uint64_t rounds)
{
	FRAME;
	for (uint64_t i = 0; i < rounds; i++)
		x = x * 2862933555777941757u + 3037000493u;
	return x;
}

/* About 1 ms. */
WORK static void outer_work(uint64_t rounds)
{
	uint64_t x = hot_loop(sink, 9 * rounds);
	sink = cold_loop(x, rounds);
}

static uint64_t wall_end_ns = UINT64_MAX;
static uint64_t cpu_end_ns = UINT64_MAX;

static int is_over(void)
{
	return atomic_load(&stop) || now_ns(CLOCK_MONOTONIC) >= wall_end_ns ||
	       now_ns(CLOCK_PROCESS_CPUTIME_ID) >= cpu_end_ns;
}

static void *worker(void *unused)
{
	while (!is_over())
		outer_work(70000);
	return unused;
}

static uint64_t nanoseconds(struct timeval tv)
{
	return (uint64_t)tv.tv_sec * 1000000000u + (uint64_t)tv.tv_usec * 1000u;
}

static void report(uint64_t start_ns)
{
	struct rusage usage;
	getrusage(RUSAGE_SELF, &usage);
	uint64_t user = nanoseconds(usage.ru_utime), system = nanoseconds(usage.ru_stime);
	printf("{\"user_ns\":%ju,\"system_ns\":%ju,\"cpu_ns\":%ju,\"wall_ns\":%ju}\n", (uintmax_t)user,
	       (uintmax_t)system, (uintmax_t)(user + system), (uintmax_t)(now_ns(CLOCK_MONOTONIC) - start_ns));
}

int main(int argc, char **argv)
{
	uint64_t start_ns = now_ns(CLOCK_MONOTONIC);
	int threads = 1, option;
	while ((option = getopt(argc, argv, "s:c:t:")) != -1) {
		switch (option) {
		case 's':
			wall_end_ns = start_ns + (uint64_t)(atof(optarg) * 1e9);
			break;
		case 'c':
			cpu_end_ns = (uint64_t)(atof(optarg) * 1e9);
			break;
		case 't':
			threads = atoi(optarg);
			break;
		default:
			fprintf(stderr, "usage: %s [-s SECONDS] [-c CPU_SECONDS] [-t THREADS]\n", argv[0]);
			return 2;
		}
	}
	stop_at_end_of_input();
	say_ready();
	pthread_t others[256];
	int started = 0;
	while (started < threads - 1 && started < 256 &&
	       pthread_create(&others[started], NULL, worker, NULL) == 0)
		started++;
	while (!is_over())
		outer_work(70000);
	for (int i = 0; i < started; i++)
		pthread_join(others[i], NULL);
	report(start_ns);
	return 0;
}
