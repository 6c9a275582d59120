package group

import (
	"sync"
	"time"
)

// staggers are the times after which others join the first attempt of a race. One timer
// is for all of them: nearly always the attempt has ended before. Safe for concurrent
// use; the zero value is ready.
type staggers struct {
	mu    sync.Mutex
	list  []*stagger // in no order
	timer *time.Timer
	rings time.Time // when the timer does; zero: it does not run
}

// stagger is one of them.
type stagger struct {
	at    time.Time
	over  func() // called then, in a goroutine
	place int    // in the list; -1: it is not there
}

// leastPause is between two looks at the list.
const leastPause = time.Millisecond

// begin has one waited for.
func (s *staggers) begin(one *stagger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one.place = len(s.list)
	s.list = append(s.list, one)
	if s.rings.IsZero() || one.at.Before(s.rings) {
		s.ringAt(one.at)
	}
}

// end says whether over has not been called, and will not be.
func (s *staggers) end(one *stagger) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if one.place < 0 {
		return false
	}
	s.remove(one)
	return true
}

func (s *staggers) remove(one *stagger) {
	last := len(s.list) - 1
	s.list[one.place] = s.list[last]
	s.list[one.place].place = one.place
	s.list[last] = nil
	s.list = s.list[:last]
	one.place = -1
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
	for i := len(s.list) - 1; i >= 0; i-- {
		switch one := s.list[i]; {
		case !now.Before(one.at):
			s.remove(one)
			go one.over()
		case next.IsZero() || one.at.Before(next):
			next = one.at
		}
	}
	if !next.IsZero() {
		s.ringAt(later(next, now.Add(leastPause)))
	}
}
