package dns

import (
	"context"
	"slices"
	"sync"
)

// shares are places that clients have a part in: one may have as many as are
// left free after it for the others. So one alone gets half of them, two who
// want all get a third each, and there is always one for who has none. Safe for
// concurrent use.
type shares struct {
	mu     sync.Mutex
	free   int
	taken  map[clientKey]int
	queues map[clientKey][]chan struct{} // who waits: closed when there is a place
}

func newShares(places int) *shares {
	return &shares{free: places, taken: map[clientKey]int{}, queues: map[clientKey][]chan struct{}{}}
}

// take takes a place, if there is one for this client now.
func (s *shares) take(by clientKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.grant(by)
}

// wait takes a place as soon as there is one. The error is ctx's.
func (s *shares) wait(ctx context.Context, by clientKey) error {
	s.mu.Lock()
	if s.grant(by) {
		s.mu.Unlock()
		return nil
	}
	there := make(chan struct{})
	s.queues[by] = append(s.queues[by], there)
	s.mu.Unlock()
	select {
	case <-there:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.queues[by], there); i >= 0 {
		s.leave(by, i)
	} else {
		s.release(by) // it came at the same time
	}
	return ctx.Err()
}

// give gives a place back.
func (s *shares) give(by clientKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.release(by)
}

// grant and release are take and give. Under mu.
func (s *shares) grant(by clientKey) bool {
	if s.taken[by] >= s.free {
		return false
	}
	s.free--
	s.taken[by]++
	return true
}

func (s *shares) release(by clientKey) {
	s.free++
	if s.taken[by]--; s.taken[by] == 0 {
		delete(s.taken, by)
	}
	for who := range s.queues {
		for len(s.queues[who]) > 0 && s.grant(who) {
			close(s.queues[who][0])
			s.leave(who, 0)
		}
	}
}

// leave takes who is at a place of a queue out of it. Under mu.
func (s *shares) leave(by clientKey, at int) {
	if s.queues[by] = slices.Delete(s.queues[by], at, at+1); len(s.queues[by]) == 0 {
		delete(s.queues, by)
	}
}
