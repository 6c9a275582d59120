package dialer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// ownProtocol is the protocol number of the routes and ip rules that cgtun
// makes. No socket of its own may follow them.
const ownProtocol = 197

// An uplink is an interface by which sockets leave through its own gateway.
//
// SO_BINDTODEVICE alone is not enough. It limits the look-up of the route to
// the interface, and where none is found the kernel takes the destination for
// on-link (v4: ip_route_output_key of net/ipv4/route.c) and asks for it by ARP.
// And the gateway of a second uplink is usually not in the main table, but in
// one that an ip rule leads to from the interface's address, or from a mark
// (ip-rule(8)). So before each socket the kernel is asked which route it would
// take, with the addresses and the marks that can matter, and the socket gets
// the first combination for which there is one. The last one that worked is
// asked about first: one look-up in the usual case.
//
// A route that goes away while a connection lives is not noticed here; its
// keepalives then end it.
type uplink struct {
	name    string
	source  netip.Addr // zero: any of the interface's
	mark    uint32     // 0: none, or that of an ip rule
	capture []Mark

	last4, last6 atomic.Pointer[way]
}

// noWay is that there is no way to a destination, in words for the user.
type noWay struct{ text string }

func (e *noWay) Error() string           { return e.text }
func (e *noWay) FlowReason() flow.Reason { return flow.NetUnreachable }

// maxAsking is how many ways are asked for at a time.
const maxAsking = 32

var asking = make(chan struct{}, maxAsking)

// onOwnStack calls f in a goroutine of its own and waits. Tests that are inside a
// namespace stay on their thread.
var onOwnStack = func(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

// way returns how a socket to dst leaves by the uplink. Who asks by netlink reads
// into 64 KiB of stack: that is not to be the stack of who dials then, for as long
// as that takes, nor that of thousands at a time.
func (u *uplink) way(dst netip.Addr) (w way, err error) {
	asking <- struct{}{}
	defer func() { <-asking }()
	onOwnStack(func() { w, err = u.ask(dst) })
	return w, err
}

func (u *uplink) ask(dst netip.Addr) (way, error) {
	index, err := u.link()
	if err != nil {
		return way{}, err
	}
	last := &u.last4
	if dst.Is6() {
		last = &u.last6
	}
	if w := last.Load(); w != nil && u.leads(*w, index, dst) {
		return *w, nil
	}
	candidates, err := u.candidates(index, dst.Is6())
	if err != nil {
		return way{}, err
	}
	for _, w := range candidates {
		if u.leads(w, index, dst) {
			last.Store(&w)
			return w, nil
		}
	}
	return way{}, &noWay{fmt.Sprintf("no route to %s through %s", dst, u.name)}
}

// forget lets the next socket find its way anew: the source address of the last one
// has gone, and of IPv6 the kernel has a route from it all the same.
func (u *uplink) forget() {
	u.last4.Store(nil)
	u.last6.Store(nil)
}

// link returns the index of the interface if it can carry packets. It asks by
// netdevice(7), without the lock that netlink takes: this is done for each
// socket. A lost carrier shows in it within a second.
func (u *uplink) link() (index int, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("look up interface %s: %w", u.name, err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(u.name)
	if err != nil {
		return 0, &noWay{fmt.Sprintf("%q is no name of an interface", u.name)}
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); errors.Is(err, unix.ENODEV) {
		return 0, &noWay{fmt.Sprintf("there is no interface %s", u.name)}
	} else if err != nil {
		return 0, fmt.Errorf("look up interface %s: %w", u.name, err)
	}
	index = int(req.Uint32())
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return 0, fmt.Errorf("look up interface %s: %w", u.name, err)
	}
	switch flags := req.Uint16(); {
	case flags&unix.IFF_UP == 0:
		return 0, &noWay{fmt.Sprintf("interface %s is down; try: ip link set %s up", u.name, u.name)}
	case flags&unix.IFF_RUNNING == 0:
		return 0, &noWay{fmt.Sprintf("interface %s has no carrier", u.name)}
	}
	return index, nil
}

// leads says whether the kernel has a route to dst for such a socket that
// leaves by the interface and is not one of cgtun's.
func (u *uplink) leads(w way, index int, dst netip.Addr) bool {
	// v4 answers with the entry of the table that matched: the plain answer
	// would be on-link where none does. v6 has no such fallback, and only
	// its plain answer is bound to the interface.
	o := netlink.RouteGetOptions{OifIndex: index, Mark: w.mark, FIBMatch: dst.Is4()}
	if w.source.IsValid() {
		o.SrcAddr = w.source.AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(dst.AsSlice(), &o)
	if err != nil {
		return false
	}
	for _, r := range routes {
		if r.Protocol == ownProtocol || r.Type != unix.RTN_UNICAST {
			continue
		}
		if r.LinkIndex == index {
			return true
		}
		for _, hop := range r.MultiPath {
			if hop.LinkIndex == index {
				return true
			}
		}
	}
	return false
}

// candidates are the ways to try, the plainest first: no source and no mark,
// each source address, and the same with each mark that an ip rule asks for.
func (u *uplink) candidates(index int, v6 bool) ([]way, error) {
	sources := []netip.Addr{u.source}
	if !u.source.IsValid() {
		own, err := addresses(index, v6)
		if err != nil {
			return nil, err
		}
		sources = append(sources, own...)
	}
	marks := []uint32{u.mark}
	if u.mark == 0 {
		others, err := u.ruleMarks(v6)
		if err != nil {
			return nil, err
		}
		marks = append(marks, others...)
	}
	var list []way
	for _, mark := range marks {
		for _, source := range sources {
			list = append(list, way{device: u.name, source: source, mark: mark})
		}
	}
	return list, nil
}

// ruleMarks returns the marks that the ip rules of others ask for.
func (u *uplink) ruleMarks(v6 bool) ([]uint32, error) {
	rules, err := netlink.RuleList(family(v6))
	if err != nil {
		return nil, fmt.Errorf("list ip rules: %w", err)
	}
	var marks []uint32
	seen := map[uint32]bool{0: true}
	for _, r := range rules {
		if r.Protocol == ownProtocol || r.Invert || seen[r.Mark] || captures(r.Mark, u.capture) {
			continue
		}
		seen[r.Mark] = true
		marks = append(marks, r.Mark)
	}
	return marks, nil
}

// addresses returns what an interface has to send from to far destinations.
func addresses(index int, v6 bool) ([]netip.Addr, error) {
	list, err := netlink.AddrList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}, family(v6))
	if err != nil {
		return nil, fmt.Errorf("list addresses of interface %d: %w", index, err)
	}
	const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
	var own []netip.Addr
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok || a.Flags&unusable != 0 || addr.IsLinkLocalUnicast() {
			continue
		}
		own = append(own, addr.Unmap())
	}
	return own, nil
}

func family(v6 bool) int {
	if v6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// anywhere stand for the rest of the world when no destination is given: no
// router knows more of them than of that (RFC 5737, RFC 3849).
var anywhere = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::1")}

// down says why the uplink leads nowhere, or "".
func (u *uplink) down() string {
	index, err := u.link()
	if err != nil {
		return err.Error()
	}
	for _, dst := range anywhere {
		if u.source.IsValid() && u.source.Is4() != dst.Is4() {
			continue
		}
		if _, err := u.way(dst); err == nil {
			return ""
		}
	}
	filter := &netlink.Route{LinkIndex: index}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Sprintf("list routes of %s: %v", u.name, err)
	}
	hint := fmt.Sprintf("no gateway is known through %s; try: ip route add default via GATEWAY dev %s metric 1000", u.name, u.name)
	for _, r := range routes {
		if r.Gw == nil || r.Protocol == ownProtocol {
			continue
		}
		if dst, ok := inside(r.Dst); ok {
			if _, err := u.way(dst); err == nil {
				return "" // a gateway to some places is one
			}
		}
		hint = fmt.Sprintf("the gateway %s of %s is in table %d, to which no ip rule leads; try: ip rule add oif %s lookup %d", r.Gw, u.name, r.Table, u.name, r.Table)
	}
	return hint
}

// inside returns an address that a route is for.
func inside(p *net.IPNet) (netip.Addr, bool) {
	if p == nil {
		return netip.Addr{}, false
	}
	a, ok := netip.AddrFromSlice(p.IP)
	if a = a.Unmap(); !ok || a.IsUnspecified() {
		return netip.Addr{}, false
	}
	if next := a.Next(); p.Contains(next.AsSlice()) {
		return next, true
	}
	return a, true
}

// missingSource says that an address is not this machine's, or "".
func missingSource(a netip.Addr) string {
	list, err := netlink.AddrList(nil, family(a.Is6()))
	if err != nil {
		return fmt.Sprintf("list addresses: %v", err)
	}
	for _, own := range list {
		if own.IP.Equal(a.AsSlice()) {
			return ""
		}
	}
	return fmt.Sprintf("this machine has no address %s", a)
}
