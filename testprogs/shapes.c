/*
 * Stacks of processes that change: `load LIBRARY` burns, and at a line on standard input loads the library and burns
 * below it (main -> call_plugin -> plugin_work -> plugin_inner_1 -> work); `exec PROGRAM ARGUMENT` becomes that program at
 * a line on standard input; `fork` burns in a child alone (main -> in_child -> work). Built without frame pointers. Ends
 * when the pipe on standard input closes. `brief LIBRARY MILLISECONDS` burns for 15 ms, loads the library, burns below it
 * for so much CPU time, and ends. `clock` asks for the time in a loop (main -> ask_clock -> clock_gettime of the C library
 * -> that of the vDSO).
 */
#include "burn.h"

#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

static volatile uint64_t sink;
static atomic_bool called;

WORK static void work(void)
{
	for (int i = 0; i < 100000; i++)
		sink = sink * 6364136223846793005u + 1442695040888963407u;
}

/* One line is a call, the end of input is the end. */
static void *read_lines(void *unused)
{
	char byte;
	while (read(STDIN_FILENO, &byte, 1) > 0)
		if (byte == '\n')
			atomic_store(&called, 1);
	atomic_store(&stop, 1);
	return unused;
}

WORK static uint64_t before_call(void)
{
	uint64_t rounds = 0;
	for (; !atomic_load(&stop) && !atomic_load(&called); rounds++)
		work();
	return rounds;
}

WORK static int call_plugin(const char *path)
{
	void *library = dlopen(path, RTLD_NOW);
	int (*plugin_work)(void (*)(void)) = library ? dlsym(library, "plugin_work") : NULL;
	if (!plugin_work) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	int sum = 0;
	while (!atomic_load(&stop))
		sum |= plugin_work(work);
	return sum == -1;
}

WORK static int brief(const char *path, uint64_t milliseconds)
{
	while (now_ns(CLOCK_PROCESS_CPUTIME_ID) < 15 * 1000000u)
		work();
	void *library = dlopen(path, RTLD_NOW);
	int (*plugin_work)(void (*)(void)) = library ? dlsym(library, "plugin_work") : NULL;
	if (!plugin_work) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	uint64_t end_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID) + milliseconds * 1000000u;
	while (now_ns(CLOCK_PROCESS_CPUTIME_ID) < end_ns)
		sink += (uint64_t)plugin_work(work);
	return 0;
}

WORK static uint64_t in_child(void)
{
	uint64_t rounds = 0;
	for (;; rounds++)
		work();
	return rounds;
}

WORK static uint64_t ask_clock(void)
{
	uint64_t sum = 0;
	while (!atomic_load(&stop))
		sum += now_ns(CLOCK_MONOTONIC);
	return sum;
}

/* The child ends with its parent, which is killed. */
WORK static int fork_and_burn(void)
{
	pid_t child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		prctl(PR_SET_NAME, "burning_child");
		return in_child() == 0;
	}
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	pthread_t reader;
	/* No call below is the last thing main does: it would take main's place on the stack. */
	const char *shape = argc > 1 ? argv[1] : "";
	if (strcmp(shape, "fork") == 0) {
		say_ready();
		sink += (uint64_t)fork_and_burn();
		return 1;
	}
	if (strcmp(shape, "brief") == 0 && argc > 3) {
		int failed = brief(argv[2], strtoull(argv[3], NULL, 10));
		sink += 1;
		return failed;
	}
	pthread_create(&reader, NULL, read_lines, NULL);
	say_ready();
	if (strcmp(shape, "clock") == 0) {
		sink += ask_clock();
		return 0;
	}
	if (argc > 2 && before_call() == UINT64_MAX)
		return 1;
	if (atomic_load(&stop))
		return 0;
	if (argc > 2 && strcmp(shape, "load") == 0)
		sink += (uint64_t)call_plugin(argv[2]);
	else if (argc > 3 && strcmp(shape, "exec") == 0)
		execl(argv[2], argv[2], argv[3], (char *)NULL);
	if (atomic_load(&stop))
		return 0;
	fprintf(stderr, "usage: %s load LIBRARY | exec PROGRAM ARGUMENT | fork | clock | brief LIBRARY MILLISECONDS\n", argv[0]);
	return 2;
}
