/*
 * Allocates at twelve places of known sizes, by six functions, in two threads, keeps some of it, and says what it did.
 *
 * heap_truth [ROUNDS]
 *
 * Prints "ready", waits for a line, allocates, prints what it allocated and still holds as JSON, and holds it until its
 * input is closed. Each place is a function of its own, so that its name in a profile tells the place.
 */
#include <malloc.h>
#include <string.h>

#include "burn.h"

#define PLACES 12
#define THREADS 2

struct count {
	uint64_t allocs, bytes, held, held_bytes;
};

struct block {
	struct block *next;
};

struct worker {
	pthread_t thread;
	struct count counts[PLACES];
	struct block *held[PLACES];
	unsigned long rounds;
};

/* Keeps the compiler from leaving an allocation out. */
static void *seen(void *pointer)
{
	__asm__ volatile("" : "+r"(pointer) : : "memory");
	return pointer;
}

WORK static void *place_malloc_16(void) { return seen(malloc(16)); }
WORK static void *place_malloc_48(void) { return seen(malloc(48)); }
WORK static void *place_calloc_200(void) { return seen(calloc(4, 50)); }
WORK static void *place_malloc_512(void) { return seen(malloc(512)); }
WORK static void *place_realloc_700(void) { return seen(realloc(seen(NULL), 700)); }
WORK static void *place_realloc_3000(void) { return seen(realloc(seen(malloc(300)), 3000)); }
WORK static void *place_posix_memalign_4096(void)
{
	void *pointer = NULL;
	return posix_memalign(&pointer, 16, 4096) == 0 ? seen(pointer) : NULL;
}
WORK static void *place_posix_memalign_10000(void)
{
	void *pointer = NULL;
	return posix_memalign(&pointer, 64, 10000) == 0 ? seen(pointer) : NULL;
}
WORK static void *place_aligned_alloc_16384(void) { return seen(aligned_alloc(16, 16384)); }
WORK static void *place_memalign_65536(void) { return seen(memalign(256, 65536)); }
WORK static void *place_malloc_262144(void) { return seen(malloc(262144)); }
WORK static void *place_calloc_1048576(void) { return seen(calloc(1, 1048576)); }

/* `bytes` and `allocs` are those of one call; `held_bytes` is what it leaves; every `keep`th is kept, 0 is none. */
static const struct place {
	const char *name;
	void *(*allocate)(void);
	uint64_t allocs, bytes, held_bytes, per_round, keep;
} places[PLACES] = {
	{ "place_malloc_16", place_malloc_16, 1, 16, 16, 250, 10 },
	{ "place_malloc_48", place_malloc_48, 1, 48, 48, 100, 0 },
	{ "place_calloc_200", place_calloc_200, 1, 200, 200, 60, 4 },
	{ "place_malloc_512", place_malloc_512, 1, 512, 512, 40, 0 },
	{ "place_realloc_700", place_realloc_700, 1, 700, 700, 20, 8 },
	{ "place_realloc_3000", place_realloc_3000, 2, 3300, 3000, 10, 10 },
	{ "place_posix_memalign_4096", place_posix_memalign_4096, 1, 4096, 4096, 5, 20 },
	{ "place_posix_memalign_10000", place_posix_memalign_10000, 1, 10000, 10000, 2, 20 },
	{ "place_aligned_alloc_16384", place_aligned_alloc_16384, 1, 16384, 16384, 2, 0 },
	{ "place_memalign_65536", place_memalign_65536, 1, 65536, 65536, 1, 40 },
	{ "place_malloc_262144", place_malloc_262144, 1, 262144, 262144, 1, 100 },
	{ "place_calloc_1048576", place_calloc_1048576, 1, 1048576, 1048576, 1, 200 },
};

/* Allocates once, and keeps it or gives it back. */
static void visit(struct worker *worker, int number)
{
	const struct place *place = &places[number];
	struct count *count = &worker->counts[number];
	uint64_t visits = count->allocs / place->allocs;
	struct block *block = place->allocate();
	if (block == NULL)
		abort();
	count->allocs += place->allocs;
	count->bytes += place->bytes;
	if (place->keep == 0 || visits % place->keep != 0) {
		free(block);
		return;
	}
	block->next = worker->held[number];
	worker->held[number] = block;
	count->held += 1;
	count->held_bytes += place->held_bytes;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	for (unsigned long round = 0; round < worker->rounds; round++)
		for (int number = 0; number < PLACES; number++)
			for (uint64_t n = 0; n < places[number].per_round; n++)
				visit(worker, number);
	return NULL;
}

static void tell(const struct worker *workers)
{
	printf("{");
	for (int number = 0; number < PLACES; number++) {
		struct count sum = { 0, 0, 0, 0 };
		for (int thread = 0; thread < THREADS; thread++) {
			const struct count *count = &workers[thread].counts[number];
			sum.allocs += count->allocs;
			sum.bytes += count->bytes;
			sum.held += count->held;
			sum.held_bytes += count->held_bytes;
		}
		printf("%s\"%s\":[%lu,%lu,%lu,%lu]", number == 0 ? "" : ",", places[number].name,
			(unsigned long)sum.allocs, (unsigned long)sum.bytes, (unsigned long)sum.held,
			(unsigned long)sum.held_bytes);
	}
	puts("}");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static struct worker workers[THREADS];
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 10) : 800;
	char line[16];
	say_ready();
	if (fgets(line, sizeof line, stdin) == NULL)
		return 0;
	for (int thread = 0; thread < THREADS; thread++) {
		workers[thread].rounds = rounds;
		pthread_create(&workers[thread].thread, NULL, work, &workers[thread]);
	}
	for (int thread = 0; thread < THREADS; thread++)
		pthread_join(workers[thread].thread, NULL);
	tell(workers);
	while (fgets(line, sizeof line, stdin) != NULL)
		;
	return 0;
}
