package attach

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
	"cgtun/steer"
	"cgtun/tun"
)

// surroundings is what a namespace has of its own: the addresses that a packet
// of its processes may come from, and what is reached without cgtun.
type surroundings struct {
	local     map[netip.Addr]struct{}
	connected []netip.Prefix     // sorted, without doubles
	device    int                // the index of ours; 0: not there
	others    []cgroupsel.Device // but loopback and those of cgtun
	down      bool               // ours is there, and somebody has set it down
	behind    []netip.Prefix     // routed to the selected interfaces
	// Whether the main table has a default route of the family, and by what.
	default4, default6 bool
	gateways           []netip.Addr
	size               int // how many links, addresses and routes there are
}

// interruptions is how often in a row a dump may be cut short by changes.
const interruptions = 20

// look reads the addresses and routes of the namespace it runs in. The routes of
// device, which is ours, are not somebody's. It begins again when the kernel
// says that a list changed while it was read: on a host that makes containers
// all the time that is no reason not to start.
func look(device string, interfaces []string) (s *surroundings, err error) {
	for range interruptions {
		if s, err = lookOnce(device, interfaces); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return s, err
}

func lookOnce(device string, interfaces []string) (*surroundings, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	s := &surroundings{local: map[netip.Addr]struct{}{}, size: len(links)}
	selected := map[int]bool{}
	s.others = devicesIn(links)
	for _, l := range links {
		if l.Attrs().Name == device && tun.IsOurs(l) {
			s.device, s.down = l.Attrs().Index, l.Attrs().Flags&net.FlagUp == 0
		}
		selected[l.Attrs().Index] = slices.Contains(interfaces, l.Attrs().Name)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	s.size += len(addrs)
	for _, a := range addrs {
		prefix, ok := tun.PrefixOf(a.IPNet)
		if !ok {
			continue
		}
		s.local[prefix.Addr()] = struct{}{}
		s.connected = append(s.connected, host(prefix.Addr()))
		if a.LinkIndex == s.device {
			continue
		}
		s.add(prefix.Masked())
		if peer, ok := tun.PrefixOf(a.Peer); ok {
			s.add(peer.Masked())
		}
	}
	// One by one: who may change the routes of a namespace can make millions. The
	// kernel lists all tables in any case.
	err = netlink.RouteListFilteredIter(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
		s.size++
		if r.Table == unix.RT_TABLE_MAIN {
			s.addRoute(&r, selected[r.LinkIndex])
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	s.connected = slices.DeleteFunc(s.connected, alwaysAlone)
	slices.SortFunc(s.connected, comparePrefix)
	s.connected = slices.Compact(s.connected)
	return s, nil
}

// addRoute takes what a route of the main table tells; selected says whether it
// leads to one of the selected interfaces.
func (s *surroundings) addRoute(r *netlink.Route, selected bool) {
	if isDefault(r) && r.LinkIndex != s.device {
		s.default4 = s.default4 || r.Family == unix.AF_INET
		s.default6 = s.default6 || r.Family == unix.AF_INET6
		if gw, ok := netip.AddrFromSlice(r.Gw); ok {
			s.gateways = append(s.gateways, gw.Unmap())
		}
	}
	if prefix, ok := tun.PrefixOf(r.Dst); ok && selected && prefix.Bits() > 0 {
		s.behind = append(s.behind, prefix.Masked())
	}
	// The kernel's own routes are those that came with an address.
	if r.Protocol != unix.RTPROT_KERNEL || r.Gw != nil || r.LinkIndex == s.device || r.Dst == nil {
		return
	}
	if prefix, ok := tun.PrefixOf(r.Dst); ok {
		s.add(prefix.Masked())
	}
}

// devicesIn are those of links that packets can leave a namespace by: all but
// loopback and the tuns of cgtun. Links to containers come and go with them.
func devicesIn(links []netlink.Link) (devices []cgroupsel.Device) {
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback == 0 && !tun.IsOurs(l) {
			devices = append(devices, cgroupsel.Device{
				Index: a.Index, Ethernet: a.EncapType == "ether", Passing: l.Type() == "veth",
			})
		}
	}
	return devices
}

// whole says whether our device is as it was opened.
func (s *surroundings) whole(d *tun.Device) bool {
	for _, p := range d.Addresses() {
		if _, ok := s.local[p.Addr()]; !ok {
			return false
		}
	}
	return !s.down
}

// own returns the addresses that somebody elsewhere could mean, sorted.
func (s *surroundings) own() []netip.Prefix {
	var own []netip.Prefix
	for a := range s.local {
		if !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			own = append(own, host(a))
		}
	}
	slices.SortFunc(own, comparePrefix)
	return own
}

// onLink are the connected prefixes without what is left alone, and without
// loopback, link-local and multicast addresses, which are not one network's.
func (s *surroundings) onLink(alone []netip.Prefix) (on []netip.Prefix) {
	for _, p := range s.connected {
		on = append(on, without(p, slices.Concat(steer.Builtin(), alone))...)
	}
	return on
}

// without cuts others out of a prefix.
func without(p netip.Prefix, others []netip.Prefix) []netip.Prefix {
	i := slices.IndexFunc(others, p.Overlaps)
	switch {
	case i < 0:
		return []netip.Prefix{p}
	case others[i].Bits() <= p.Bits():
		return nil
	}
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	half := p.Addr().AsSlice()
	half[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	addr, _ := netip.AddrFromSlice(half)
	return append(without(low, others), without(netip.PrefixFrom(addr, low.Bits()), others)...)
}

// has says whether an address is of the namespace or routed to a selected
// interface.
func (s *surroundings) has(addr netip.Addr) bool {
	if _, ok := s.local[addr]; ok {
		return true
	}
	for _, p := range s.behind {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

func isDefault(r *netlink.Route) bool {
	if r.Type != unix.RTN_UNICAST {
		return false
	}
	prefix, ok := tun.PrefixOf(r.Dst)
	return !ok || prefix.Bits() == 0
}

// add takes a connected prefix, never one that covers a whole family.
func (s *surroundings) add(p netip.Prefix) {
	if p.Bits() > 0 {
		s.connected = append(s.connected, p)
	}
}

// alwaysAlone says whether a prefix is left alone in any case. Each link has a
// link-local address, and they come and go with containers: that changes no plan.
func alwaysAlone(p netip.Prefix) bool {
	return slices.ContainsFunc(steer.Builtin(), func(b netip.Prefix) bool { return b.Bits() <= p.Bits() && b.Contains(p.Addr()) })
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
