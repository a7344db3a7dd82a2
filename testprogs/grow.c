/*
 * Touches memory of its own and pages of a file, and keeps both.
 *
 * grow MEBIBYTES FILE
 *
 * Prints "ready"; for each line that it reads it touches so many mebibytes of new memory in `touch_memory`, reads all of
 * the mapped file in `read_file`, has the kernel write into new memory in `fill_by_kernel` (a quarter as much), and prints
 * "done". It holds the memory until its input is closed.
 *
 * For the line "huge TIMES" it touches so many mebibytes of huge pages in `touch_huge`, one fault each, gives them back a
 * while later, and begins again so many times. It prints the bytes that the kernel says came as huge pages.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "burn.h"

#define PAGE 4096
#define HUGE_PAGE (2ul << 20)

static volatile uint64_t sink;

/* Small pages, whatever the machine's default is. */
static char *map(size_t bytes, int fd)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_PRIVATE;
	char *start = mmap(NULL, bytes, fd < 0 ? PROT_READ | PROT_WRITE : PROT_READ, flags, fd, 0);
	if (start == MAP_FAILED)
		abort();
	madvise(start, bytes, fd < 0 ? MADV_NOHUGEPAGE : MADV_RANDOM);
	return start;
}

WORK static void touch_memory(char *start, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += PAGE)
		start[at] = 1;
}

WORK static void read_file(const char *start, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += PAGE)
		sink += start[at];
}

WORK static void fill_by_kernel(char *start, size_t bytes)
{
	int zeros = open("/dev/zero", O_RDONLY);
	for (size_t at = 0; at < bytes; at += PAGE)
		if (read(zeros, start + at, 16) != 16)
			abort();
	close(zeros);
}

WORK static void touch_huge(char *start, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += HUGE_PAGE)
		start[at] = 1;
}

/* Bytes of all huge pages of the process. */
static size_t huge_bytes(void)
{
	FILE *rollup = fopen("/proc/self/smaps_rollup", "r");
	char line[128];
	size_t kib = 0;
	while (rollup != NULL && fgets(line, sizeof line, rollup) != NULL)
		if (sscanf(line, "AnonHugePages: %zu", &kib) == 1)
			break;
	if (rollup != NULL)
		fclose(rollup);
	return kib << 10;
}

static size_t touch_huge_again_and_again(size_t bytes, int times)
{
	/* Who looks at the last page when it has been told of its fault finds it. */
	const struct timespec a_while = {.tv_nsec = 50000000};
	char *start = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (start == MAP_FAILED)
		abort();
	start = (char *)(((uintptr_t)start + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	madvise(start, bytes, MADV_HUGEPAGE);
	size_t total = 0;
	for (int time = 0; time < times; time++) {
		touch_huge(start, bytes);
		total += huge_bytes();
		nanosleep(&a_while, NULL);
		madvise(start, bytes, MADV_DONTNEED);
	}
	return total;
}

int main(int argc, char **argv)
{
	size_t bytes = (argc > 1 ? strtoul(argv[1], NULL, 10) : 64) << 20;
	int file = argc > 2 ? open(argv[2], O_RDONLY) : -1;
	struct stat about;
	char line[16];
	say_ready();
	while (fgets(line, sizeof line, stdin) != NULL) {
		int times;
		if (sscanf(line, "huge %d", &times) == 1) {
			printf("%zu\n", touch_huge_again_and_again(bytes, times));
			fflush(stdout);
			continue;
		}
		touch_memory(map(bytes, -1), bytes);
		if (file >= 0 && fstat(file, &about) == 0 && about.st_size > 0)
			read_file(map(about.st_size, file), about.st_size);
		fill_by_kernel(map(bytes / 4, -1), bytes / 4);
		puts("done");
		fflush(stdout);
	}
	return 0;
}
