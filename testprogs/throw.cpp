/*
 * Stacks through C++ exceptions: main -> run -> descend (6 times) -> work before each throw, Cleanup::~Cleanup -> work
 * while frames are left, and run -> work in the handler. Built without frame pointers. Runs until the pipe on standard
 * input closes.
 */
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

#ifdef __clang__
#define WORK __attribute__((noinline))
#else
#define WORK __attribute__((noipa))
#endif

static std::atomic<bool> stop;
static volatile uint64_t sink;

WORK static void work(unsigned rounds)
{
	for (unsigned i = 0; i < rounds; i++)
		sink = sink * 6364136223846793005u + 1442695040888963407u;
}

struct Cleanup {
	WORK ~Cleanup()
	{
		work(3000);
		sink = sink + 1;
	}
};

WORK static uint64_t descend(unsigned depth)
{
	Cleanup cleanup;
	if (depth == 0) {
		work(20000);
		throw std::runtime_error("the deepest");
	}
	uint64_t below = descend(depth - 1);
	return below + depth;
}

WORK static uint64_t run()
{
	uint64_t caught = 0;
	while (!stop) {
		try {
			caught += descend(6);
		} catch (const std::runtime_error &error) {
			work(20000);
			caught += error.what()[0] == 't';
		}
	}
	return caught;
}

int main()
{
	struct stat input;
	std::thread watcher;
	if (fstat(STDIN_FILENO, &input) == 0 && S_ISFIFO(input.st_mode))
		watcher = std::thread([] {
			char byte;
			while (read(STDIN_FILENO, &byte, 1) > 0)
				;
			stop = true;
		});
	std::puts("ready");
	std::fflush(stdout);
	uint64_t caught = run();
	if (watcher.joinable())
		watcher.join();
	return caught == 0;
}
