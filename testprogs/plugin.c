/*
 * A library in two versions whose code differs in the size of its frames: plugin_work -> back in the program that
 * loaded it. Built without frame pointers.
 */
#include <stdint.h>
#include <string.h>

#ifdef __clang__
#define WORK __attribute__((noinline))
#else
#define WORK __attribute__((noipa))
#endif

#if VERSION == 1
#define NAME(name) name##_1
#define BYTES 200
#else
#define NAME(name) name##_2
#define BYTES 5000
#endif

/* Code before the work, so that one version's addresses are no rows of the other. */
WORK void NAME(plugin_before)(volatile char *bytes)
{
	for (int i = 0; i < BYTES; i += 8)
		bytes[i] = (char)(i * VERSION);
}

WORK static int NAME(plugin_inner)(void (*work)(void))
{
	volatile char bytes[BYTES];
	NAME(plugin_before)(bytes);
	work();
	return bytes[BYTES - 8];
}

int plugin_work(void (*work)(void));

WORK int plugin_work(void (*work)(void))
{
	volatile char more[BYTES / 2];
	memset((void *)more, 1, sizeof more);
	return NAME(plugin_inner)(work) + more[0];
}
