/*
 * PROCESSES processes of THREADS threads each, which work for a moment each PERIOD_MS, until the pipe on standard input
 * closes. With a directory of cgroups, each process makes itself one in it and moves there.
 */
/* It needs a part of it only. */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "burn.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static volatile uint64_t sink;
static long period_ms;

WORK static void crowd_work(void)
{
	FRAME;
	for (int i = 0; i < 20000; i++)
		sink = sink * 6364136223846793005u + 1442695040888963407u;
}

static void *member(void *unused)
{
	struct timespec pause = {.tv_sec = period_ms / 1000, .tv_nsec = period_ms % 1000 * 1000000};
	for (;;) {
		crowd_work();
		nanosleep(&pause, NULL);
	}
	return unused;
}

static int join_cgroup(const char *directory, int number)
{
	char path[PATH_MAX];
	snprintf(path, sizeof(path), "%s/%d", directory, number);
	if (mkdir(path, 0755) < 0 && errno != EEXIST)
		return -1;
	snprintf(path, sizeof(path), "%s/%d/cgroup.procs", directory, number);
	FILE *procs = fopen(path, "w");
	return procs != NULL && fputs("0", procs) >= 0 && fclose(procs) == 0 ? 0 : -1;
}

/* Runs in a child; small stacks, since there are many. */
static void run_member(int threads, const char *cgroups, int number, int ready)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (cgroups != NULL && join_cgroup(cgroups, number) < 0)
		_exit(1);
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 32 << 10);
	pthread_t thread;
	for (int i = 1; i < threads; i++)
		if (pthread_create(&thread, &attributes, member, NULL) != 0)
			_exit(1);
	if (write(ready, "", 1) != 1)
		_exit(1);
	close(ready);
	member(NULL);
}

int main(int argc, char **argv)
{
	if (argc < 4) {
		fprintf(stderr, "usage: %s PROCESSES THREADS PERIOD_MS [CGROUPS]\n", argv[0]);
		return 2;
	}
	int processes = atoi(argv[1]), threads = atoi(argv[2]), ready[2];
	period_ms = atol(argv[3]);
	if (pipe(ready) < 0)
		return 1;
	for (int i = 0; i < processes; i++) {
		pid_t child = fork();
		if (child == 0) {
			close(ready[0]);
			run_member(threads, argc > 4 ? argv[4] : NULL, i, ready[1]);
		}
		if (child < 0)
			break;
	}
	close(ready[1]);
	int started = 0;
	char byte;
	while (started < processes && read(ready[0], &byte, 1) == 1)
		started++;
	if (started < processes) {
		fprintf(stderr, "%d of %d: %s\n", started, processes, strerror(errno));
		return 1;
	}
	say_ready();
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	return 0;
}
