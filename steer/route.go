package steer

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// linkGroup is the group of the devices of all cgtun instances, by which they
// know each other's.
const linkGroup = Protocol

var families = []int{unix.AF_INET, unix.AF_INET6}

// withRoutes calls f with a route socket of the namespace, which it closes.
// f runs inside, for the sake of /proc/sys.
func withRoutes(ns netns.Ref, f func(*netlink.Handle) error) error {
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open route netlink in %s: %w", ns, err)
		}
		defer h.Close()
		return f(h)
	})
}

// again repeats a dump that the kernel interrupted because things changed.
func again[T any](dump func() ([]T, error)) ([]T, error) {
	for range 20 {
		all, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return dump()
}

// listRoutes lists the routes of a table; 0 stands for all tables.
func listRoutes(h *netlink.Handle, family, table int) ([]netlink.Route, error) {
	routes, err := again(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if noFamily(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", table, err)
	}
	return routes, nil
}

// noFamily is what a kernel without IPv6 says.
func noFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// routeKey tells routes of one table apart.
type routeKey struct {
	dst  netip.Prefix
	kind int
	link int        // 0 for what leads nowhere
	src  netip.Addr // not valid: the kernel's choice
}

// What stands for far away in the question which source address packets have:
// addresses for documentation (RFC 5737, RFC 3849), to which nobody has a
// route of his own.
var (
	far4 = netip.MustParseAddr("192.0.2.1")
	far6 = netip.MustParseAddr("2001:db8:ffff::1")
)

// source returns the address that an unmarked packet to far away would have;
// not a valid one where it would go nowhere.
func source(h *netlink.Handle, far netip.Addr) netip.Addr {
	routes, err := h.RouteGet(far.AsSlice())
	if err != nil || len(routes) == 0 {
		return netip.Addr{}
	}
	src, _ := netip.AddrFromSlice(routes[0].Src)
	if src = src.Unmap(); !src.IsGlobalUnicast() {
		return netip.Addr{}
	}
	return src
}

// wantRoutes are the routes of a plan: through the device, but what is
// bypassed is thrown back to the rules behind ours.
func wantRoutes(h *netlink.Handle, p *Plan, link int, v6 bool) []routeKey {
	var want []routeKey
	defaults := map[bool]bool{} // by Is6
	for _, prefix := range bypassOf(p) {
		defaults[prefix.Addr().Is6()] = defaults[prefix.Addr().Is6()] || prefix.Bits() == 0
		if v6 || prefix.Addr().Is4() {
			want = append(want, routeKey{dst: prefix, kind: unix.RTN_THROW})
		}
	}
	for _, far := range []netip.Addr{far4, far6} {
		if is6 := far.Is6(); !defaults[is6] && (v6 || !is6) {
			all, _ := far.Prefix(0)
			want = append(want, routeKey{dst: all, kind: unix.RTN_UNICAST, link: link, src: source(h, far)})
		}
	}
	return want
}

func keyOf(r *netlink.Route) routeKey {
	k := routeKey{kind: r.Type}
	if r.Type == unix.RTN_UNICAST {
		k.link = r.LinkIndex
		src, _ := netip.AddrFromSlice(r.Src)
		k.src = src.Unmap()
	}
	zero := netip.IPv4Unspecified()
	if r.Family == unix.AF_INET6 {
		zero = netip.IPv6Unspecified()
	}
	k.dst = netip.PrefixFrom(zero, 0)
	if r.Dst != nil {
		if a, ok := netip.AddrFromSlice(r.Dst.IP); ok {
			bits, _ := r.Dst.Mask.Size()
			if r.Family == unix.AF_INET {
				a = a.Unmap()
			}
			k.dst = netip.PrefixFrom(a, bits)
		}
	}
	return k
}

func (k routeKey) route(table int) *netlink.Route {
	r := &netlink.Route{Table: table, Protocol: Protocol, Type: k.kind, LinkIndex: k.link, Family: unix.AF_INET6}
	bits := 128
	if k.dst.Addr().Is4() {
		r.Family, bits = unix.AF_INET, 32
		if k.kind == unix.RTN_UNICAST {
			r.Scope = netlink.SCOPE_LINK
		}
	}
	if k.src.IsValid() {
		r.Src = k.src.AsSlice()
	}
	r.Dst = &net.IPNet{IP: k.dst.Addr().AsSlice(), Mask: net.CIDRMask(k.dst.Bits(), bits)}
	return r
}

// setRoutes makes the table hold the plan's routes and says whether it had to
// change anything but a source address, which follows the main table. Routes
// of others in it are left alone.
func setRoutes(h *netlink.Handle, p *Plan, link int, v6 bool) (changed bool, err error) {
	want := wantRoutes(h, p, link, v6)
	missing := map[routeKey]bool{}
	for _, k := range want {
		missing[k] = true
	}
	stale := map[netip.Prefix]netlink.Route{}
	for _, family := range families {
		routes, err := listRoutes(h, family, p.Table)
		if err != nil {
			return false, err
		}
		for _, r := range routes {
			if r.Protocol != Protocol {
				continue
			}
			k := keyOf(&r)
			if missing[k] {
				delete(missing, k)
				continue
			}
			stale[k.dst] = r
		}
	}
	for _, k := range want {
		if !missing[k] {
			continue
		}
		set := h.RouteAdd
		old, ours := stale[k.dst]
		if ours {
			delete(stale, k.dst)
			set = h.RouteReplace // without a moment in which there is none
		}
		was := keyOf(&old)
		was.src = k.src
		changed = changed || !ours || was != k
		if err := set(k.route(p.Table)); err != nil {
			return changed, fmt.Errorf("add route %s to table %d: %w", k.dst, p.Table, err)
		}
	}
	changed = changed || len(stale) > 0
	return changed, delRoutes(h, slices.Collect(maps.Values(stale)))
}

func delRoutes(h *netlink.Handle, routes []netlink.Route) error {
	var errs []error
	for _, r := range routes {
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("delete route %s of table %d: %w", keyOf(&r).dst, r.Table, err))
		}
	}
	return errors.Join(errs...)
}

// clearRoutes deletes the rules and routes of an instance, rules first.
func clearRoutes(h *netlink.Handle, table int) error {
	var errs []error
	for _, family := range families {
		rules, err := listRules(h, family)
		errs = append(errs, err)
		rules = slices.DeleteFunc(rules, func(r netlink.Rule) bool {
			return r.Protocol != Protocol || r.Table != table
		})
		errs = append(errs, delRules(h, rules))
		routes, err := listRoutes(h, family, table)
		errs = append(errs, err)
		routes = slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Protocol != Protocol })
		errs = append(errs, delRoutes(h, routes))
	}
	return errors.Join(errs...)
}

// setDevice prepares our own device: it joins the group, and its packets are
// looked up with their mark where rp_filter asks for the way back. Both go
// when the device goes.
func setDevice(h *netlink.Handle, dev string) (link int, v6 bool, err error) {
	l, err := h.LinkByName(dev)
	if err != nil {
		return 0, false, fmt.Errorf("find device %s: %w", dev, err)
	}
	if l.Attrs().Group != linkGroup {
		if err := h.LinkSetGroup(l, linkGroup); err != nil {
			return 0, false, fmt.Errorf("set group of device %s: %w", dev, err)
		}
	}
	if err := sysctl("/proc/sys/net/ipv4/conf/"+dev+"/src_valid_mark", "1"); err != nil {
		return 0, false, err
	}
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6")
	return l.Attrs().Index, err == nil && strings.TrimSpace(string(off)) == "0", nil
}

func sysctl(path, value string) error {
	now, err := os.ReadFile(path)
	if err == nil && strings.TrimSpace(string(now)) != value {
		err = os.WriteFile(path, []byte(value), 0)
	}
	if err != nil {
		return fmt.Errorf("set sysctl %s of %s: %w", filepath.Base(path), filepath.Base(filepath.Dir(path)), err)
	}
	return nil
}
