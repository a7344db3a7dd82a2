// Goburn's hottest stack is main.main -> main.goOuter -> main.goHot. It ends after the given seconds, or when the pipe
// on its standard input closes.
package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

var sink uint64

// goHot works on an array, which is on its stack: without one, the compiler gives it no frame and no frame pointer.
//
//go:noinline
func goHot(x uint64, rounds int) uint64 {
	words := [4]uint64{x, x, x, x}
	for i := 0; i < rounds; i++ {
		words[i&3] = words[(i+1)&3]*6364136223846793005 + 1442695040888963407
	}
	return words[0]
}

// goOuter takes about 1 ms.
//
//go:noinline
func goOuter() {
	sink = goHot(sink, 700_000)
}

func exitAtEndOfInput() {
	input, err := os.Stdin.Stat()
	if err != nil || input.Mode()&os.ModeNamedPipe == 0 {
		return
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
}

func main() {
	var end time.Time
	if len(os.Args) > 1 {
		seconds, err := strconv.ParseFloat(os.Args[1], 64)
		if err != nil {
			fmt.Fprintln(os.Stderr, "usage: goburn [SECONDS]")
			os.Exit(2)
		}
		end = time.Now().Add(time.Duration(seconds * float64(time.Second)))
	}
	exitAtEndOfInput()
	fmt.Println("ready")
	for end.IsZero() || time.Now().Before(end) {
		goOuter()
	}
}
