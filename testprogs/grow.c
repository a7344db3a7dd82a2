/*
 * Touches memory of its own and pages of a file, and keeps both.
 *
 * grow MEBIBYTES FILE
 *
 * Prints "ready"; for each line that it reads it touches so many mebibytes of new memory in `touch_memory`, reads all of
 * the mapped file in `read_file`, has the kernel write into new memory in `fill_by_kernel` (a quarter as much), and prints
 * "done". It holds the memory until its input is closed.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "burn.h"

#define PAGE 4096

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

int main(int argc, char **argv)
{
	size_t bytes = (argc > 1 ? strtoul(argv[1], NULL, 10) : 64) << 20;
	int file = argc > 2 ? open(argv[2], O_RDONLY) : -1;
	struct stat about;
	char line[16];
	say_ready();
	while (fgets(line, sizeof line, stdin) != NULL) {
		touch_memory(map(bytes, -1), bytes);
		if (file >= 0 && fstat(file, &about) == 0 && about.st_size > 0)
			read_file(map(about.st_size, file), about.st_size);
		fill_by_kernel(map(bytes / 4, -1), bytes / 4);
		puts("done");
		fflush(stdout);
	}
	return 0;
}
