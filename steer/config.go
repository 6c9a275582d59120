package steer

import (
	"fmt"
	"net/netip"
	"strings"
)

// Config is the [route] table: the numbers under which marked packets take a
// table of their own, and where its default route leads.
type Config struct {
	Name     string `toml:"name"`     // how status and logs call the route
	Mark     uint32 `toml:"mark"`     // fwmark, within Mask
	Mask     uint32 `toml:"mask"`     // the bits of the mark that are ours
	Table    int    `toml:"table"`    // route table; the first one's is the instance
	Priority int    `toml:"priority"` // of the ip rule
	Via      Via    `toml:"via"`      // where the table's default route leads
	OnExit   string `toml:"on_exit"`  // OnExitOpen or OnExitClosed
}

// The values of on_exit: what holds while cgtun is not there.
const (
	OnExitOpen   = "open"   // nothing steers: packets go as they would without cgtun
	OnExitClosed = "closed" // selected processes reach nothing
)

// Via is where a route's default route leads: Mode alone, or one of the table
// forms (Gateway, Gateway6 and Dev; TProxy; Container) with an empty Mode.
type Via struct {
	Mode      string         `toml:"-"`         // ViaTun, ViaTProxy or ""
	Gateway   []netip.Addr   `toml:"gateway"`   // v4 routers, the first that is alive wins
	Gateway6  []netip.Addr   `toml:"gateway6"`  // v6 routers
	Dev       string         `toml:"dev"`       // device of the gateways, or the way itself
	TProxy    netip.AddrPort `toml:"tproxy"`    // another program's transparent listener
	Container string         `toml:"container"` // name or id of the container that routes
}

// The forms of Via that are one word.
const (
	ViaTun    = "tun"    // the netstack in this process
	ViaTProxy = "tproxy" // a transparent listener of ours
)

// UnmarshalText takes the one-word forms.
func (v *Via) UnmarshalText(text []byte) error {
	switch mode := string(text); mode {
	case ViaTun, ViaTProxy:
		*v = Via{Mode: mode}
		return nil
	}
	return fmt.Errorf(`is %q; allowed: "tun", "tproxy", {gateway = ADDRESS, gateway6 = ADDRESS, dev = NAME}, {dev = NAME}, {tproxy = ADDRESS:PORT}, {container = NAME}`, text)
}

// String returns the way as status shows it: one word, or what the table says.
func (v Via) String() string {
	if v.Mode != "" {
		return v.Mode
	}
	var parts []string
	for _, gateway := range append(v.Gateway[:len(v.Gateway):len(v.Gateway)], v.Gateway6...) {
		parts = append(parts, "gateway "+gateway.String())
	}
	if v.Dev != "" {
		parts = append(parts, "dev "+v.Dev)
	}
	if v.TProxy.IsValid() {
		parts = append(parts, "tproxy "+v.TProxy.String())
	}
	if v.Container != "" {
		parts = append(parts, "container "+v.Container)
	}
	return strings.Join(parts, " ")
}

// DefaultConfig returns the settings of an empty file.
func DefaultConfig() Config {
	return Config{
		Name: "default", Mark: 101, Mask: 0xffffffff, Table: 101, Priority: 10101,
		Via: Via{Mode: ViaTun}, OnExit: OnExitOpen,
	}
}

// Overlaps tells whether a mark of c can be taken for one of o.
func (c *Config) Overlaps(o *Config) bool { return (c.Mark^o.Mark)&c.Mask&o.Mask == 0 }

// Priorities from that of main on come too late; 0 is that of local.
const maxPriority = 32765

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table.
func (c *Config) Validate(bad func(key, what string)) {
	if c.Name == "" {
		bad("name", "is empty; allowed: any text")
	}
	switch {
	case c.Mask == 0:
		bad("mask", "is 0; allowed: 1 to 0xffffffff, the bits of the mark that are ours")
	case c.Mark == 0:
		bad("mark", "is 0, as unmarked packets are; allowed: 1 to 0xffffffff")
	case c.Mark&^c.Mask != 0:
		bad("mark", fmt.Sprintf("%#x has bits outside of the mask %#x; allowed: bits of the mask", c.Mark, c.Mask))
	}
	switch {
	case c.Table >= 253 && c.Table <= 255:
		bad("table", fmt.Sprintf("%d is one of the kernel's own (default, main, local); allowed: 1 to 4294967295 but 253 to 255", c.Table))
	case c.Table < 1 || c.Table > 1<<32-1:
		bad("table", fmt.Sprintf("is %d; allowed: 1 to 4294967295 but 253 to 255", c.Table))
	}
	if c.Priority < 1 || c.Priority > maxPriority {
		bad("priority", fmt.Sprintf("is %d; allowed: 1 to %d, as the ip rule of table main is %d", c.Priority, maxPriority, maxPriority+1))
	}
	if c.OnExit != OnExitOpen && c.OnExit != OnExitClosed {
		bad("on_exit", fmt.Sprintf(`is %q; allowed: "open", "closed"`, c.OnExit))
	}
	c.Via.validate(bad)
}

// Chooses says whether there are gateways that stand for each other.
func (v *Via) Chooses() bool { return len(v.Gateway) > 1 || len(v.Gateway6) > 1 }

// validate checks that exactly one form of via is written, and wholly.
func (v *Via) validate(bad func(key, what string)) {
	if v.Mode != "" {
		return
	}
	routed := len(v.Gateway) > 0 || len(v.Gateway6) > 0 || v.Dev != ""
	forms := 0
	for _, written := range []bool{routed, v.TProxy.IsValid(), v.Container != ""} {
		if written {
			forms++
		}
	}
	if forms != 1 {
		bad("via", fmt.Sprintf("is %d ways; allowed: one of {gateway, gateway6, dev}, {tproxy}, {container}", forms))
	}
	if v.TProxy.IsValid() && v.TProxy.Port() == 0 {
		bad("via.tproxy", fmt.Sprintf(`%s has no port; allowed: an address with a port such as "127.0.0.1:12345"`, v.TProxy))
	}
	for i, gateway := range v.Gateway {
		if !gateway.Is4() {
			bad(fmt.Sprintf("via.gateway[%d]", i), fmt.Sprintf("%s is not IPv4; allowed: IPv4 addresses (gateway6 is for IPv6)", gateway))
		}
	}
	for i, gateway := range v.Gateway6 {
		if !gateway.Is6() || gateway.Is4In6() {
			bad(fmt.Sprintf("via.gateway6[%d]", i), fmt.Sprintf("%s is not IPv6; allowed: IPv6 addresses (gateway is for IPv4)", gateway))
		}
	}
}
