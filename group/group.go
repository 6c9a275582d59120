package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

// Group is several outbounds that look like one. It is a dialer.Outbound and a
// dialer.Echoer, safe for concurrent use, and has nothing to be closed: what a
// call starts has ended when it returns.
type Group struct {
	c         Config
	members   []*member
	outbounds []string // that are reached, each once
	scores    *Scores
}

// member is an outbound in its place.
type member struct {
	out   dialer.Outbound
	path  *path
	index int
}

// New makes a group of members, which stand in the order of c.Outbounds and can
// be groups. Groups that share Scores learn from each other.
func New(c Config, members []dialer.Outbound, s *Scores) (*Group, error) {
	if len(members) == 0 {
		return nil, fmt.Errorf("make group %q: it has no outbounds", c.Name)
	}
	g := &Group{c: c, scores: s}
	for i, o := range members {
		m := &member{out: o, path: s.of(o), index: i}
		g.members = append(g.members, m)
		reached := []string{m.path.name}
		if inner, ok := o.(*Group); ok {
			reached = inner.outbounds
		}
		for _, name := range reached {
			if !slices.Contains(g.outbounds, name) {
				g.outbounds = append(g.outbounds, name)
			}
		}
	}
	return g, nil
}

// Name implements dialer.Outbound.
func (g *Group) Name() string { return g.c.Name }

// Config returns what the group was made of.
func (g *Group) Config() Config { return g.c }

// DialStream implements dialer.Outbound: the members race, as far as the type of
// the group wants.
func (g *Group) DialStream(ctx context.Context, t dialer.Target) (*dialer.Conn, error) {
	return g.DialStreamUntil(ctx, t, time.Time{}, nil)
}

// DialStreamUntil is DialStream for a flow that has time until then, where the deadline
// of the group is not sooner; zero: it has that. Who may have to end it by ending needs no
// context around those of the attempts; nil: nobody does.
func (g *Group) DialStreamUntil(ctx context.Context, t dialer.Target, until time.Time, ending *dialer.Ending) (*dialer.Conn, error) {
	r := streamRaces.Get().(*race[*dialer.Conn])
	r.g, r.target, r.scored, r.dial, r.until, r.ending = g, t, true, dialStream, until, ending
	c, m, err := r.run(ctx)
	*r = race[*dialer.Conn]{} // nothing of it is left
	streamRaces.Put(r)
	if err != nil {
		return nil, err
	}
	inner, dst := c.Report, t.Addr
	c.Report = func(o dialer.Outcome) {
		g.scores.report(m.path, dst, o)
		if inner != nil {
			inner(o)
		}
	}
	return c, nil
}

// streamRaces are used again: there is one for each flow.
var streamRaces = sync.Pool{New: func() any { return new(race[*dialer.Conn]) }}

func dialStream(ctx context.Context, o dialer.Outbound, t *dialer.Target) (*dialer.Conn, error) {
	return o.DialStream(ctx, *t)
}

// OpenPackets implements dialer.Outbound: the first member that can.
func (g *Group) OpenPackets(ctx context.Context, t dialer.Target) (*dialer.PacketConn, error) {
	return g.openPackets(ctx, t, func(ctx context.Context, o dialer.Outbound, t *dialer.Target) (*dialer.PacketConn, error) {
		return o.OpenPackets(ctx, *t)
	})
}

// OpenEcho implements dialer.Echoer.
func (g *Group) OpenEcho(ctx context.Context, t dialer.Target) (*dialer.PacketConn, error) {
	return g.openPackets(ctx, t, func(ctx context.Context, o dialer.Outbound, t *dialer.Target) (*dialer.PacketConn, error) {
		return dialer.OpenEcho(ctx, o, *t)
	})
}

// CarriesPackets says whether a member can carry datagrams, as far as that is known
// beforehand; CarriesEcho whether one can carry ICMP echo.
func (g *Group) CarriesPackets() bool { return g.some(dialer.CanOpenPackets) }

// CarriesEcho is described there.
func (g *Group) CarriesEcho() bool { return g.some(dialer.CanEcho) }

func (g *Group) some(can func(dialer.Outbound) error) bool {
	return slices.ContainsFunc(g.members, func(m *member) bool { return can(m.out) == nil })
}

// openPackets says nothing to the scores: most outbounds ask nobody.
func (g *Group) openPackets(ctx context.Context, t dialer.Target, open func(context.Context, dialer.Outbound, *dialer.Target) (*dialer.PacketConn, error)) (*dialer.PacketConn, error) {
	r := race[*dialer.PacketConn]{g: g, target: t, dial: open}
	c, _, err := r.run(ctx)
	return c, err
}

// Order returns the names of the members in the order in which they would be
// asked now, for a destination that nothing is known of.
func (g *Group) Order() []string {
	var names []string
	for _, m := range g.rank(&dialer.Target{}, time.Now()) {
		names = append(names, m.path.name)
	}
	return names
}

// Outbounds returns the names of the outbounds that are reached through the group,
// each once. The caller does not change it.
func (g *Group) Outbounds() []string { return g.outbounds }

// Replay says whether a flow whose path fails before the server has answered may
// be tried elsewhere.
func (g *Group) Replay() bool { return g.c.Replay }

// Usual is how long a first byte takes by an outbound; 0: nobody knows.
func (g *Group) Usual(outbound string) time.Duration {
	g.scores.mu.Lock()
	defer g.scores.mu.Unlock()
	if p := g.scores.paths[outbound]; p != nil {
		return scale(time.Second, p.first.value)
	}
	return 0
}

// Down is for how long an outbound cannot be used at all, while another one of the
// group can; 0: it can be used, none can, or nobody knows.
func (g *Group) Down(outbound string) time.Duration {
	g.scores.mu.Lock()
	defer g.scores.mu.Unlock()
	p, elsewhere := g.scores.paths[outbound], false
	if p == nil || p.down == "" {
		return 0
	}
	for _, name := range g.outbounds {
		other := g.scores.paths[name]
		elsewhere = elsewhere || other != nil && other.down == ""
	}
	if !elsewhere {
		return 0
	}
	return time.Since(p.downSince)
}

// Hide counts a failure of an outbound that the client did not see.
func (g *Group) Hide(outbound string, kind dialer.Hidden) { g.scores.Hide(outbound, kind) }

// Leaves implements dialer.Leaver: a flow may take the way of any member.
func (g *Group) Leaves() []dialer.Leave {
	var all []dialer.Leave
	for _, m := range g.members {
		for _, l := range dialer.Leaves(m.out) {
			if !slices.Contains(all, l) {
				all = append(all, l)
			}
		}
	}
	return all
}

// canCarry says whether an outbound can carry a flow, as far as that is known
// beforehand.
func canCarry(o dialer.Outbound, f *flow.Flow) bool {
	switch {
	case f == nil:
	case f.Proto == flow.UDP:
		return dialer.CanOpenPackets(o) == nil
	case f.Proto == flow.ICMP:
		return dialer.CanEcho(o) == nil
	}
	return true
}

// Choose says which outbound a flow to t would be given to first, and why, in
// words for the user.
func (g *Group) Choose(t dialer.Target) (o dialer.Outbound, why string) {
	now := time.Now()
	list := slices.DeleteFunc(g.rank(&t, now), func(m ranked) bool { return !canCarry(m.out, t.Flow) })
	if len(list) == 0 {
		return nil, fmt.Sprintf("group %q: no member is left", g.c.Name)
	}
	var words []string
	g.scores.mu.Lock()
	for _, m := range list {
		words = append(words, fmt.Sprintf("%q (%s)", m.path.name, m.path.why(now)))
	}
	g.scores.mu.Unlock()
	why = fmt.Sprintf("group %q (%s) would ask %s", g.c.Name, g.c.Type, strings.Join(words, ", then "))
	if inner, ok := list[0].out.(*Group); ok {
		leaf, more := inner.Choose(t)
		return leaf, why + "; " + more
	}
	return list[0].out, why
}

// blameless tells errors that are of this machine and not of a path.
func blameless(err error) bool {
	return absent(err) || errors.Is(err, context.Canceled) || exhausted(err)
}
