package flow

import (
	"sync"
	"sync/atomic"
)

// Burst has something done after each event: in one goroutine at a time, which goes on
// as long as there are events that it has not seen, and in none while nothing
// happens.
type Burst struct {
	do      func()
	workers *Workers
	run     func()
	wanted  atomic.Int64 // events since do last began, or found nothing; 0: nobody runs
	running sync.WaitGroup
}

// Init says what is done, and by whom.
func (b *Burst) Init(workers *Workers, do func()) {
	b.do, b.workers, b.run = do, workers, b.untilNone
}

// Event has do called from now on once more. It does not wait, whatever locks the
// caller holds. Safe for concurrent use.
func (b *Burst) Event() {
	if b.wanted.Add(1) == 1 {
		b.begin()
	}
}

// Look is Event where perhaps nothing has happened: nothing says so, in the caller's
// goroutine and never beside do.
func (b *Burst) Look(nothing func() bool) {
	if b.wanted.Add(1) == 1 && !(nothing() && b.wanted.CompareAndSwap(1, 0)) {
		b.begin()
	}
}

// Running says whether do may be running, or be about to.
func (b *Burst) Running() bool { return b.wanted.Load() > 0 }

// Wait returns when do does not run. No event may come from now on.
func (b *Burst) Wait() { b.running.Wait() }

func (b *Burst) begin() {
	b.running.Add(1)
	b.workers.Go(b.run)
}

func (b *Burst) untilNone() {
	defer b.running.Done()
	for {
		seen := b.wanted.Load()
		b.do()
		if b.wanted.CompareAndSwap(seen, 0) {
			return
		}
	}
}
