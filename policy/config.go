package policy

import "net/netip"

// Config is the [policy] table.
type Config struct {
	// Allow has prefixes that captured container processes may reach although
	// the built-in policy denies them.
	Allow []netip.Prefix `toml:"allow"`
}
