/*
 * Changes who it is, and works as each of them for some 700 ms of CPU time:
 *
 *   identity exec PROGRAM ARGUMENTS..    works, then becomes another program
 *   identity leader                      its main thread exits, another one works
 *   identity rename NAME                 works, takes a name, works
 *   identity memfd PROGRAM ARGUMENTS..   becomes a copy of a program that is in no file system
 *   identity reuse PROGRAM ARGUMENTS..   a child runs another program and ends; one without exec works under its pid
 */
#define _GNU_SOURCE
/* It needs a part of it only. */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "burn.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static volatile uint64_t sink;

WORK static void identity_work(void)
{
	FRAME;
	uint64_t end_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID) + 700000000u;
	while (now_ns(CLOCK_PROCESS_CPUTIME_ID) < end_ns)
		for (int i = 0; i < 10000; i++)
			sink = sink * 6364136223846793005u + 1442695040888963407u;
}

static void *work_and_exit(void *unused)
{
	(void)unused;
	identity_work();
	exit(0);
}

static int fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

static int become_memfd(char **command)
{
	int from = open(command[0], O_RDONLY), to = memfd_create("in_memory", MFD_CLOEXEC);
	struct stat file;
	if (from < 0 || to < 0 || fstat(from, &file) < 0 || sendfile(to, from, NULL, (size_t)file.st_size) != file.st_size)
		return fail("copy");
	fexecve(to, command, environ);
	return fail("fexecve");
}

/* A child under a pid that has just become free. */
static pid_t fork_as(pid_t pid)
{
	struct clone_args arguments = {
		.exit_signal = SIGCHLD, .set_tid = (uint64_t)(uintptr_t)&pid, .set_tid_size = 1};
	return (pid_t)syscall(SYS_clone3, &arguments, sizeof(arguments));
}

static int reuse_pid(char **command)
{
	int status;
	pid_t first = fork();
	if (first == 0) {
		execv(command[0], command);
		_exit(fail(command[0]));
	}
	if (first < 0 || waitpid(first, &status, 0) != first || status != 0)
		return fail("first child");
	pid_t second = fork_as(first);
	if (second == 0) {
		identity_work();
		_exit(0);
	}
	if (second != first || waitpid(second, &status, 0) != second || status != 0)
		return fail("second child");
	printf("%d\n", second);
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	say_ready();
	if (strcmp(what, "exec") == 0 && argc > 2) {
		identity_work();
		execv(argv[2], argv + 2);
		return fail(argv[2]);
	}
	if (strcmp(what, "leader") == 0) {
		pthread_t thread;
		pthread_create(&thread, NULL, work_and_exit, NULL);
		pthread_exit(NULL);
	}
	if (strcmp(what, "rename") == 0 && argc > 2) {
		identity_work();
		prctl(PR_SET_NAME, argv[2]);
		identity_work();
		return 0;
	}
	if (strcmp(what, "memfd") == 0 && argc > 2)
		return become_memfd(argv + 2);
	if (strcmp(what, "reuse") == 0 && argc > 2)
		return reuse_pid(argv + 2);
	fprintf(stderr, "usage: %s exec|leader|rename|memfd|reuse ..\n", argv[0]);
	return 2;
}
