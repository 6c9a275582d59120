package steer

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// The named counters of a table. They live as long as the table does.
const (
	countGuard = "guard" // marked packets that would have left another way
	countSpoof = "spoof" // into the device with a source that is not of here
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
}

// tableOf names the table of an instance.
func tableOf(table int) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("%s%d", tablePrefix, table)}
}

const tablePrefix = "cgtun_"

// newRuleset writes a plan down as an nft table. The package comment says why
// the rules are what they are.
func newRuleset(p *Plan) *ruleset {
	r := &ruleset{table: tableOf(p.Table), elems: map[*nftables.Set][]nftables.SetElement{}}
	r.edges(p)
	r.out(p)
	return r
}

// edges are the chains around the device: what comes out of it, what goes
// into it, and what came in elsewhere.
func (r *ruleset) edges(p *Plan) {
	dev := p.Device
	pre := r.hook("pre", nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	// Before routing: that would answer what goes nowhere with an ICMP redirect.
	r.add(pre, iif(dev), daddrType(differs, unix.RTN_LOCAL), count(countStray), drop())
	r.add(pre, iif(dev), setMark(p.Mask, p.Mark))

	in := r.hook("in", nftables.ChainHookInput, nftables.ChainPriorityMangle)
	r.add(in, iif(dev), setCtMark(p.ctMask(), p.ctMark()))
	r.add(in, iifNot("lo"), iifGroupNot(linkGroup), original(), setCtMark(cameIn, cameIn))

	// What a nat chain has given another destination since.
	forward := r.hook("forward", nftables.ChainHookForward, nftables.ChainPriorityFilter)
	r.add(forward, iif(dev), count(countStray), drop())

	post := r.hook("post", nftables.ChainHookPostrouting, nftables.ChainPriorityFilter)
	r.add(post, markIs(p.Mask, p.Mark), oifNot(dev), oifNot("lo"), count(countGuard), drop())
	// The kernel's own group reports on the device are no flows of anybody.
	r.add(post, oif(dev), daddrType(equal, unix.RTN_MULTICAST), drop())
	r.add(post, oif(dev), saddrType(differs, unix.RTN_LOCAL), count(countSpoof), drop())
}

// out is the chain that decides. Its type is route: a changed mark makes the
// kernel look the route up again.
func (r *ruleset) out(p *Plan) {
	unmark := &nftables.Chain{Name: "unmark", Table: r.table}
	r.chains = append(r.chains, unmark)
	r.add(unmark, markIs(p.Mask, p.Mark), setMark(p.Mask, 0))

	out := r.hook("out", nftables.ChainHookOutput, nftables.ChainPriorityMangle)
	out.Type = nftables.ChainTypeRoute
	if p.Self.Level > 0 {
		r.add(out, cgroupIs(p.Self), leave())
	}
	r.add(out, reply(), ctMarkIs(cameIn, cameIn), goTo(unmark.Name))
	for _, set := range r.bypass(p) {
		r.add(out, daddrIn(set), goTo(unmark.Name))
	}

	captured := ctMarkIs(p.ctMask(), p.ctMark())
	r.add(out, reply(), captured, setMark(p.Mask, p.Mark))
	r.add(out, related(), captured, setMark(p.Mask, p.Mark))
	r.add(out, syn(), captured, setCtMark(p.ctMask(), 0))
	levels, sets := r.cgroups(p)
	for i, set := range sets {
		r.add(out, syn(), fresh(), cgroupIn(levels[i], set), setCtMark(p.ctMask(), p.ctMark()))
	}
	r.add(out, syn(), fresh(), markIs(p.Mask, p.Mark), setCtMark(p.ctMask(), p.ctMark()))
	r.add(out, tcp(), captured, setMark(p.Mask, p.Mark))
	for i, set := range sets {
		r.add(out, notTCP(), cgroupIn(levels[i], set), setMark(p.Mask, p.Mark))
	}
}

func (r *ruleset) hook(name string, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	c := &nftables.Chain{Name: name, Table: r.table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority}
	r.chains = append(r.chains, c)
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

// cgroups returns one set a level, by level, for the level is part of the
// question that a rule asks.
func (r *ruleset) cgroups(p *Plan) (levels []int, sets []*nftables.Set) {
	ids := map[int][]uint64{}
	for _, c := range p.Cgroups {
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
			Name: fmt.Sprintf("level%d", level), KeyType: nftables.TypeCGroupV2, KeyByteOrder: binaryutil.NativeEndian,
		}, elems))
	}
	return levels, sets
}

// send queues the table on conn, in place of the sets named old and of all
// rules. Flush makes it one transaction: no packet sees half of it.
func (r *ruleset) send(conn *nftables.Conn, old []string) error {
	conn.FlushTable(r.table)
	for _, name := range old {
		conn.DelSet(&nftables.Set{Table: r.table, Name: name})
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

// setNames are the sets that the next ruleset has to replace.
func (r *ruleset) setNames() []string {
	var names []string
	for _, s := range r.sets {
		names = append(names, s.Name)
	}
	return names
}
