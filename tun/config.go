package tun

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Config is the [tun] table: what the device is called and how large its
// packets are.
type Config struct {
	Name string `toml:"name"`
	// Address has the addresses with their prefix lengths; none: one v4 and
	// one v6 address that nobody can mean are drawn.
	Address []netip.Prefix `toml:"address"`
	MTU     int            `toml:"mtu"`    // bytes of an IP packet
	Queues  int            `toml:"queues"` // 0: as measured to be best
}

// DefaultConfig returns the settings of an empty file.
func DefaultConfig() Config { return Config{Name: "tun0", MTU: 1500} }

// The limits of a device: IPv6 works from 1280 bytes on (RFC 8200 §5), and a
// tun has at most 256 queues.
const (
	minMTU    = 1280
	maxMTU    = 65535
	maxQueues = 256
	maxName   = 15
)

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table.
func (c *Config) Validate(bad func(key, what string)) {
	if c.Name == "" || len(c.Name) > maxName || c.Name == "." || c.Name == ".." || strings.ContainsAny(c.Name, "/:% \t\n\v\f\r\x00") {
		bad("name", fmt.Sprintf("%q is not a device name; allowed: 1 to %d characters without space, slash, colon and percent", c.Name, maxName))
	}
	for i, address := range c.Address {
		a := address.Addr()
		if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Is4In6() || a.IsLinkLocalUnicast() {
			bad(fmt.Sprintf("address[%d]", i), fmt.Sprintf(`%s cannot be the address of a device; allowed: unicast addresses such as "10.0.1.1/24"`, address))
		}
		if slices.ContainsFunc(c.Address[:i], func(other netip.Prefix) bool { return other.Addr() == a }) {
			bad(fmt.Sprintf("address[%d]", i), fmt.Sprintf("%s is listed twice; allowed: each address once", a))
		}
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		bad("mtu", fmt.Sprintf("is %d; allowed: %d to %d", c.MTU, minMTU, maxMTU))
	}
	if c.Queues < 0 || c.Queues > maxQueues {
		bad("queues", fmt.Sprintf("is %d; allowed: 0 (as measured to be best) to %d", c.Queues, maxQueues))
	}
}
