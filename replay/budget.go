package replay

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Budget bounds the flows that replay at a time: a fifth of those that live, or
// ten. Where everything fails, no more is asked of what is left; others wait for
// their turn, in the order in which they came. Safe for concurrent use.
type Budget struct {
	live func() int

	mu    sync.Mutex
	used  int
	queue []chan struct{} // closed: it has a place
}

const (
	leastBudget = 10
	budgetShare = 5 // one of so many
	// maxQueued is how long a flow waits for its turn. Paths fail for many flows in one
	// moment, and a replay takes no longer than a connection does.
	maxQueued = 5 * time.Second
)

var errNoPlace = errors.New("too many flows replay")

// NewBudget returns a Budget; live is the number of flows.
func NewBudget(live func() int) *Budget { return &Budget{live: live} }

// take waits for a place until ctx ends, for maxQueued at most.
func (b *Budget) take(ctx context.Context) error {
	turn := make(chan struct{})
	b.mu.Lock()
	b.queue = append(b.queue, turn)
	b.serve()
	b.mu.Unlock()
	late := time.NewTimer(maxQueued)
	defer late.Stop()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	case <-late.C:
	}
	return b.leave(turn)
}

// leave takes somebody out of the queue: nil if it was his turn meanwhile.
func (b *Budget) leave(turn chan struct{}) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.queue, turn)
	if i < 0 {
		return nil
	}
	b.queue = slices.Delete(b.queue, i, i+1)
	return errNoPlace
}

// give gives a place back.
func (b *Budget) give() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used--
	b.serve()
}

// serve gives the places that there are to those who wait. Under mu.
func (b *Budget) serve() {
	n := min(len(b.queue), max(0, b.room()-b.used))
	for _, turn := range b.queue[:n] {
		close(turn)
	}
	b.used += n
	b.queue = slices.Delete(b.queue, 0, n)
}

// room is how many places there are in all.
func (b *Budget) room() int { return max(leastBudget, b.live()/budgetShare) }
