package group

import "time"

// Destinations is how many destinations are remembered.
func (s *Scores) Destinations() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.dests)
}

// Fetch is what a probe with a URL does.
var Fetch = fetch

// P95 is what is usual where so much was taken.
func P95(took ...time.Duration) time.Duration {
	var t times
	for _, d := range took {
		t.add(d)
	}
	return t.p95()
}
