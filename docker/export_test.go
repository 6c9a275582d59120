package docker

import "net/netip"

// Ways in for tests.
var (
	Listening = listening
	FlagOf    = flagOf
	ParentOf  = parentOf
	RootOf    = rootOf
	DepthOf   = depthOf
)

const MaxDaemons = maxDaemons

// SetDevice says what device of home has an address.
func (f *Finder) SetDevice(of func(netip.Addr) string) { f.device = of }
