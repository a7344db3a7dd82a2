/*
 * Stacks of a given depth: _start, two functions of the C library, main, descend as often as it takes, and burn make
 * that many frames. Built without frame pointers. Runs until the pipe on standard input closes.
 */
#include "burn.h"

static volatile uint64_t sink;

WORK static uint64_t burn(void)
{
	while (!atomic_load(&stop))
		for (int i = 0; i < 100000; i++)
			sink = sink * 6364136223846793005u + 1442695040888963407u;
	return sink;
}

WORK static uint64_t descend(unsigned more)
{
	uint64_t below = more == 0 ? burn() : descend(more - 1);
	sink += below;
	return below + more;
}

int main(int argc, char **argv)
{
	unsigned depth = argc > 1 ? (unsigned)atoi(argv[1]) : 0;
	if (depth < 6) {
		fprintf(stderr, "usage: %s FRAMES, at least 6\n", argv[0]);
		return 2;
	}
	stop_at_end_of_input();
	say_ready();
	return descend(depth - 6) == 1;
}
