package group

// Destinations is how many destinations are remembered.
func (s *Scores) Destinations() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.dests)
}

// Fetch is what a probe with a URL does.
var Fetch = fetch
