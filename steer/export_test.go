package steer

import (
	"errors"

	"github.com/vishvananda/netlink"

	"cgtun/internal/netns"
)

// OpenHome treats a namespace as home: the tests' own is left alone.
func OpenHome(ns netns.Ref, number int) (*Steering, error) { return open(ns, number, true) }

// WithoutOwner makes a Steering behave as on a kernel without owned tables.
func (s *Steering) WithoutOwner() { s.owner = false }

// FailUndo makes the next n tries to undo fail once the table is gone.
func (s *Steering) FailUndo(n int) {
	s.clear = func(h *netlink.Handle, table int) error {
		if n--; n >= 0 {
			return errors.New("device busy")
		}
		return clearRoutes(h, table)
	}
}
