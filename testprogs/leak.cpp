/*
 * A server that forgets to give one buffer of each request back.
 *
 * leak [REQUESTS_PER_SECOND]
 *
 * Prints "ready", then handles requests until its input is closed. Of each request it keeps:
 *
 *   leak_session     16 KiB for ever
 *   remember_page    32 KiB until 20 more requests have come
 *   render_page      nothing of 64 KiB, in pieces
 */
#include <poll.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>

#define WORK __attribute__((noinline, noclone))

namespace {

constexpr size_t REMEMBERED = 20;

/* Keeps the compiler from leaving an allocation out. */
void seen(void *pointer)
{
	__asm__ volatile("" : : "r"(pointer) : "memory");
}

WORK void leak_session(unsigned long request)
{
	char *session = new char[16 << 10];
	snprintf(session, 32, "session %lu", request);
	seen(session);
}

WORK void remember_page(std::deque<std::unique_ptr<char[]>> &pages)
{
	std::unique_ptr<char[]> page(new char[32 << 10]);
	memset(page.get(), 'x', 64);
	pages.push_back(std::move(page));
	if (pages.size() > REMEMBERED)
		pages.pop_front();
}

WORK void render_page()
{
	for (int part = 0; part < 16; part++) {
		std::string text(4 << 10, 'a');
		seen(&text[0]);
	}
}

WORK void handle_request(unsigned long request, std::deque<std::unique_ptr<char[]>> &pages)
{
	render_page();
	remember_page(pages);
	leak_session(request);
	__asm__ volatile("" : : : "memory");
}

} // namespace

int main(int argc, char **argv)
{
	unsigned long per_second = argc > 1 ? strtoul(argv[1], nullptr, 10) : 200;
	std::deque<std::unique_ptr<char[]>> pages;
	struct pollfd input = { STDIN_FILENO, POLLIN, 0 };
	puts("ready");
	fflush(stdout);
	for (unsigned long request = 0; poll(&input, 1, 0) == 0; request++) {
		handle_request(request, pages);
		usleep(1000000 / (per_second == 0 ? 1 : per_second));
	}
	return 0;
}
