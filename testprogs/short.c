/* A process that is soon gone: main -> short_work for the given milliseconds of CPU time, 30 without an argument. */
#include "burn.h"

static volatile uint64_t sink;

WORK static void short_work(uint64_t end_ns)
{
	while (!atomic_load(&stop) && now_ns(CLOCK_PROCESS_CPUTIME_ID) < end_ns)
		for (int i = 0; i < 10000; i++)
			sink = sink * 6364136223846793005u + 1442695040888963407u;
}

int main(int argc, char **argv)
{
	uint64_t milliseconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 30;
	stop_at_end_of_input();
	say_ready();
	short_work(milliseconds * 1000000u);
	return 0;
}
