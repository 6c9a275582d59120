package stack

import (
	"context"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// A connection is opened on a deep goroutine stack and with much garbage, and
// then waits for long on a shallow one. The runtime collects when the heap has
// doubled, which an idle process never does, so after a burst of connections
// half of what is held is nothing. trim collects when a burst is over: twice,
// because stacks shrink by half each time.

const (
	trimEvery = 2 * time.Second
	// burst is how many connections must have come since the last time, and
	// lull how few in the last period, for the work to be worth it: some
	// tens of milliseconds at 10,000 connections.
	burst, lull = 500, 50
)

// trimming lets one stack of the process do it at a time.
var trimming atomic.Bool

// trim looks for the end of a burst until ctx ends.
func (s *Stack) trim(ctx context.Context) {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	var trimmed, last uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := s.count.accepted.Load() + s.count.rejected.Load()
		quiet := now-last < lull
		last = now
		if !quiet || now-trimmed < burst || !trimming.CompareAndSwap(false, true) {
			continue
		}
		trimmed = now
		runtime.GC()
		debug.FreeOSMemory()
		trimming.Store(false)
	}
}
