// Cgoburn's stacks go through both languages: main.main -> main.goOuter -> c_outer -> c_hot, the latter two in C without
// frame pointers and on a stack of their own. It ends when the pipe on its standard input closes.
package main

/*
#cgo CFLAGS: -O2 -g1 -fomit-frame-pointer
#include <stdint.h>

static volatile uint64_t sink;

__attribute__((noipa)) static void c_hot(unsigned rounds)
{
	for (unsigned i = 0; i < rounds; i++)
		sink = sink * 6364136223846793005u + 1442695040888963407u;
}

__attribute__((noipa)) static uint64_t c_outer(void)
{
	c_hot(200000);
	return sink + 1;
}
*/
import "C"

import (
	"fmt"
	"io"
	"os"
)

var sink uint64

//go:noinline
func goOuter() {
	sink += uint64(C.c_outer())
}

func main() {
	if input, err := os.Stdin.Stat(); err == nil && input.Mode()&os.ModeNamedPipe != 0 {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
	}
	fmt.Println("ready")
	for {
		goOuter()
	}
}
