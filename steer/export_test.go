package steer

// WithoutOwner makes a Steering behave as on a kernel without owned tables.
func (s *Steering) WithoutOwner() { s.owner = false }
