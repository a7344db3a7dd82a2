/*
 * Forks the given number of children a second for the given seconds, or until the pipe on standard input closes. Each
 * child runs main -> child_work for about 1 ms and exits. With `threads`, they are threads of one process. Says how many
 * there were.
 */
#include "burn.h"

#include <string.h>
#include <sys/wait.h>

static volatile uint64_t sink;

WORK static void child_work(void)
{
	FRAME;
	for (int i = 0; i < 200000; i++)
		sink = sink * 6364136223846793005u + 1442695040888963407u;
}

static void *thread_work(void *unused)
{
	child_work();
	return unused;
}

static int start_thread(void)
{
	pthread_t thread;
	return pthread_create(&thread, NULL, thread_work, NULL) == 0 && pthread_detach(thread) == 0 ? 1 : -1;
}

int main(int argc, char **argv)
{
	int threads = argc == 4 && strcmp(argv[3], "threads") == 0;
	if (argc != 3 && !threads) {
		fprintf(stderr, "usage: %s FORKS_PER_SECOND SECONDS [threads]\n", argv[0]);
		return 2;
	}
	double per_second = atof(argv[1]), seconds = atof(argv[2]);
	uint64_t start_ns = now_ns(CLOCK_MONOTONIC), forks = 0;
	stop_at_end_of_input();
	say_ready();
	while (!atomic_load(&stop) && (double)forks < per_second * seconds) {
		uint64_t due_ns = start_ns + (uint64_t)((double)forks / per_second * 1e9);
		struct timespec due = {.tv_sec = (time_t)(due_ns / 1000000000u), .tv_nsec = (long)(due_ns % 1000000000u)};
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
		pid_t child = threads ? start_thread() : fork();
		if (child == 0) {
			child_work();
			_exit(0);
		}
		forks += child > 0;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (child < 0)
			break;
	}
	while (waitpid(-1, NULL, 0) > 0)
		;
	printf("{\"forks\":%ju}\n", (uintmax_t)forks);
	return 0;
}
