package group

import (
	"slices"
	"sync"
	"time"

	"cgtun/internal/bag"
)

// staggers are the times after which others join the first attempt of a race. One timer
// is for all of them: nearly always the attempt has ended before. Safe for concurrent
// use; the zero value is ready.
type staggers struct {
	mu    sync.Mutex
	bag   bag.Bag[*stagger]
	timer *time.Timer
	rings time.Time // when the timer does; zero: it does not run
}

// stagger is one of them.
type stagger struct {
	bag.Place
	at time.Time
	by joiner
}

// joiner is told when a stagger is over, in a goroutine of its own.
type joiner interface{ join() }

// leastPause is between two looks at them.
const leastPause = time.Millisecond

// begin has one waited for.
func (s *staggers) begin(one *stagger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bag.Add(one)
	if s.rings.IsZero() || one.at.Before(s.rings) {
		s.ringAt(one.at)
	}
}

// end says whether nobody was told, and will not be.
func (s *staggers) end(one *stagger) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bag.Remove(one)
}

func (s *staggers) ringAt(at time.Time) {
	s.rings = at
	if s.timer == nil {
		s.timer = time.AfterFunc(time.Until(at), s.ring)
		return
	}
	s.timer.Reset(time.Until(at))
}

// ring is called by the timer.
func (s *staggers) ring() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.rings = time.Time{}
	var next time.Time
	for _, one := range slices.Backward(s.bag.All()) {
		switch {
		case !now.Before(one.at):
			s.bag.Remove(one)
			go one.by.join()
		case next.IsZero() || one.at.Before(next):
			next = one.at
		}
	}
	if !next.IsZero() {
		s.ringAt(later(next, now.Add(leastPause)))
	}
}
