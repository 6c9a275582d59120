package dialer

import (
	"context"
	"errors"
	"sync"

	"cgtun/flow"
)

// Ending lets somebody end a dial who has no context around it. The zero value is for a
// dial that has not begun. Safe for concurrent use.
type Ending struct {
	mu     sync.Mutex
	over   bool
	cancel context.CancelCauseFunc
}

// End ends the dial. One that is over, or that somebody has ended, is not concerned.
func (e *Ending) End() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.over = true
	if e.cancel != nil {
		e.cancel(nil)
	}
}

// By is for who dials: End calls cancel from now on, and no earlier one. It is called at
// once if the dial was ended. Of nil it does nothing: nobody else ends that dial.
func (e *Ending) By(cancel context.CancelCauseFunc) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cancel = cancel; e.over {
		cancel(nil)
	}
}

// Cause is for what (context.Cause) who keeps the time of a dial, or knows
// what becomes of its path, ends it: what the dial then says is this, and not that it was
// canceled.
type Cause struct {
	Reason flow.Reason
	Why    string
}

// Error implements error.
func (c *Cause) Error() string { return c.Why }

// FlowReason lets flow.ReasonOf find the reason.
func (c *Cause) FlowReason() flow.Reason { return c.Reason }

// WhyEnded returns err, or the *Cause of the end of ctx where err says no more than that it
// was canceled. Other causes are no failure of who is dialled.
func WhyEnded(ctx context.Context, err error) error {
	if !errors.Is(err, context.Canceled) {
		return err
	}
	if cause := (*Cause)(nil); errors.As(context.Cause(ctx), &cause) {
		return cause
	}
	return err
}
