package router

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// errPanicked is what became of a call that the log tells of.
var errPanicked = errors.New("ended by a panic")

// aside calls do in a goroutine of its own and waits for it. Who asks the kernel
// by netlink reads into 64 KiB of stack, and a stack shrinks only when garbage
// is collected: it is not to be that of a goroutine that lives with its flow.
func (r *Router) aside(do func() error) error {
	done := make(chan error, 1)
	r.asides.Go(func() {
		err := errPanicked
		defer func() {
			if p := recover(); p != nil {
				r.panicked(p)
			}
			done <- err
		}()
		err = do()
	})
	return <-done
}

// panicked counts and tells of a panic. It is to be called where that was
// recovered, for the stack.
func (r *Router) panicked(p any, attrs ...any) {
	r.counts.panics.Add(1)
	r.log.Error("flow ended by a panic", append(attrs, "err", fmt.Sprint(p), "stack", string(debug.Stack()))...)
}
