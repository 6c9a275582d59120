package dialer

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"cgtun/flow"
)

const (
	// lockedFor is how long a proxy that does not take our account is left
	// alone: many lock an account, or an address, that asks on and on.
	lockedFor = time.Minute
	// lockedAgain is the least time between two dials after that, until one of
	// them was told yes or no.
	lockedAgain = 10 * time.Second
)

// ErrAccount says that the proxy of an outbound does not take its account, or is
// not asked for now because it did not. It says nothing of the target.
var ErrAccount = errors.New("the proxy does not take the account")

// denied is such an answer.
type denied struct{ text string }

func (e *denied) Error() string           { return e.text }
func (e *denied) FlowReason() flow.Reason { return flow.Prohibited }
func (e *denied) Is(target error) bool    { return target == ErrAccount }

// lockout keeps dials from a proxy that has refused our account. After lockedFor
// one of them asks again, and only its success ends the spell: that of a dial
// which was on its way when the account was refused says nothing. Safe for
// concurrent use.
type lockout struct {
	name string // of the outbound
	log  *slog.Logger

	mu      sync.Mutex
	why     *denied // nil: open
	until   time.Time
	times   int // that the account was refused
	refused int // dials of this spell
}

// enter says why a dial may not go now. If it may, the outcome goes to leave,
// with pass.
func (l *lockout) enter() (pass int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why == nil {
		return l.times, nil
	}
	if left := time.Until(l.until); left > 0 {
		l.refused++
		return 0, fmt.Errorf("%w; it is not asked again for %v", l.why, left.Round(time.Second))
	}
	l.until = time.Now().Add(lockedAgain)
	return l.times, nil
}

func (l *lockout) leave(pass int, err error) {
	var no *denied
	var failed *Error
	refused := errors.As(err, &no) && errors.As(err, &failed) && failed.Hop == l.name
	if err != nil && !refused {
		return // nobody has looked at our account
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case refused:
		if l.why == nil {
			l.refused = 0
			l.log.Warn("outbound is out: the proxy does not take its account", "outbound", l.name, "err", no, "for", lockedFor)
		}
		l.why, l.until = no, time.Now().Add(lockedFor)
		l.times++
	case l.why != nil && pass == l.times:
		l.why = nil
		l.log.Warn("outbound is back: the proxy takes its account", "outbound", l.name, "refused", l.refused)
	}
}

// state says why dials are kept back, "" if they are not.
func (l *lockout) state() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why == nil {
		return ""
	}
	return l.why.Error()
}
