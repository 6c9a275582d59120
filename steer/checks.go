package steer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/doctor"
	"cgtun/internal/netns"
)

// Checks looks at what steering needs: nft, by making a table in a namespace
// that is made for that and goes at once; and in ns at what others have that
// meets the packets of these plans: chains that drop, ip rules, rp_filter and
// forwarding. Without root it says what it could not look at.
func Checks(ns netns.Ref, plans ...Plan) []doctor.Named {
	all := []doctor.Named{{Name: "nft", Check: checkNft}}
	around := func(name string, look func(Plan) ([]doctor.Result, error)) {
		all = append(all, doctor.Named{Name: name, Check: func(context.Context) (found []doctor.Result) {
			if os.Geteuid() != 0 {
				return result(name, doctor.Warn, "not looked at: that needs root", "sudo cgtun doctor")
			}
			for _, p := range plans {
				more, err := look(p)
				if err != nil {
					more = result(name, doctor.Warn, "could not be looked at: "+err.Error(), "see the error")
				}
				found = append(found, more...)
			}
			if len(found) == 0 {
				return result(name, doctor.OK, "nothing of others is in the way", "")
			}
			return found
		}})
	}
	around("firewall", func(p Plan) ([]doctor.Result, error) { return chains(ns, &p) })
	around("ip rules", func(p Plan) ([]doctor.Result, error) { return rulesBefore(ns, &p) })
	around("rp_filter", func(p Plan) ([]doctor.Result, error) { return strictFilter(ns, &p) })
	around("forwarding", func(p Plan) ([]doctor.Result, error) { return notForwarded(ns, &p) })
	return all
}

func result(name string, state doctor.State, what, fix string) []doctor.Result {
	return []doctor.Result{{Name: name, State: state, What: what, Fix: fix}}
}

// checkNft tries the tables of a start, and all that is ever in them.
func checkNft(context.Context) []doctor.Result {
	const name = "nft"
	if os.Geteuid() != 0 {
		return result(name, doctor.Warn, "not tried: that needs root", "sudo cgtun doctor")
	}
	owned, persistent, err := tryTables()
	switch {
	case err != nil:
		return result(name, doctor.Error, fmt.Sprintf("a table as it is needed cannot be made: %v", err),
			"modprobe -a nf_tables nft_socket nft_fib_inet nft_tproxy nft_ct nft_nat nft_reject_inet, or a kernel with these")
	case !owned:
		return result(name, doctor.Warn, "tables have no owner (kernels have that since 5.12): after kill -9 marks are set until the next start, and a flushed firewall takes ours with it for a moment", "run a kernel since 5.15")
	case !persistent:
		return result(name, doctor.Warn, `tables with an owner do not outlive it (kernels have that since 6.9): with on_exit = "closed" a flushed firewall opens for a moment`, "run a kernel since 6.9")
	}
	return result(name, doctor.OK, "tables with an owner, persistent ones too, and all that is in them", "")
}

// tryTables makes tables on a thread that is in a namespace of its own, and
// ends with it.
func tryTables() (owned, persistent bool, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with this function
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("make a network namespace: %w", err)
			return
		}
		p := Plan{Mark: 1, Mask: 1, Table: 1, Priority: 1, Interfaces: []string{"lo"}, Cgroups: []Cgroup{{ID: 1, Level: 1}}}
		conn, sock, dialErr := dialTables()
		if err = dialErr; err != nil {
			return
		}
		defer conn.CloseLasting()
		t := &table{ref: tableOf(p.Table), hold: conn, sock: sock}
		var feature *FeatureError
		if err = t.create(true, false); err != nil && !errors.As(err, &feature) {
			return
		}
		owned = err == nil
		proxy := netip.AddrPortFrom(netip.IPv4Unspecified(), 1)
		if err = t.apply(newRuleset(&p, &way{dev: "lo", ours: true, tproxy: proxy}, place{})); err != nil {
			return
		}
		other := &table{ref: tableOf(2), hold: conn, sock: sock}
		persistent = other.create(true, true) == nil
	}()
	<-done
	return owned, persistent, err
}

// chainOf is a chain of others with its rules.
type chainOf struct {
	*nftables.Chain
	rules []*nftables.Rule
}

// othersChains lists them.
func othersChains(ns netns.Ref) (all []chainOf, err error) {
	err = ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		chains, err := conn.ListChains()
		for _, c := range chains {
			if strings.HasPrefix(c.Table.Name, tablePrefix) {
				continue
			}
			rules, _ := conn.GetRules(c.Table, c) // none of a chain that went meanwhile
			all = append(all, chainOf{c, rules})
		}
		return err
	})
	return all, err
}

// chains finds what chains of others do to the packets of a plan: base chains
// that drop by default, rules that write marks.
func chains(ns netns.Ref, p *Plan) (found []doctor.Result, err error) {
	all, err := othersChains(ns)
	user := slices.ContainsFunc(all, func(c chainOf) bool { return c.Name == "DOCKER-USER" })
	for _, c := range all {
		if c.Hooknum != nil && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			found = append(found, dropping(p, c, user)...)
		}
		found = append(found, writing(p, c.Chain, c.rules)...)
	}
	return found, err
}

// dropping says what a base chain that drops by default takes of a plan. user:
// docker's chain for such rules is there.
func dropping(p *Plan, c chainOf, user bool) (found []doctor.Result) {
	where := fmt.Sprintf("chain %s of table %s %s drops by default", c.Name, familyName(c.Table.Family), c.Table.Name)
	way := p.leaves()
	switch *c.Hooknum {
	case *nftables.ChainHookOutput, *nftables.ChainHookPostrouting:
		if !lets(c.rules, way) {
			found = append(found, result("firewall", doctor.Warn,
				where+": what is captured, and what cgtun itself sends, is lost where no rule of it accepts that",
				accepting(c.Chain, `oifname "`+way+`"`))...)
		}
	case *nftables.ChainHookInput:
		if p.byTun() && !letsAnswers(c.rules, way) {
			found = append(found, result("firewall", doctor.Warn, where+": the answers that come out of "+way+" are lost where no rule of it accepts them",
				accepting(c.Chain, `iifname "`+way+`"`))...)
		}
	case *nftables.ChainHookForward:
		for _, dev := range p.Interfaces {
			if lets(c.rules, way) {
				continue
			}
			fix := accepting(c.Chain, fmt.Sprintf(`iifname "%s" oifname "%s"`, dev, way)) + " && " +
				accepting(c.Chain, fmt.Sprintf(`iifname "%s" oifname "%s"`, way, dev))
			if user {
				fix = fmt.Sprintf("iptables -I DOCKER-USER -i %s -o %s -j ACCEPT && iptables -I DOCKER-USER -i %s -o %s -j ACCEPT", dev, way, way, dev)
			}
			found = append(found, result("firewall", doctor.Warn, where+": what comes in through "+dev+" is lost where no rule of it accepts that", fix)...)
		}
	}
	return found
}

// leaves is the device of the plan's way, as far as the plan names it.
func (p *Plan) leaves() string {
	switch {
	case p.byTun():
		return p.Device
	case p.Via.TProxy.IsValid():
		return "lo"
	}
	return p.Via.Dev
}

func accepting(c *nftables.Chain, match string) string {
	return fmt.Sprintf("nft insert rule %s %s %s %s accept", familyName(c.Table.Family), c.Table.Name, c.Name, match)
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "inet"
}

// rulesBefore finds what makes a start be refused, and ip rules of others that
// take marked packets before ours does.
func rulesBefore(ns netns.Ref, p *Plan) (found []doctor.Result, err error) {
	err = withRoutes(ns, func(h *netlink.Handle) error {
		for _, family := range families {
			ip := map[int]string{unix.AF_INET: "ip", unix.AF_INET6: "ip -6"}[family]
			rules, err := listRules(h, family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				var taken *TakenError
				own := r.Protocol == Protocol && numberOf(&r, rules) == p.Table
				if !own && errors.As(ruleInTheWay(p, &r), &taken) {
					found = append(found, result("ip rules", doctor.Error, taken.Error()+": a start is refused",
						fmt.Sprintf("choose another route.priority, or route.mark and route.mask, or: %s rule del priority %d", ip, r.Priority))...)
					continue
				}
				if what := meets(p, &r); what != "" {
					found = append(found, result("ip rules", doctor.Warn, fmt.Sprintf("%s rule %q %s", ip, ruleText(&r), what),
						fmt.Sprintf("choose another route.priority (below %d) or route.mark, or move that rule: %s rule del priority %d", r.Priority, ip, r.Priority))...)
				}
			}
			routes, err := listRoutes(h, family, p.Table)
			if err != nil {
				return err
			}
			routes = slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Protocol == Protocol })
			if len(routes) > 0 {
				found = append(found, result("ip rules", doctor.Error, fmt.Sprintf("table %d is taken by %s: a start is refused", p.Table, tableHolder(h, routes)),
					fmt.Sprintf("choose another route.table, or: %s route flush table %d", ip, p.Table))...)
			}
		}
		return nil
	})
	return found, err
}

// meets says what an ip rule does to the packets of a plan; "" is nothing.
func meets(p *Plan, r *netlink.Rule) string {
	if r.Protocol == Protocol || r.Priority == 0 {
		return ""
	}
	mask := maskOf(r)
	same := mask != 0 && overlaps(r.Mark, mask, p.Mark, p.Mask)
	switch {
	case r.Priority >= p.Priority || r.IifName != "" || r.OifName != "" || r.Src != nil || r.Dst != nil || r.SuppressPrefixlen >= 0:
		return ""
	case mask != 0 && r.Invert && !same:
		return "is for all but one mark, comes before ours, and takes what is captured"
	case mask == 0 && !r.Invert && r.Table != unix.RT_TABLE_LOCAL:
		return "is for everything, comes before ours, and takes what is captured where its table has a route"
	}
	return ""
}

// strictFilter finds rp_filter=1 where answers come back by a device of
// others; on our own the mark is looked up, too.
func strictFilter(ns netns.Ref, p *Plan) (found []doctor.Result, err error) {
	if p.byTun() || p.Via.Dev == "" {
		return nil, nil
	}
	err = ns.Do(func() error {
		conf := "/proc/sys/net/ipv4/conf/"
		dev, all := setting(conf+p.Via.Dev+"/rp_filter"), setting(conf+"all/rp_filter")
		if max(dev, all) == "1" {
			found = result("rp_filter", doctor.Warn, "is strict on "+p.Via.Dev+": answers that come back by it are dropped, for the main table leads elsewhere",
				"sysctl -w net.ipv4.conf."+p.Via.Dev+".rp_filter=2")
		}
		return nil
	})
	return found, err
}

// notForwarded finds interfaces whose packets go no further.
func notForwarded(ns netns.Ref, p *Plan) (found []doctor.Result, err error) {
	err = ns.Do(func() error {
		for _, dev := range p.Interfaces {
			switch setting("/proc/sys/net/ipv4/conf/" + dev + "/forwarding") {
			case "":
				found = append(found, result("forwarding", doctor.Warn, "the interface "+dev+" is not there", "make it, or take it out of select.interfaces")...)
			case "0":
				found = append(found, result("forwarding", doctor.Warn, "is off: what comes in through "+dev+" goes nowhere", "sysctl -w net.ipv4.ip_forward=1")...)
			}
			if setting("/proc/sys/net/ipv6/conf/all/forwarding") == "0" && hasV6(dev) {
				found = append(found, result("forwarding", doctor.Warn, "is off for IPv6: what comes in through "+dev+" goes nowhere", "sysctl -w net.ipv6.conf.all.forwarding=1")...)
			}
		}
		return nil
	})
	return found, err
}

// setting reads a sysctl; "" where it is not there.
func setting(path string) string {
	text, _ := os.ReadFile(path)
	return strings.TrimSpace(string(text))
}
