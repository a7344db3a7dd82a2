/*
 * A stack as deep as is asked for: main -> descend (DEPTH times) -> burn_here. Built without frame pointers. Runs until
 * the pipe on standard input closes.
 */
#include "burn.h"

static volatile uint64_t sink;

WORK static void burn_here(void)
{
	while (!atomic_load(&stop))
		for (int i = 0; i < 10000; i++)
			sink = sink * 6364136223846793005u + 1442695040888963407u;
}

/* What follows the call keeps it from being a jump. */
WORK static void descend(unsigned more)
{
	if (more > 1)
		descend(more - 1);
	else
		burn_here();
	sink++;
}

int main(int argc, char **argv)
{
	if (argc != 2 || atoi(argv[1]) < 1) {
		fprintf(stderr, "usage: %s DEPTH\n", argv[0]);
		return 2;
	}
	stop_at_end_of_input();
	say_ready();
	descend((unsigned)atoi(argv[1]));
	return 0;
}
