package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxDefaults bounds the search for free default addresses: there are 256
// 198.18.N.1, from the block for benchmarks (RFC 2544) that nobody routes.
const maxDefaults = 256

// default6 is a ULA (RFC 4193) whose last 16 bits count; the middle spells the
// program's name.
var default6 = netip.MustParseAddr("fd00:101:6367:7475:6e00::")

// What the defaults are taken from.
var (
	defaults4 = netip.MustParsePrefix("198.18.0.0/16")
	defaults6 = netip.PrefixFrom(default6, 112)
)

// holding is a prefix in use, and by whom.
type holding struct {
	prefix netip.Prefix
	holder string
}

// inUse is every address and route of a namespace but the default routes, as far
// as it can be in the way.
type inUse []holding

// prefixesInUse reads them from all tables; want is what is asked for beside the
// defaults. Routes are read one by one: who may change those of a namespace can make
// millions.
func prefixesInUse(h *netlink.Handle, want []netip.Prefix) (inUse, error) {
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var used inUse
	for _, a := range addrs {
		if p, ok := PrefixOf(a.IPNet); ok {
			used = append(used, holding{p, fmt.Sprintf("address %s on %s", p, names[a.LinkIndex])})
		}
	}
	wanted := append([]netip.Prefix{defaults4, defaults6}, want...)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// Table 0 as a filter means every table.
		err := h.RouteListFilteredIter(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			p, ok := PrefixOf(r.Dst)
			if ok && p.Bits() > 0 && slices.ContainsFunc(wanted, p.Overlaps) {
				used = append(used, holding{p, fmt.Sprintf("route %s dev %s", p, names[r.LinkIndex])})
			}
			return true
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, fmt.Errorf("list routes: %w", err)
		}
	}
	return used, nil
}

func (u inUse) holderOf(p netip.Prefix) string {
	for _, h := range u {
		if h.prefix.Overlaps(p) {
			return h.holder
		}
	}
	return ""
}

func (u inUse) allFree(want []netip.Prefix) error {
	for _, p := range want {
		if holder := u.holderOf(p); holder != "" {
			return &TakenError{What: "address", Value: p.String(), Holder: holder}
		}
	}
	return nil
}

// defaults returns the first pair of default addresses that nobody uses.
func (u inUse) defaults() ([]netip.Prefix, error) {
	for n := range maxDefaults {
		v4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(n), 1}), 32)
		b := default6.As16()
		b[14], b[15] = byte((n+1)>>8), byte(n+1)
		v6 := netip.PrefixFrom(netip.AddrFrom16(b), 128)
		if u.holderOf(v4) == "" && u.holderOf(v6) == "" {
			return []netip.Prefix{v4, v6}, nil
		}
	}
	return nil, errors.New("no default address is free: write `address` in [tun]")
}

// setAddresses adds the wanted addresses, or the defaults, and returns those
// that the namespace took.
func setAddresses(h *netlink.Handle, link netlink.Link, want []netip.Prefix, used inUse) (set []netip.Prefix, err error) {
	if len(want) == 0 || used.allFree(want) != nil {
		if want, err = used.defaults(); err != nil {
			return nil, err
		}
	}
	for _, p := range want {
		err := addAddress(h, link, p)
		if p.Addr().Is6() && isV6Off(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("add address %s: %w", p, err)
		}
		set = append(set, p)
	}
	return set, nil
}

func addAddress(h *netlink.Handle, link netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{
		IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Flags: unix.IFA_F_NOPREFIXROUTE,
	}
	if p.Addr().Is6() {
		a.Flags |= unix.IFA_F_NODAD
	} else {
		// The library would make a broadcast address of its own.
		a.Broadcast = net.IPv4zero
	}
	return h.AddrAdd(link, a)
}

// Restore sets the device up and gives it its addresses back, if somebody took
// those: a device that is set down loses the v6 ones. The error wraps
// netns.ErrGone if its namespace has ended.
func (d *Device) Restore() error {
	err := inside(d.ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(d.name)
		if err == nil && !IsOurs(link) {
			err = errors.New("somebody else has its name")
		}
		if err == nil {
			err = h.LinkSetUp(link)
		}
		if err != nil {
			return err
		}
		for _, p := range d.addresses {
			if err := addAddress(h, link, p); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add address %s: %w", p, err)
			}
		}
		return d.awaitLocal(h, link.Attrs().Index)
	})
	if err != nil {
		return fmt.Errorf("restore device %s: %w", d.name, err)
	}
	return nil
}

// SetTable says that the device is of an instance with another table.
func (d *Device) SetTable(table uint32) error {
	err := inside(d.ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(d.name)
		if err != nil {
			return err
		}
		return h.LinkSetAlias(link, Alias(table))
	})
	if err != nil {
		return fmt.Errorf("set alias of device %s: %w", d.name, err)
	}
	return nil
}

// localTime bounds awaitLocal.
const localTime = time.Second

// awaitLocal waits until the kernel holds the v6 addresses for local ones, which
// it does a moment after the device is up: what is sent from them before has a
// source of nobody, for a firewall too. On a machine whose kernel is busy with the
// devices of others it has taken more than localTime.
func (d *Device) awaitLocal(h *netlink.Handle, link int) error {
	want := 0
	for _, p := range d.addresses {
		if p.Addr().Is6() {
			want++
		}
	}
	for end := time.Now().Add(localTime); want > 0; time.Sleep(time.Millisecond) {
		routes, err := h.RouteListFiltered(netlink.FAMILY_V6,
			&netlink.Route{Table: unix.RT_TABLE_LOCAL, LinkIndex: link, Type: unix.RTN_LOCAL},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF|netlink.RT_FILTER_TYPE)
		if err == nil && len(routes) >= want {
			return nil
		}
		if time.Now().After(end) {
			if err != nil {
				return fmt.Errorf("wait for the v6 addresses: %w", err)
			}
			return nil // what is sent from them is lost for a moment: less than all of the attachment
		}
	}
	return nil
}

// isV6Off recognises a namespace with disable_ipv6 (docker sets it), or a
// kernel without IPv6.
func isV6Off(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) ||
		errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)
}

// PrefixOf turns what the netlink library gives for an address or a destination
// into a prefix; false where there is none.
func PrefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, bits := n.Mask.Size()
	a = a.Unmap()
	if bits != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, ones), true
}
