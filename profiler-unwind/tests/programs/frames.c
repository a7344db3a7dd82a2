// Frames of every kind that a compiler makes without frame pointers, each reached in main and in a thread.
#define _GNU_SOURCE
#include <alloca.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NOINLINE __attribute__((noinline))

static volatile unsigned long sink;

NOINLINE static void leaf(unsigned long value) { sink += value * 2654435761u; }

NOINLINE static int compare(const void *a, const void *b) {
    leaf(*(const int *)a);
    return *(const int *)a - *(const int *)b;
}

NOINLINE static void callback(void) {
    int values[] = {5, 3, 9, 1, 7};
    qsort(values, 5, sizeof values[0], compare);
    sink += values[0];
}

// A frame whose size is known only when it runs: based on rbp.
NOINLINE static void dynamic_frame(size_t bytes) {
    char *room = alloca(bytes);
    memset(room, (int)bytes, bytes);
    sink += room[bytes / 2];
    callback();
}

// A realigned frame: the CFA lies in memory (DRAP).
NOINLINE static void aligned_frame(size_t bytes) {
    _Alignas(64) unsigned char block[128];
    memset(block, (int)bytes, sizeof block);
    dynamic_frame(bytes + block[3]);
    sink += block[5] + ((uintptr_t)block & 63);
}

NOINLINE static unsigned recursion(unsigned depth) {
    if (depth == 0) {
        aligned_frame(24);
        return 1;
    }
    unsigned below = recursion(depth - 1);
    leaf(below);
    return below + depth;
}

static void handler(int signal) {
    leaf(signal);
    callback();
}

NOINLINE static void clock_from_vdso(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    sink += now.tv_nsec;
}

NOINLINE static void signals(int on_own_stack) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = on_own_stack ? SA_ONSTACK : 0};
    sigaction(SIGUSR1, &action, NULL);
    raise(SIGUSR1);
}

static void *work(void *depth) {
    sink += recursion((uintptr_t)depth);
    clock_from_vdso();
    signals(0);
    static char room[65536];
    stack_t stack = {.ss_sp = room, .ss_size = sizeof room};
    sigaltstack(&stack, NULL);
    signals(1);
    return NULL;
}

int main(void) {
    work((void *)4);
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void *)3) != 0) return 1;
    pthread_join(thread, NULL);
    printf("%d\n", sink != 0);
    return 0;
}
