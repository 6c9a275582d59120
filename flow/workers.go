package flow

import (
	"context"
	"sync"
)

// Workers call functions in goroutines that are used again. A new goroutine begins
// with a stack of 2 KiB; netstack, or a dial, has it copied twice or three times,
// which takes longer than much that it is for. The zero value is ready, and nil is,
// too; without Run each call has a goroutine of its own. Safe for concurrent use.
//
// A stack shrinks only when garbage is collected: calls that need a deep one, and
// calls that wait for long, do not share Workers. A call leaves its thread as it was.
type Workers struct {
	mu      sync.Mutex
	open    bool          // Run has begun, and not ended
	idle    []chan func() // of workers with nothing to do; who was busy last is last
	leaving sync.WaitGroup
}

// maxIdle is how many wait for work at most.
const maxIdle = 8

// Run keeps workers until ctx ends. It returns when none waits for work; one that is
// in a call then ends with it.
func (w *Workers) Run(ctx context.Context) {
	w.mu.Lock()
	w.open = true
	w.mu.Unlock()
	<-ctx.Done()
	w.mu.Lock()
	w.open = false
	w.leaving.Add(len(w.idle))
	for _, c := range w.idle {
		c <- nil
	}
	w.idle = nil
	w.mu.Unlock()
	w.leaving.Wait()
}

// Go calls f in a goroutine.
func (w *Workers) Go(f func()) {
	if w == nil {
		go f()
		return
	}
	w.mu.Lock()
	n := len(w.idle)
	if n == 0 {
		w.mu.Unlock()
		go w.work(f)
		return
	}
	c := w.idle[n-1]
	w.idle = w.idle[:n-1]
	w.mu.Unlock()
	c <- f
}

func (w *Workers) work(f func()) {
	var calls chan func()
	for {
		f()
		if calls == nil {
			calls = make(chan func(), 1)
		}
		if !w.wait(calls) {
			return
		}
		if f = <-calls; f == nil {
			w.leaving.Done()
			return
		}
	}
}

// wait says whether a worker is to wait for more work.
func (w *Workers) wait(c chan func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.open || len(w.idle) >= maxIdle {
		return false
	}
	w.idle = append(w.idle, c)
	return true
}
