package steer

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// The named counters of a table. They live as long as the table does.
const (
	countGuard = "guard" // marked packets that would have left another way
	countSpoof = "spoof" // to be captured, with a source that is not of here
	countStray = "stray" // out of the device to somewhere else than here
)

// chunk is how many elements one netlink message carries: an attribute ends
// at 64 KiB, and an element takes up to 56 bytes.
const chunk = 1000

// ruleset is a whole table, written down before it is sent.
type ruleset struct {
	table  *nftables.Table
	sets   []*nftables.Set
	elems  map[*nftables.Set][]nftables.SetElement
	chains []*nftables.Chain
	rules  []*nftables.Rule
	ifs    *nftables.Set // the plan's interfaces; nil: none
}

// tableOf names the table of an instance.
func tableOf(table int) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("%s%d", tablePrefix, table)}
}

const tablePrefix = "cgtun_"

// homePrefix begins the name of an empty chain, by which a table in another
// namespace says whose it is: the cookie of home follows.
const homePrefix = "home_"

func homeOf(cookie uint64) string { return fmt.Sprintf("%s%d", homePrefix, cookie) }

// place is where a table is.
type place struct {
	away bool   // in another namespace than home
	home uint64 // the cookie of home, for tables that are away
}

// guards says whether the table has the guard. Away it is plain and outlives
// us, and what guards there is a program that does not.
func (at place) guards(p *Plan) bool { return !at.away || p.Closed }

// newRuleset writes a plan down as an nft table. The package comment says why
// the rules are what they are.
func newRuleset(p *Plan, w *way, at place) *ruleset {
	r := &ruleset{table: tableOf(p.Table), elems: map[*nftables.Set][]nftables.SetElement{}}
	if at.away {
		r.chain(homeOf(at.home))
	}
	bypass := r.bypass(p)
	if len(p.Interfaces) > 0 {
		r.interfaces(p)
	}
	if w.ours {
		r.tun(p, w.dev)
	}
	r.enter(p, w, bypass)
	in := r.hook("in", nftables.ChainHookInput, nftables.ChainPriorityMangle)
	if w.ours {
		r.add(in, iif(w.dev), setCtMark(p.ctMask(), p.ctMark()))
	}
	r.add(in, iifNot("lo"), iifGroupNot(linkGroup), original(), setCtMark(cameIn, cameIn))
	r.post(p, w, at)
	r.out(p, at, bypass)
	return r
}

// tun is what comes out of our device: it is for sockets of this namespace and
// for those behind the interfaces, and goes nowhere else.
func (r *ruleset) tun(p *Plan, dev string) {
	pre := r.hook("pre", nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	// Before routing: that would answer what goes nowhere with an ICMP redirect.
	stray := join(iif(dev), daddrType(differs, unix.RTN_LOCAL))
	if r.ifs != nil {
		stray = append(stray, notBehind(daddrLeaves(), r.ifs)...)
	}
	r.add(pre, stray, count(countStray), drop())
	r.add(pre, iif(dev), setMark(p.Mask, p.Mark))

	forward := r.hook("forward", nftables.ChainHookForward, nftables.ChainPriorityFilter)
	if r.ifs != nil {
		there := join(iif(dev), oifIn(r.ifs))
		r.add(forward, there, setCtMark(p.ctMask(), p.ctMark()))
		r.add(forward, there, setMark(p.Mask, 0), leave())
		// Who sent it is known by his address: before others masquerade it.
		keep := r.hook("keep", nftables.ChainHookPostrouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource-1))
		keep.Type = nftables.ChainTypeNAT
		r.add(keep, iifIn(r.ifs), oif(dev), sourceAsIs(unix.NFPROTO_IPV4))
		r.add(keep, iifIn(r.ifs), oif(dev), sourceAsIs(unix.NFPROTO_IPV6))
	}
	// What a nat chain has given another destination since.
	r.add(forward, iif(dev), count(countStray), drop())
}

// enter is for what comes in: through the interfaces, to be captured as if a
// program here had sent it, and for the transparent proxy.
func (r *ruleset) enter(p *Plan, w *way, bypass []*nftables.Set) {
	if r.ifs == nil && !w.tproxy.IsValid() {
		return
	}
	enter := r.hook("enter", nftables.ChainHookPrerouting, nftables.ChainPriorityMangle)
	if r.ifs != nil {
		r.add(enter, iifIn(r.ifs), jump(r.through(p, bypass).Name))
	}
	if !w.tproxy.IsValid() {
		return
	}
	r.add(enter, markIs(p.Mask, p.Mark), tcp(), tproxyTo(w.tproxy))
	r.add(enter, markIs(p.Mask, p.Mark), udp(), tproxyTo(w.tproxy))
	// All addresses are local on this way: nobody else may answer for them. The
	// kernel sends no ICMP error from an IPv4 address that is not its own.
	r.add(enter, markIs(p.Mask, p.Mark), tcp(), reset())
	r.add(enter, markIs(p.Mask, p.Mark), reject())
}

// through decides on what was forwarded in. Answers to what others began go
// the way they came.
func (r *ruleset) through(p *Plan, bypass []*nftables.Set) *nftables.Chain {
	captured := ctMarkIs(p.ctMask(), p.ctMark())
	c := r.chain("through")
	r.renew(c, p)
	r.add(c, reply(), captured, setMark(p.Mask, p.Mark), leave())
	r.add(c, reply(), leave())
	r.add(c, daddrType(equal, unix.RTN_LOCAL), leave())
	for _, set := range bypass {
		r.add(c, daddrIn(set), leave())
	}
	for _, is6 := range []bool{false, true} {
		if p.skips(is6) {
			r.add(c, family(is6), leave())
		}
	}
	r.add(c, syn(), captured, setCtMark(p.ctMask(), 0))
	r.add(c, syn(), fresh(), setCtMark(p.ctMask(), p.ctMark()))
	r.add(c, tcp(), captured, setMark(p.Mask, p.Mark))
	r.add(c, notTCP(), setMark(p.Mask, p.Mark))
	// Of these it is not known whose they are; here they would leak.
	r.add(c, tcp(), invalid(), setMark(p.Mask, p.Mark))
	spoof := join(markIs(p.Mask, p.Mark), notBehind(saddrLeaves(), r.ifs))
	r.add(c, spoof, count(countSpoof), drop())
	return c
}

// post is the guard, and what enters the device.
func (r *ruleset) post(p *Plan, w *way, at place) {
	post := r.hook("post", nftables.ChainHookPostrouting, nftables.ChainPriorityFilter)
	for _, is6 := range []bool{false, true} {
		if p.fences(is6) {
			r.fence(post, p, is6)
		}
	}
	if at.guards(p) {
		guard := markIs(p.Mask, p.Mark)
		if w.dev != "" && w.dev != "lo" {
			guard = append(guard, oifNot(w.dev)...)
		}
		r.add(post, guard, oifNot("lo"), count(countGuard), drop())
	}
	if !w.ours {
		return
	}
	// The kernel's own group reports on the device are no flows of anybody.
	r.add(post, oif(w.dev), daddrType(equal, unix.RTN_MULTICAST), drop())
	if r.ifs != nil {
		r.add(post, oif(w.dev), iifIn(r.ifs), leave())
	}
	r.add(post, oif(w.dev), saddrType(differs, unix.RTN_LOCAL), count(countSpoof), drop())
}

// fence lets go what the routes let pass of a family that is left alone: the mark
// was for them. A socket that is bound to a device finds a way that they do not have.
func (r *ruleset) fence(post *nftables.Chain, p *Plan, is6 bool) {
	marked := join(family(is6), markIs(p.Mask, p.Mark))
	if is6 { // of IPv4 the kernel asks by ARP for who is far, and fib has no answer
		r.add(post, marked, daddrGoesNowhere(), count(countGuard), drop())
	}
	r.add(post, marked, setMark(p.Mask, 0))
}

// out is the chain that decides. Its type is route: a changed mark makes the
// kernel look the route up again.
func (r *ruleset) out(p *Plan, at place, bypass []*nftables.Set) {
	unmark := r.chain("unmark")
	r.add(unmark, markIs(p.Mask, p.Mark), setMark(p.Mask, 0))

	out := r.hook("out", nftables.ChainHookOutput, nftables.ChainPriorityMangle)
	out.Type = nftables.ChainTypeRoute
	if p.Self.Level > 0 {
		r.add(out, cgroupIs(p.Self), leave())
	}
	levels, sets := r.cgroups("other", p.Others)
	for i, set := range sets {
		r.add(out, cgroupIn(levels[i], set), leave())
	}
	for _, e := range p.Earlier {
		r.add(out, markIs(e.Mask, e.Value), setMark(e.Mask, 0), setMark(p.Mask, p.Mark))
	}
	r.renew(out, p)
	r.add(out, reply(), ctMarkIs(cameIn, cameIn), goTo(unmark.Name))
	for _, set := range bypass {
		r.add(out, daddrIn(set), goTo(unmark.Name))
	}
	for _, is6 := range []bool{false, true} {
		if p.skips(is6) && !p.Closed {
			r.add(out, family(is6), goTo(unmark.Name))
		}
	}

	captured := ctMarkIs(p.ctMask(), p.ctMark())
	r.add(out, reply(), captured, setMark(p.Mask, p.Mark))
	r.add(out, related(), captured, setMark(p.Mask, p.Mark))
	r.add(out, syn(), captured, setCtMark(p.ctMask(), 0))
	levels, sets = r.cgroups("level", p.Cgroups)
	for i, set := range sets {
		r.add(out, syn(), fresh(), cgroupIn(levels[i], set), setCtMark(p.ctMask(), p.ctMark()))
	}
	if p.All {
		r.add(out, syn(), fresh(), setCtMark(p.ctMask(), p.ctMark()))
	}
	r.add(out, syn(), fresh(), markIs(p.Mask, p.Mark), setCtMark(p.ctMask(), p.ctMark()))
	r.add(out, tcp(), captured, setMark(p.Mask, p.Mark))
	for i, set := range sets {
		r.add(out, notTCP(), cgroupIn(levels[i], set), setMark(p.Mask, p.Mark))
	}
	if p.Resolver != 0 && !at.away {
		r.names(p, levels, sets)
	}
	if p.All {
		// Errors that the kernel reports as a router are nobody's.
		r.add(out, notTCP(), hasSocket(), setMark(p.Mask, p.Mark))
	}
}

// renew gives connections of earlier marks the one of now.
func (r *ruleset) renew(c *nftables.Chain, p *Plan) {
	for _, e := range p.Earlier {
		mask := e.Mask &^ cameIn
		r.add(c, ctMarkIs(mask, e.Value&mask), setCtMark(mask, 0), setCtMark(p.ctMask(), p.ctMark()))
	}
}

// names gives queries to resolvers on loopback, and on home's own networks, which
// no route leads to us, to our own. Docker's chain comes before it: 127.0.0.11 stays docker's.
func (r *ruleset) names(p *Plan, levels []int, sets []*nftables.Set) {
	names := r.hook("names", nftables.ChainHookOutput, nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest+1))
	names.Type = nftables.ChainTypeNAT
	if p.Self.Level > 0 {
		r.add(names, cgroupIs(p.Self), leave())
	}
	for _, is6 := range []bool{false, true} {
		for i, set := range sets {
			r.add(names, onLoopback(is6), tcp(), toPort53(), cgroupIn(levels[i], set), dnatPort(p.Resolver))
			r.add(names, onLoopback(is6), udp(), toPort53(), cgroupIn(levels[i], set), dnatPort(p.Resolver))
		}
	}
	v4, v6 := split(outermost(p.OnLink))
	for _, on := range []struct {
		set  *nftables.Set
		loop netip.Addr
	}{
		{r.set(&nftables.Set{Name: "on4", KeyType: nftables.TypeIPAddr, Interval: true}, intervals(v4)), netip.AddrFrom4([4]byte{127, 0, 0, 1})},
		{r.set(&nftables.Set{Name: "on6", KeyType: nftables.TypeIP6Addr, Interval: true}, intervals(v6)), netip.IPv6Loopback()},
	} {
		to := dnatTo(netip.AddrPortFrom(on.loop, p.Resolver))
		for i, set := range sets {
			r.add(names, daddrIn(on.set), tcp(), toPort53(), cgroupIn(levels[i], set), to)
			r.add(names, daddrIn(on.set), udp(), toPort53(), cgroupIn(levels[i], set), to)
		}
	}
}

func (r *ruleset) chain(name string) *nftables.Chain {
	c := &nftables.Chain{Name: name, Table: r.table}
	r.chains = append(r.chains, c)
	return c
}

func (r *ruleset) hook(name string, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	c := r.chain(name)
	c.Type, c.Hooknum, c.Priority = nftables.ChainTypeFilter, hook, priority
	return c
}

func (r *ruleset) add(c *nftables.Chain, parts ...part) {
	r.rules = append(r.rules, &nftables.Rule{Table: r.table, Chain: c, Exprs: join(parts...)})
}

func (r *ruleset) set(s *nftables.Set, elems []nftables.SetElement) *nftables.Set {
	s.Table = r.table
	s.ID = uint32(len(r.sets) + 1) // ours, in this batch: the library counts without a lock
	r.sets = append(r.sets, s)
	r.elems[s] = elems
	return s
}

// bypass returns the sets by4 and by6.
func (r *ruleset) bypass(p *Plan) []*nftables.Set {
	v4, v6 := split(bypassOf(p))
	return []*nftables.Set{
		r.set(&nftables.Set{Name: "by4", KeyType: nftables.TypeIPAddr, Interval: true}, intervals(v4)),
		r.set(&nftables.Set{Name: "by6", KeyType: nftables.TypeIP6Addr, Interval: true}, intervals(v6)),
	}
}

// interfaces makes the set of their names.
func (r *ruleset) interfaces(p *Plan) {
	var elems []nftables.SetElement
	for _, dev := range slices.Compact(slices.Sorted(slices.Values(p.Interfaces))) {
		elems = append(elems, nftables.SetElement{Key: name(dev)})
	}
	r.ifs = r.set(&nftables.Set{Name: "interfaces", KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}, elems)
}

// cgroups returns one set a level, by level, for the level is part of the
// question that a rule asks. Its name is kind with the level.
func (r *ruleset) cgroups(kind string, all []Cgroup) (levels []int, sets []*nftables.Set) {
	ids := map[int][]uint64{}
	for _, c := range all {
		if len(ids[c.Level]) == 0 {
			levels = append(levels, c.Level)
		}
		ids[c.Level] = append(ids[c.Level], c.ID)
	}
	slices.Sort(levels)
	for _, level := range levels {
		slices.Sort(ids[level])
		var elems []nftables.SetElement
		for _, id := range slices.Compact(ids[level]) {
			elems = append(elems, nftables.SetElement{Key: binaryutil.NativeEndian.PutUint64(id)})
		}
		sets = append(sets, r.set(&nftables.Set{
			Name: fmt.Sprintf("%s%d", kind, level), KeyType: nftables.TypeCGroupV2, KeyByteOrder: binaryutil.NativeEndian,
		}, elems))
	}
	return levels, sets
}

// send queues the table on conn, in place of all rules of old and of its sets
// and chains; nil stands for an empty table. Flush makes it one transaction: no
// packet sees half of it.
func (r *ruleset) send(conn *nftables.Conn, old *ruleset) error {
	if old != nil {
		conn.FlushTable(r.table)
		for _, set := range old.sets {
			conn.DelSet(&nftables.Set{Table: r.table, Name: set.Name})
		}
		for _, c := range old.chains {
			if !slices.ContainsFunc(r.chains, func(o *nftables.Chain) bool { return o.Name == c.Name }) {
				conn.DelChain(&nftables.Chain{Table: r.table, Name: c.Name})
			}
		}
	}
	for _, name := range []string{countGuard, countSpoof, countStray} {
		conn.AddObj(&nftables.CounterObj{Table: r.table, Name: name})
	}
	for _, set := range r.sets {
		if err := conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("write nft set %s: %w", set.Name, err)
		}
		for part := range slices.Chunk(r.elems[set], chunk) {
			if err := conn.SetAddElements(set, part); err != nil {
				return fmt.Errorf("write nft set %s: %w", set.Name, err)
			}
		}
	}
	for _, c := range r.chains {
		conn.AddChain(c)
	}
	for _, rule := range r.rules {
		conn.AddRule(rule)
	}
	return nil
}
