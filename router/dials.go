package router

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

// A dial to nowhere holds a descriptor and a port until its deadline. So those in
// flight are bounded, in all and for each source, and where one more would be too
// many the oldest ends: of the same source, or of the one that has most. A source
// with few dials never makes room for one with many.

// errCrowded ends a dial that makes room for another.
var errCrowded error = crowded{}

type crowded struct{}

func (crowded) Error() string           { return "ended early: too many dials in flight" }
func (crowded) FlowReason() flow.Reason { return flow.TimedOut }

// dialSource is whose dials are counted together: of IPv6 a /64, which one host
// has to itself (RFC 6177).
type dialSource struct {
	attachment string
	addr       netip.Addr
}

func sourceOf(f *flow.Flow) dialSource {
	a := f.Src.Addr().Unmap()
	if a.Is6() {
		p, _ := a.WithZone("").Prefix(64)
		a = p.Addr()
	}
	return dialSource{f.Attachment, a}
}

// ender is a dial, to who ends it.
type ender interface{ End() }

// End implements ender.
func (cancel canceler) End() { cancel() }

type canceler context.CancelFunc

// dials are those in flight.
type dials struct {
	most, mostPerSource int

	mu      sync.Mutex
	total   int
	sources map[dialSource]*list.List   // of ender, the oldest first
	having  map[int]map[dialSource]bool // the sources that have so many
	highest int                         // of having
	evicted uint64
}

// dialing is a dial in flight.
type dialing struct {
	of    dialSource
	place *list.Element
}

// begin counts a dial, and ends another one that is too many. Who calls it calls
// end.
func (d *dials) begin(f *flow.Flow, one ender) dialing {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sources == nil {
		d.sources, d.having = map[dialSource]*list.List{}, map[int]map[dialSource]bool{}
	}
	of := sourceOf(f)
	mine := d.sources[of]
	switch {
	case mine != nil && mine.Len() >= d.mostPerSource:
		d.evict(of)
	case d.total >= d.most && d.having[d.highest][of]:
		d.evict(of)
	case d.total >= d.most:
		for most := range d.having[d.highest] {
			d.evict(most)
			break
		}
	}
	if mine = d.sources[of]; mine == nil {
		mine = list.New()
		d.sources[of] = mine
	}
	d.move(of, mine.Len(), mine.Len()+1)
	return dialing{of, mine.PushBack(one)}
}

// evict ends the oldest dial of a source. Its place is free at once: end finds
// it taken.
func (d *dials) evict(of dialSource) {
	oldest := d.sources[of].Front()
	oldest.Value.(ender).End()
	d.remove(of, oldest)
	d.evicted++
}

// end says whether the dial was evicted before.
func (d *dials) end(one dialing) (evicted bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	evicted = one.place.Value == nil
	d.remove(one.of, one.place)
	return evicted
}

// remove takes a dial out, if it is in.
func (d *dials) remove(of dialSource, place *list.Element) {
	if place.Value == nil {
		return
	}
	l := d.sources[of]
	l.Remove(place)
	place.Value = nil
	d.move(of, l.Len()+1, l.Len())
	if l.Len() == 0 {
		delete(d.sources, of)
	}
}

// move notes that a source has another number of dials: one more or one less.
func (d *dials) move(of dialSource, from, to int) {
	d.total += to - from
	delete(d.having[from], of)
	if len(d.having[from]) == 0 {
		delete(d.having, from)
	}
	if to > 0 {
		if d.having[to] == nil {
			d.having[to] = map[dialSource]bool{}
		}
		d.having[to][of] = true
	}
	if to > d.highest || d.having[d.highest] == nil {
		d.highest = to // it was the only one with most, and has one less now
	}
}

// dialStream connects a flow by an outbound, as a dial that counts, until then.
func (r *Router) dialStream(ctx context.Context, f *flow.Flow, o dialer.Outbound, t dialer.Target, until time.Time) (c *dialer.Conn, err error) {
	if g, ok := o.(rescuer); ok {
		return r.dialGroup(ctx, f, g, t, until)
	}
	err = r.inFlight(ctx, until, f, func(ctx context.Context) (err error) {
		c, err = o.DialStream(ctx, t)
		return err
	})
	return c, err
}

// dialGroup is dialStream by a group. It has a context for each attempt, and another one
// around them would be a good part of what it costs.
func (r *Router) dialGroup(ctx context.Context, f *flow.Flow, g rescuer, t dialer.Target, until time.Time) (*dialer.Conn, error) {
	var dial struct {
		dialer.Ending
		conn *dialer.Conn
	}
	err := r.counted(f, &dial, func() (err error) {
		dial.conn, err = g.DialStreamUntil(ctx, t, until, &dial.Ending)
		return err
	})
	return dial.conn, err
}

// inFlight runs a dial that counts, with a context that ends at a time, or where it
// has to make room.
func (r *Router) inFlight(ctx context.Context, until time.Time, f *flow.Flow, do func(context.Context) error) error {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	return r.counted(f, canceler(cancel), func() error { return do(ctx) })
}

// counted runs a dial that counts, and that is ended where it has to make room.
func (r *Router) counted(f *flow.Flow, dial ender, do func() error) error {
	one := r.dials.begin(f, dial)
	err := r.aside(do)
	if r.dials.end(one) && err != nil {
		return errCrowded
	}
	return err
}
