/*
 * Burns in a function whose name is given when it is compiled: main -> HOT. Two programs of this source have the same code
 * at the same addresses, and the build id that the linker is told.
 */
#include "burn.h"

WORK unsigned HOT(unsigned rounds)
{
	volatile unsigned sum = 0;
	for (unsigned i = 0; i < rounds; i++)
		sum = sum * 31 + i;
	return sum;
}

int main(void)
{
	stop_at_end_of_input();
	say_ready();
	while (!atomic_load(&stop))
		HOT(1000000);
	return 0;
}
