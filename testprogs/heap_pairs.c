/*
 * Allocates and gives back at a rate that its work sets.
 *
 * heap_pairs CPU_MILLISECONDS WORK
 *
 * Prints "ready"; for each line that it reads it allocates 64 bytes with WORK steps of arithmetic behind each, a thousand
 * times, gives them back, and begins again until it has used up so much CPU time. Then it prints pairs of malloc and free,
 * and the CPU time of either half in nanoseconds, as JSON.
 */
#include "burn.h"

#define BATCH 1000

/* Keeps the compiler from leaving an allocation out. */
static void *seen(void *pointer)
{
	__asm__ volatile("" : "+r"(pointer) : : "memory");
	return pointer;
}

WORK static void allocate(void **blocks, unsigned long work)
{
	uint64_t state = work;
	for (int at = 0; at < BATCH; at++) {
		blocks[at] = seen(malloc(64));
		for (unsigned long step = 0; step < work; step++)
			state = state * 6364136223846793005u + 1442695040888963407u;
		seen(&state);
	}
}

WORK static void give_back(void **blocks)
{
	for (int at = 0; at < BATCH; at++)
		free(seen(blocks[at]));
}

static void run(uint64_t cpu_ns, unsigned long work)
{
	static void *blocks[BATCH];
	uint64_t pairs = 0, malloc_ns = 0, free_ns = 0;
	while (malloc_ns + free_ns < cpu_ns) {
		uint64_t begin = now_ns(CLOCK_THREAD_CPUTIME_ID);
		allocate(blocks, work);
		uint64_t middle = now_ns(CLOCK_THREAD_CPUTIME_ID);
		give_back(blocks);
		malloc_ns += middle - begin;
		free_ns += now_ns(CLOCK_THREAD_CPUTIME_ID) - middle;
		pairs += BATCH;
	}
	printf("{\"pairs\":%lu,\"malloc_ns\":%lu,\"free_ns\":%lu}\n", (unsigned long)pairs, (unsigned long)malloc_ns,
		(unsigned long)free_ns);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	uint64_t cpu_ns = (argc > 1 ? strtoull(argv[1], NULL, 10) : 1000) * 1000000;
	unsigned long work = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	char line[16];
	say_ready();
	while (fgets(line, sizeof line, stdin) != NULL)
		run(cpu_ns, work);
	return 0;
}
