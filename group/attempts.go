package group

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

// attempts are those of all races that are under way. One timer is for all of them:
// nearly always they have ended before anything is to be done. Under Scores.mu.
type attempts struct {
	list  []*try // in no order
	timer *time.Timer
	rings time.Time // when the timer does; zero: it does not run
}

// try is one member's attempt.
type try struct {
	*member
	began, until time.Time
	cancel       context.CancelCauseFunc
	done         bool
	err          error

	place  int         // in attempts: one more than its index; 0: not there
	over   bool        // its time, which it was told
	joinAt time.Time   // when the others join it
	others joiner      // nil: nobody waits
	alone  atomic.Bool // they have not joined, and it has not ended
}

// joiner has the others join an attempt, in a goroutine of its own.
type joiner interface{ join() }

// end ends an attempt that nobody wants any more. One whose time is up is told so.
func (t *try) end(now time.Time) {
	if now.Before(t.until) {
		t.cancel(nil)
		return
	}
	t.cancel(&dialer.Cause{Reason: flow.TimedOut, Why: fmt.Sprintf("silent for %v", t.until.Sub(t.began))})
}

// The pause between two looks at the attempts: at least so long, and for each of them:
// where thousands wait for what is dead, nobody is to wait for who looks at them.
const (
	leastPause = time.Millisecond
	pauseEach  = time.Microsecond
)

func (a *attempts) add(t *try) {
	a.list = append(a.list, t)
	t.place = len(a.list)
}

// remove takes one out, if it is in.
func (a *attempts) remove(t *try) {
	if t.place == 0 {
		return
	}
	last := len(a.list) - 1
	moved := a.list[last]
	a.list[t.place-1], moved.place = moved, t.place
	a.list[last], t.place = nil, 0
	a.list = a.list[:last]
}

// begin is for an attempt that is about to be made. Who calls it takes it out of the
// list when it has ended. Under s.mu.
func (s *known) begin(t *try) {
	t.path.dials++
	t.path.used = t.began
	s.attempts.add(t)
	if at := t.next(t.began); s.attempts.rings.IsZero() || at.Before(s.attempts.rings) {
		s.ringAt(at)
	}
}

// end takes an attempt out that has ended.
func (s *known) end(t *try) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempts.remove(t)
}

// endAll ends the attempts by a path. Under s.mu.
func (s *known) endAll(p *path, why error) {
	for _, t := range s.attempts.list {
		if t.path == p {
			t.cancel(why)
		}
	}
}

func (s *known) ringAt(at time.Time) {
	s.attempts.rings = at
	if s.attempts.timer == nil {
		s.attempts.timer = time.AfterFunc(time.Until(at), s.ring)
		return
	}
	s.attempts.timer.Reset(time.Until(at))
}

// ring is called by the timer.
func (s *known) ring() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.attempts.rings = time.Time{}
	var next time.Time
	for _, t := range s.attempts.list {
		if at := t.due(now); next.IsZero() || at.Before(next) {
			next = at
		}
	}
	if !next.IsZero() {
		pause := leastPause + time.Duration(len(s.attempts.list))*pauseEach
		s.ringAt(later(next, now.Add(pause)))
	}
}

// due does what is to be done now, and says when to look again.
func (t *try) due(now time.Time) time.Time {
	if t.others != nil && !now.Before(t.joinAt) {
		if t.alone.CompareAndSwap(true, false) {
			go t.others.join()
		}
		t.others = nil
	}
	if !t.over && !now.Before(t.until) {
		t.over = true
		t.end(now)
	}
	return t.next(now)
}

// next is when something is to be done.
func (t *try) next(now time.Time) time.Time {
	at := t.until
	if t.over {
		at = now.Add(time.Hour)
	}
	if t.others != nil {
		at = sooner(at, t.joinAt)
	}
	return at
}
