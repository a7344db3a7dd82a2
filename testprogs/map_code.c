/*
 * What mapping costs: maps the first page of its own file and unmaps it again, 100,000 times as data and as often as code,
 * in turns of 1,000. Prints the nanoseconds of a pair of both as JSON.
 */
#include "burn.h"

#include <fcntl.h>
#include <sys/mman.h>

#define TURNS 100
#define PAIRS 1000

static uint64_t pairs_ns(int file, int protection)
{
	uint64_t start_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
	for (int i = 0; i < PAIRS; i++) {
		void *page = mmap(NULL, 4096, protection, MAP_PRIVATE, file, 0);
		if (page == MAP_FAILED || munmap(page, 4096) != 0) {
			perror("mmap");
			exit(1);
		}
	}
	return now_ns(CLOCK_THREAD_CPUTIME_ID) - start_ns;
}

int main(void)
{
	int file = open("/proc/self/exe", O_RDONLY);
	uint64_t data_ns = 0, code_ns = 0;
	stop_at_end_of_input();
	say_ready();
	for (int turn = 0; turn < TURNS && !stop; turn++) {
		data_ns += pairs_ns(file, PROT_READ);
		code_ns += pairs_ns(file, PROT_READ | PROT_EXEC);
	}
	printf("{\"data_ns\": %.1f, \"code_ns\": %.1f}\n", (double)data_ns / TURNS / PAIRS, (double)code_ns / TURNS / PAIRS);
	return 0;
}
