/* A library with an allocator of its own, under the names that mimalloc has. It hands out one arena, round and round. */
#include <stddef.h>

#ifdef __clang__
#define WORK __attribute__((noinline))
#else
#define WORK __attribute__((noipa))
#endif

static _Alignas(16) char arena[1 << 20];
static size_t used;

WORK void *mi_malloc(size_t size)
{
	if (size > sizeof arena)
		return NULL;
	if (used + size > sizeof arena)
		used = 0;
	used += size;
	return arena + used - size;
}

WORK void mi_free(void *pointer)
{
	if (pointer == NULL)
		return;
	__asm__ volatile("" : : "r"(pointer) : "memory");
}

WORK static void *place_plugin(void)
{
	void *pointer = mi_malloc(4096);
	__asm__ volatile("" : "+r"(pointer) : : "memory");
	return pointer;
}

void allocate_by_plugin(void)
{
	mi_free(place_plugin());
}
