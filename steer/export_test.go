package steer

import "cgtun/internal/netns"

// OpenHome treats a namespace as home: the tests' own is left alone.
func OpenHome(ns netns.Ref, number int) (*Steering, error) { return open(ns, number, true) }

// WithoutOwner makes a Steering behave as on a kernel without owned tables.
func (s *Steering) WithoutOwner() { s.owner = false }
