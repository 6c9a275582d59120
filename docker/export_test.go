package docker

import "net/netip"

// Ways in for tests.
var (
	Listening = listening
	FlagOf    = flagOf
)

// SetDevice says what device of home has an address.
func (f *Finder) SetDevice(of func(netip.Addr) string) { f.device = of }
