package dialer

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
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
type denied struct {
	text  string
	asked bool // it came when a target was named: it may be meant for that alone
}

func (e *denied) Error() string           { return e.text }
func (e *denied) FlowReason() flow.Reason { return flow.Prohibited }
func (e *denied) Is(target error) bool    { return target == ErrAccount }

// lockout keeps dials from a proxy that has refused our account. After lockedFor
// one of them asks again, and only its success ends the spell: that of a dial
// which was on its way when the account was refused says nothing. Safe for
// concurrent use.
//
// A proxy may want an account for some targets only, and which are asked for is the
// clients' choice: no client is to take an outbound from the others by that. So a
// refusal that came for a target is of the account if that target was let in
// before, or none ever was; else it is of that target, which is not asked for again
// for lockedFor. And where none ever was, a source that was not refused itself may
// ask, one in lockedAgain, and its success ends the spell.
type lockout struct {
	name string // of the outbound
	log  *slog.Logger

	mu      sync.Mutex
	why     *denied // nil: open
	until   time.Time
	again   time.Time           // when another source may ask
	blame   map[lockSource]bool // those that were refused in this spell; nil: the account was, for sure
	times   int                 // that the account was refused
	refused int                 // dials of this spell

	// Of maxTaken targets at most: those that were let in, and those that alone
	// are refused, and until when.
	taken  map[lockTarget]bool
	closed map[lockTarget]time.Time
}

// maxTaken bounds the targets that are remembered.
const maxTaken = 1024

// lockTarget is what a proxy is asked for, and by whom: a namespace, but at home
// each address, as machines behind its interfaces have theirs.
type (
	lockTarget struct {
		addr netip.AddrPort
		name string
	}
	lockSource struct {
		attachment string
		addr       netip.Addr
	}
	lockDial struct {
		to lockTarget
		by lockSource
	}
)

// lockDial returns what the lockout looks at in a dial for t.
func (p *Proxy) lockDial(t Target) (d lockDial) {
	d.to.addr = netip.AddrPortFrom(t.Addr.Addr().Unmap(), t.Addr.Port())
	if p.names {
		d.to.name = t.Name
	}
	if t.Flow != nil {
		d.by.attachment = t.Flow.Attachment
	}
	if d.by.attachment == flow.Home {
		d.by.addr = t.Flow.Src.Addr().Unmap()
	}
	return d
}

// enter says why a dial may not go now. If it may, the outcome goes to leave,
// with pass.
func (l *lockout) enter(d lockDial) (pass int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if left := l.closed[d.to].Sub(now); left > 0 {
		return 0, fmt.Errorf("%w: the proxy wants another account for this target; it is not asked for again for %v", ErrAccount, left.Round(time.Second))
	}
	if l.why == nil {
		return l.times, nil
	}
	left := l.until.Sub(now)
	other := l.blame != nil && !l.blame[d.by] && !now.Before(l.again)
	if left > 0 && !other {
		l.refused++
		return 0, fmt.Errorf("%w; it is not asked again for %v", l.why, left.Round(time.Second))
	}
	l.again = now.Add(lockedAgain)
	if left <= 0 {
		l.until = l.again
	}
	return l.times, nil
}

func (l *lockout) leave(pass int, d lockDial, err error) {
	var no *denied
	var failed *Error
	refused := errors.As(err, &no) && errors.As(err, &failed) && failed.Hop == l.name
	if err != nil && !refused {
		return // nobody has looked at our account
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case refused && no.asked && len(l.taken) > 0 && !l.taken[d.to]:
		remember(&l.closed, d.to, time.Now().Add(lockedFor))
	case refused:
		l.refuse(no, d)
	default:
		remember(&l.taken, d.to, true)
		if l.why == nil || pass != l.times {
			return
		}
		l.why = nil
		l.log.Warn("outbound is back: the proxy takes its account", "outbound", l.name, "refused", l.refused)
	}
}

// refuse begins a spell, or prolongs it.
func (l *lockout) refuse(no *denied, d lockDial) {
	now := time.Now()
	if l.why == nil {
		l.refused, l.blame = 0, nil
		if no.asked && len(l.taken) == 0 {
			l.blame = map[lockSource]bool{}
		}
		l.log.Warn("outbound is out: the proxy does not take its account", "outbound", l.name, "err", no, "for", lockedFor)
	}
	if l.blame != nil {
		remember(&l.blame, d.by, true)
	}
	l.why, l.until, l.again = no, now.Add(lockedFor), now.Add(lockedAgain)
	l.times++
}

// remember puts a key into a map of maxTaken, in the place of any other where it is
// full.
func remember[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = map[K]V{}
	}
	if _, ok := (*m)[k]; !ok && len(*m) >= maxTaken {
		for old := range *m {
			delete(*m, old)
			break
		}
	}
	(*m)[k] = v
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
