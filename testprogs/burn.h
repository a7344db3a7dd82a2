/* What the test programs have in common: functions that keep their frames, and when to end. */
#ifndef BURN_H
#define BURN_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* A function that is called as it is written: not inlined, not cloned, not merged with another. */
#ifdef __clang__
#define WORK __attribute__((noinline))
#else
#define WORK __attribute__((noipa))
#endif

/*
 * Asking for the frame's address makes a frame: gcc leaves it out of a function that calls nothing and has nothing on
 * the stack, whatever -fno-omit-frame-pointer says.
 */
#define FRAME __asm__ volatile("" : : "r"(__builtin_frame_address(0)))

/* Set when the pipe on standard input is closed. */
static atomic_bool stop;

static uint64_t now_ns(clockid_t clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void *wait_for_end_of_input(void *unused)
{
	char byte;
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	atomic_store(&stop, 1);
	return unused;
}

/* A terminal or /dev/null on standard input says nothing; only a pipe's other end does. */
static void stop_at_end_of_input(void)
{
	struct stat input;
	pthread_t watcher;
	if (fstat(STDIN_FILENO, &input) == 0 && S_ISFIFO(input.st_mode))
		pthread_create(&watcher, NULL, wait_for_end_of_input, NULL);
}

static void say_ready(void)
{
	puts("ready");
	fflush(stdout);
}

#endif
