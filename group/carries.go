package group

import (
	"net/netip"
	"slices"

	"cgtun/dialer"
)

// Carries is for dialer.Carries: one member that does is enough.
func (g *Group) Carries(dst netip.Addr) bool {
	return slices.ContainsFunc(g.members, func(m *member) bool { return dialer.Carries(m.out, dst) })
}
