package stack

// Endpoints counts the TCP endpoints that netstack has, closed ones that still
// linger too.
func (s *Stack) Endpoints() int {
	return len(s.gv.RegisteredEndpoints()) + len(s.gv.CleanupEndpoints())
}
