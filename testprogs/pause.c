/* Does nothing until it is killed: what holds the namespaces of a pod. */
#include <unistd.h>

int main(void)
{
	for (;;)
		pause();
}
