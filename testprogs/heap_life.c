/*
 * Allocates at an even pace, and goes through what happens to programs: children, filters, allocators that come later.
 *
 * heap_life [PAIRS]
 *
 * Prints "ready", then allocates and frees PAIRS (50) blocks of 1000 bytes a millisecond in a thread of its own, each by
 * place_paced. For each line that it reads it does something and prints a line of JSON:
 *
 * total     blocks allocated so far at this pace
 * stop      the same, and allocates no more at it
 * hold N    holds N more blocks of 4096 bytes, by place_held; how many it holds
 * filter    takes up a seccomp filter that kills for every system call it does not know
 * child N   forks a child that allocates N blocks of 4096 bytes by place_child, over a second; its pid, once it has ended
 * load FILE loads a library and has it allocate a block of 4096 bytes each millisecond by place_plugin, from now on
 */
#include <dlfcn.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "burn.h"

static atomic_ulong pairs_per_ms = 50;
static atomic_ulong total;
static atomic_bool is_pacing;

/* Keeps the compiler from leaving an allocation out. */
static void *seen(void *pointer)
{
	__asm__ volatile("" : "+r"(pointer) : : "memory");
	return pointer;
}

WORK static void *place_paced(void) { return seen(malloc(1000)); }
WORK static void *place_held(void) { return seen(malloc(4096)); }
WORK static void *place_child(void) { return seen(malloc(4096)); }

static void sleep_until(struct timespec *next, long ns)
{
	next->tv_nsec += ns;
	if (next->tv_nsec >= 1000000000) {
		next->tv_nsec -= 1000000000;
		next->tv_sec += 1;
	}
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, next, NULL);
}

/* Late by a while, it catches up: the pace is that of the clock. */
static void *pace(void *unused)
{
	struct timespec next;
	clock_gettime(CLOCK_MONOTONIC, &next);
	atomic_store(&is_pacing, true);
	for (;;) {
		unsigned long pairs = atomic_load(&pairs_per_ms);
		for (unsigned long n = 0; n < pairs; n++)
			free(place_paced());
		atomic_fetch_add(&total, pairs);
		sleep_until(&next, 1000000);
	}
	return unused;
}

static unsigned long hold(unsigned long more)
{
	static void *last;
	static unsigned long held;
	for (; more > 0; more--, held++) {
		void **block = place_held();
		*block = last;
		last = block;
	}
	return held;
}

static void run_child(unsigned long blocks)
{
	struct timespec next;
	clock_gettime(CLOCK_MONOTONIC, &next);
	for (int tick = 0; tick < 100; tick++) {
		for (unsigned long n = 0; n < blocks / 100; n++)
			free(place_child());
		sleep_until(&next, 10000000);
	}
	_exit(0);
}

static int child(unsigned long blocks)
{
	pid_t pid = fork();
	if (pid == 0)
		run_child(blocks);
	waitpid(pid, NULL, 0);
	return pid;
}

#define ALLOW(name) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

/* All that this program and its C library call from now on. */
static int filter(void)
{
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		ALLOW(read), ALLOW(write), ALLOW(exit), ALLOW(exit_group), ALLOW(clock_nanosleep), ALLOW(brk),
		ALLOW(mmap), ALLOW(munmap), ALLOW(mprotect), ALLOW(madvise), ALLOW(futex), ALLOW(rt_sigreturn),
		ALLOW(restart_syscall), ALLOW(newfstatat), ALLOW(getrandom),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog program = { sizeof rules / sizeof rules[0], rules };
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		return errno;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0 ? 0 : errno;
}

static void *run_plugin(void *allocate)
{
	struct timespec next;
	clock_gettime(CLOCK_MONOTONIC, &next);
	for (;;) {
		((void (*)(void))allocate)();
		sleep_until(&next, 1000000);
	}
	return NULL;
}

static int load(const char *file)
{
	pthread_t thread;
	void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
	void *allocate = library == NULL ? NULL : dlsym(library, "allocate_by_plugin");
	if (allocate == NULL)
		return 1;
	return pthread_create(&thread, NULL, run_plugin, allocate);
}

int main(int argc, char **argv)
{
	pthread_t pacer;
	char line[512];
	if (argc > 1)
		atomic_store(&pairs_per_ms, strtoul(argv[1], NULL, 10));
	pthread_create(&pacer, NULL, pace, NULL);
	/* A thread that begins makes system calls of its own (rseq), which a filter would kill it for. */
	while (!atomic_load(&is_pacing))
		sched_yield();
	say_ready();
	while (fgets(line, sizeof line, stdin) != NULL) {
		unsigned long answer = 0;
		char *argument = strchr(line, ' ');
		line[strcspn(line, "\n")] = 0;
		argument = argument == NULL ? line + strlen(line) : argument + 1;
		if (strcmp(line, "stop") == 0)
			atomic_store(&pairs_per_ms, 0);
		if (strcmp(line, "stop") == 0 || strcmp(line, "total") == 0)
			answer = atomic_load(&total);
		else if (strncmp(line, "hold ", 5) == 0)
			answer = hold(strtoul(argument, NULL, 10));
		else if (strcmp(line, "filter") == 0)
			answer = (unsigned long)filter();
		else if (strncmp(line, "child ", 6) == 0)
			answer = (unsigned long)child(strtoul(argument, NULL, 10));
		else if (strncmp(line, "load ", 5) == 0)
			answer = (unsigned long)load(argument);
		printf("%lu\n", answer);
		fflush(stdout);
	}
	return 0;
}
