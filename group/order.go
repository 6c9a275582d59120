package group

import (
	"cmp"
	"hash/fnv"
	"math"
	"net/netip"
	"slices"
	"time"

	"cgtun/dialer"
)

// The classes of members. Members of a later class are asked after all of an
// earlier one, so the last one is never lost.
const (
	healthy = iota
	suspect // failed lately; for a race that is in the cost
	ejected
	down
)

// What a failure share of 1 costs at each level, in seconds: of the path, and of
// the path to this destination.
var (
	pathCost = [levels]float64{2, 2, 0.25}
	destCost = [levels]float64{2, 2, 0.25}
)

// What a flow that broke costs, at first: when it was says more than how many. Of
// two paths that have broken flows, the one that did so last is the one that does
// it now, whereas all of them break at once when a path begins to.
const (
	brokeCost     = 8
	brokeHalfLife = 15 * time.Second
	// uncharged is the share of it for other hosts than that of the flow, as long as
	// it may have been that one's failure: it costs them little to go elsewhere.
	uncharged = 0.25
	// brokeFor is how long a member is out of its turn for it.
	brokeFor = 30 * time.Second
	// breaksFor is how long it is asked beside another one after the whole stagger only:
	// that it connects sooner does not make it the better one.
	breaksFor = 5 * time.Second
)

// broke is what is left of such a cost.
func (l *level) broke(now time.Time) float64 {
	if l.failedAt.IsZero() {
		return 0
	}
	return brokeCost * math.Exp2(-now.Sub(l.failedAt).Seconds()/brokeHalfLife.Seconds())
}

const (
	// A flow whose peer gives no sign of life is told again each second.
	quietCost = 4
	quietFor  = 3 * time.Second
	// speedBytes is the size of what is fetched in the cost of a slow path.
	speedBytes = 64 << 10
	speedFor   = 5 * time.Minute
	// newCost is what a path is expected to cost that nobody has used yet: only what
	// costs more is left to try it.
	newCost = 0.1
	// stayShare is the share of its cost that another path must be below.
	stayShare = 0.8
	// doubtful is the share below which a member is no longer in its turn.
	doubtful = 0.9
)

// ranked is a member in its place.
type ranked struct {
	*member
	class  int
	cost   float64
	breaks bool // flows, just now
}

// rank returns the members in the order in which to ask them for t, without
// those that t avoids.
func (g *Group) rank(t *dialer.Target, now time.Time) []ranked {
	g.scores.mu.Lock()
	defer g.scores.mu.Unlock()
	return g.order(nil, t, now)
}

// order appends to list what rank returns. Under Scores.mu.
func (g *Group) order(list []ranked, t *dialer.Target, now time.Time) []ranked {
	d := g.scores.dests[t.Addr]
	for _, m := range g.members {
		if slices.Contains(t.Avoid, m.path.name) {
			continue
		}
		r := ranked{m, m.path.class(d, now), g.cost(m, d, t.Addr.Addr(), now), m.path.breaks(d, now)}
		if r.class == suspect {
			r.cost = m.path.seconds(d, t.Addr.Addr(), now) // out of turn: the least suspect one first
		}
		list = append(list, r)
	}
	if g.c.Type == TypeRace {
		favour(list)
		for i := range list {
			if list[i].class == suspect {
				list[i].class = healthy
			}
		}
	}
	slices.SortStableFunc(list, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(a.cost, b.cost))
	})
	return list
}

// favour lets the healthy path that has served last stay in front, if none is
// better by more than chance: what goes wrong there is known at once, from the flows
// that are under way.
func favour(list []ranked) {
	last := -1
	for i, r := range list {
		if at := r.path.goodAt; r.class == healthy && !at.IsZero() && (last < 0 || at.After(list[last].path.goodAt)) {
			last = i
		}
	}
	if last >= 0 {
		list[last].cost *= stayShare
	}
}

func (p *path) class(d *dest, now time.Time) int {
	switch {
	case p.down != "":
		return down
	case now.Before(p.ejected):
		return ejected
	case p.doubtful(d, now):
		return suspect
	}
	return healthy
}

func (p *path) doubtful(d *dest, now time.Time) bool {
	if p.quietNow(now) {
		return true
	}
	for k := range p.level {
		l := &p.level[k]
		if l.row > 0 && now.Sub(l.failedAt) < freshFailure || l.ok.value(now) < doubtful {
			return true
		}
	}
	if d == nil || d.paths[p] == nil {
		return false
	}
	own := d.paths[p]
	for k := range own {
		if own[k].ok.value(now) < doubtful {
			return true
		}
	}
	return !own[carries].failedAt.IsZero() && now.Sub(own[carries].failedAt) < brokeFor
}

// breaks says whether a flow by the path has just broken: one to that destination, or
// one that was charged to the path.
func (p *path) breaks(d *dest, now time.Time) bool {
	fresh := func(l *level) bool { return !l.failedAt.IsZero() && now.Sub(l.failedAt) < breaksFor }
	if l := &p.level[carries]; l.row > 0 && fresh(l) {
		return true
	}
	return d != nil && d.paths[p] != nil && fresh(&d.paths[p][carries])
}

func (p *path) quietNow(now time.Time) bool { return !p.quiet.IsZero() && now.Sub(p.quiet) < quietFor }

// cost is what members of a class are ordered by: of a race seconds, of a balance
// the load or the destination's own order, of a fallback the place in the list.
func (g *Group) cost(m *member, d *dest, dst netip.Addr, now time.Time) float64 {
	switch {
	case g.c.Type == TypeFallback:
		return float64(m.index)
	case g.c.Type == TypeBalance && g.c.By == ByLoad:
		return float64(m.path.live)
	case g.c.Type == TypeBalance:
		return rendezvous(m.path.name, dst)
	}
	return m.path.seconds(d, dst, now)
}

// seconds is what a flow by this path is expected to lose.
func (p *path) seconds(d *dest, dst netip.Addr, now time.Time) float64 {
	c := p.connect.value
	if c == 0 {
		c = newCost
	}
	for k := range p.level {
		c += pathCost[k] * (1 - p.level[k].ok.value(now))
	}
	l := &p.level[carries]
	broke := l.broke(now)
	if l.row == 0 && l.failedOn != dst {
		broke *= uncharged
	}
	if d != nil && d.paths[p] != nil {
		own := d.paths[p]
		for k := range own {
			c += destCost[k] * (1 - own[k].ok.value(now))
		}
		broke = max(broke, own[carries].broke(now))
	}
	c += broke
	if p.speed.value > 0 && now.Sub(p.speedAt) < speedFor {
		c += speedBytes / p.speed.value
	}
	if p.quietNow(now) {
		c += quietCost
	}
	return c
}

// rendezvous gives each destination an order of its own, which stays when
// members come and go (highest random weight).
func rendezvous(name string, dst netip.Addr) float64 {
	h := fnv.New64a()
	_, _ = h.Write(dst.Unmap().AsSlice())
	_, _ = h.Write([]byte(name))
	// FNV's last bytes stir the high bits little.
	v := h.Sum64()
	v ^= v >> 33
	v *= 0xff51afd7ed558ccd
	v ^= v >> 33
	return float64(v >> 11)
}
