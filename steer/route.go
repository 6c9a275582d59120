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

	mdl "github.com/mdlayher/netlink"
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
	dst    netip.Prefix
	kind   int
	link   int        // 0 for what leads nowhere
	src    netip.Addr // not valid: the kernel's choice
	gw     netip.Addr // not valid: none
	metric int        // 0: the kernel's choice
}

// slot is what can be held by one route at a time.
type slot struct {
	dst    netip.Prefix
	metric int
}

func (k routeKey) slot() slot { return slot{k.dst, k.metric} }

// lastMetric is that of the route that blocks where no other one leads.
const lastMetric = 9999

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

// wantRoutes are the routes of a plan: by its way, but what is bypassed is
// thrown back to the rules behind ours.
func wantRoutes(h *netlink.Handle, p *Plan, w *way) []routeKey {
	var want []routeKey
	blocks := p.blocks()
	for _, far := range []netip.Addr{far4, far6} {
		is6 := far.Is6()
		if !steers(p, w, is6) {
			continue
		}
		all, _ := far.Prefix(0)
		thrown := false
		for _, prefix := range bypassOf(p) {
			if prefix.Addr().Is6() == is6 {
				want = append(want, routeKey{dst: prefix, kind: unix.RTN_THROW})
				thrown = thrown || prefix == all
			}
		}
		if thrown {
			continue
		}
		if blocks {
			want = append(want, routeKey{dst: all, kind: unix.RTN_UNREACHABLE, metric: lastMetric})
		}
		if !w.carries(is6) || p.skips(is6) {
			continue
		}
		way := routeKey{dst: all, kind: unix.RTN_UNICAST, link: w.link, gw: w.gw[is6]}
		if w.ours || w.tproxy.IsValid() {
			way.src = source(h, far)
		}
		if w.tproxy.IsValid() {
			way.kind = unix.RTN_LOCAL
		}
		want = append(want, way)
	}
	return want
}

// blocks says whether the table ends in a route that blocks: where there is no
// way, main would be asked. An open plan by our device has none, as it would
// outlive us.
func (p *Plan) blocks() bool { return p.Closed || !p.byTun() }

// steers says whether the table has routes of a family.
func steers(p *Plan, w *way, is6 bool) bool {
	switch {
	case p.skips(is6) && !p.Closed:
		return false
	case !is6:
		return true
	}
	return w.carries(true) || p.blocks() && hasV6("lo")
}

func keyOf(r *netlink.Route) routeKey {
	k := routeKey{kind: r.Type, metric: r.Priority}
	const lo = 1 // where the kernel puts v6 routes that lead nowhere
	if r.Type == unix.RTN_UNICAST || r.Type == unix.RTN_LOCAL || r.LinkIndex != lo {
		k.link = r.LinkIndex
		src, _ := netip.AddrFromSlice(r.Src)
		k.src = src.Unmap()
		gw, _ := netip.AddrFromSlice(r.Gw)
		k.gw = gw.Unmap()
	}
	zero := netip.IPv4Unspecified()
	if r.Family == unix.AF_INET6 {
		zero = netip.IPv6Unspecified()
		if k.metric == 1024 { // IP6_RT_PRIO_USER
			k.metric = 0
		}
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
	r := &netlink.Route{
		Table: table, Protocol: Protocol, Type: k.kind, LinkIndex: k.link, Family: unix.AF_INET6, Priority: k.metric,
	}
	bits := 128
	if k.dst.Addr().Is4() {
		r.Family, bits = unix.AF_INET, 32
		switch {
		case k.kind == unix.RTN_UNICAST && !k.gw.IsValid():
			r.Scope = netlink.SCOPE_LINK
		case k.kind == unix.RTN_LOCAL:
			r.Scope = netlink.SCOPE_HOST
		}
	}
	if k.gw.IsValid() {
		// On the device, whether an address there says so or not.
		r.Gw, r.Flags = k.gw.AsSlice(), int(netlink.FLAG_ONLINK)
	}
	if k.src.IsValid() {
		r.Src = k.src.AsSlice()
	}
	r.Dst = &net.IPNet{IP: k.dst.Addr().AsSlice(), Mask: net.CIDRMask(k.dst.Bits(), bits)}
	return r
}

// compareRoutes reads the table: what of the wanted is missing, and what of
// ours is there instead. A throw may hang on our device or not, but not where
// it is to stay without it.
func compareRoutes(h *netlink.Handle, p *Plan, w *way, want []routeKey) (missing map[routeKey]bool, stale map[slot]netlink.Route, err error) {
	missing, stale = map[routeKey]bool{}, map[slot]netlink.Route{}
	for _, k := range want {
		missing[k] = true
	}
	for _, family := range families {
		routes, err := listRoutes(h, family, p.Table)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range routes {
			if r.Protocol != Protocol {
				continue
			}
			k := keyOf(&r)
			if k.kind == unix.RTN_THROW && k.link == w.link && !p.blocks() {
				k.link = 0
			}
			if missing[k] {
				delete(missing, k)
				continue
			}
			stale[k.slot()] = r
		}
	}
	return missing, stale, nil
}

// setRoutes makes the table hold the plan's routes and says whether it had to
// change anything but a source address, which follows the main table. Routes
// of others in it are left alone.
func setRoutes(h *netlink.Handle, p *Plan, w *way) (changed bool, err error) {
	want := wantRoutes(h, p, w)
	missing, stale, err := compareRoutes(h, p, w, want)
	if err != nil {
		return false, err
	}
	hang := nexthops{link: w.link}
	defer hang.close()
	for _, k := range want {
		if !missing[k] {
			continue
		}
		old, ours := stale[k.slot()]
		if ours {
			delete(stale, k.slot())
		}
		was := keyOf(&old)
		was.src = k.src
		changed = changed || !ours || was != k
		if err := setRoute(h, p, k, ours, &hang); err != nil {
			return changed, fmt.Errorf("add route %s to table %d: %w", k.dst, p.Table, err)
		}
	}
	changed = changed || len(stale) > 0
	return changed, delRoutes(h, slices.Collect(maps.Values(stale)))
}

// setRoute adds a route, or replaces one of ours without a moment in which
// there is none.
func setRoute(h *netlink.Handle, p *Plan, k routeKey, replace bool, hang *nexthops) error {
	flags, set := mdl.Excl, h.RouteAdd
	if replace {
		flags, set = mdl.Replace, h.RouteReplace
	}
	if k.kind == unix.RTN_THROW && !p.blocks() {
		if id := hang.id(byte(familyOf(k.dst.Addr()))); id != 0 && hang.throw(k, p.Table, id, flags) == nil {
			return nil
		}
	}
	return set(k.route(p.Table))
}

func delRoutes(h *netlink.Handle, routes []netlink.Route) error {
	var errs []error
	for _, r := range routes {
		if r.Type == unix.RTN_THROW {
			r.LinkIndex = 0 // it is its nexthop's, and none to name here
		}
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
		var ours []netlink.Rule
		for _, r := range rules {
			if r.Protocol == Protocol && numberOf(&r, rules) == table {
				ours = append(ours, r)
			}
		}
		errs = append(errs, delRules(h, ours))
		routes, err := listRoutes(h, family, table)
		errs = append(errs, err)
		routes = slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Protocol != Protocol })
		errs = append(errs, delRoutes(h, routes), delNexthops(byte(family), routes))
	}
	return errors.Join(errs...)
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
