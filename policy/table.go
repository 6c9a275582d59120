package policy

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// kind is why an address is denied, as a word for counts.
type kind string

const (
	loopback    kind = "loopback"
	unspecified kind = "unspecified"
	linkLocal   kind = "link_local"
	multicast   kind = "multicast"
	broadcast   kind = "broadcast"
	metadata    kind = "metadata"
	home        kind = "home"
	device      kind = "tun"
	container   kind = "container"
)

var words = map[kind]string{
	loopback: "loopback", unspecified: "no host's", linkLocal: "link-local", multicast: "multicast", broadcast: "a broadcast address",
	metadata: "a cloud's metadata service", home: "an address of this host", device: "the address of a device of cgtun",
}

// never is what no flow may reach, whatever home has.
var never = []struct {
	prefix string
	kind   kind
}{
	{"0.0.0.0/8", unspecified}, {"127.0.0.0/8", loopback}, {"169.254.0.0/16", linkLocal}, {"169.254.169.254/32", metadata},
	{"224.0.0.0/4", multicast}, {"255.255.255.255/32", broadcast},
	{"::/128", unspecified}, {"::1/128", loopback}, {"fe80::/10", linkLocal}, {"ff00::/8", multicast}, {"fd00:ec2::254/128", metadata},
}

// newTable has what is in never.
func newTable() *bart.Table[kind] {
	t := new(bart.Table[kind])
	for _, n := range never {
		t.Insert(netip.MustParsePrefix(n.prefix), n.kind)
	}
	return t
}

// plain masks a prefix, and takes v4 out of ::ffff:0:0/96.
func plain(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked()
}

// The prefixes of v6 addresses that have a v4 address inside. Gateways beyond
// this host, or on it, take them for that one.
var (
	compatible = netip.MustParsePrefix("::/96")        // RFC 4291 §2.5.5.1
	nat64      = netip.MustParsePrefix("64:ff9b::/96") // RFC 6052 §2.1
	sixToFour  = netip.MustParsePrefix("2002::/16")    // RFC 3056 §2
)

// meanings returns an address without zone and mapping and, if it is a v6 address
// that stands for a v4 one, that one too.
func meanings(a netip.Addr) [2]netip.Addr {
	a = a.WithZone("").Unmap() // Unmap: RFC 4291 §2.5.5.2
	if !a.Is6() {
		return [2]netip.Addr{a}
	}
	b := a.As16()
	switch {
	case compatible.Contains(a), nat64.Contains(a):
		return [2]netip.Addr{a, netip.AddrFrom4([4]byte(b[12:]))}
	case sixToFour.Contains(a):
		return [2]netip.Addr{a, netip.AddrFrom4([4]byte(b[2:]))}
	}
	return [2]netip.Addr{a}
}
