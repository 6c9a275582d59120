package labtest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Protocol is the route protocol number that marks cgtun's ip rules and routes.
const Protocol = 197

// What nft(8) and ip(8) call the kinds of what cgtun makes.
var (
	nftFamilies = map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyNetdev: "netdev",
	}
	routeTypes = map[int]string{
		unix.RTN_UNICAST: "unicast", unix.RTN_LOCAL: "local", unix.RTN_THROW: "throw",
		unix.RTN_UNREACHABLE: "unreachable", unix.RTN_BLACKHOLE: "blackhole", unix.RTN_PROHIBIT: "prohibit",
	}
)

// residue lists what a cgtun has left in the namespace of the thread.
func residue() (left []string) {
	look := func(err error) {
		if err != nil {
			left = append(left, "cannot look: "+err.Error())
		}
	}
	conn, err := nftables.New()
	if err == nil {
		var tables []*nftables.Table
		tables, err = conn.ListTables()
		for _, t := range tables {
			if strings.HasPrefix(t.Name, "cgtun_") {
				left = append(left, fmt.Sprintf("nft table %s %s", nftFamilies[t.Family], t.Name))
			}
		}
	}
	// Without nf_tables in the kernel nobody here has made a table either.
	if !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL) {
		look(err)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := dumped(func() ([]netlink.Rule, error) { return netlink.RuleList(family) })
		look(err)
		for _, r := range rules {
			if r.Protocol == Protocol {
				left = append(left, fmt.Sprintf("%v, mark %d, family %d", r, r.Mark, family))
			}
		}
		// The filter of tables without a table is for all of them; no filter is for main alone.
		routes, err := dumped(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Protocol: Protocol}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		look(err)
		for _, r := range routes {
			left = append(left, fmt.Sprintf("route %s %v table %d", routeTypes[r.Type], r.Dst, r.Table))
		}
	}
	links, err := dumped(netlink.LinkList)
	look(err)
	for _, l := range links {
		if l.Type() == "tuntap" {
			left = append(left, "device "+l.Attrs().Name)
		}
	}
	return left
}

// dumped asks the kernel for a list, anew where it changed meanwhile.
func dumped[T any](list func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		err = fmt.Errorf("list: %w", err)
	}
	return all, err
}
