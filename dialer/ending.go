package dialer

import (
	"context"
	"sync"
)

// Ending lets somebody end a dial who has no context around it. The zero value is for a
// dial that has not begun. Safe for concurrent use.
type Ending struct {
	mu     sync.Mutex
	over   bool
	cancel context.CancelFunc
}

// End ends the dial. One that is over, or that somebody has ended, is not concerned.
func (e *Ending) End() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.over = true
	if e.cancel != nil {
		e.cancel()
	}
}

// By is for who dials: End calls cancel from now on, and no earlier one. It is called at
// once if the dial was ended. Of nil it does nothing: nobody else ends that dial.
func (e *Ending) By(cancel context.CancelFunc) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cancel = cancel; e.over {
		cancel()
	}
}
