package router

import (
	"fmt"
	"runtime/debug"
)

// aside calls f in a goroutine of its own and waits for it. Who asks the kernel
// by netlink reads into 64 KiB of stack, and a stack shrinks only when garbage
// is collected: it is not to be that of a goroutine that lives with its flow.
// A panic goes on in the caller.
func aside(f func()) {
	failed := make(chan any, 1)
	go func() {
		defer func() {
			p := recover()
			if p != nil {
				p = fmt.Sprintf("%v\n%s", p, debug.Stack())
			}
			failed <- p
		}()
		f()
	}()
	if p := <-failed; p != nil {
		panic(p)
	}
}
