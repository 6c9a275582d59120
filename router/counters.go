package router

import (
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/flow"
)

type counters struct {
	flows, refused, panics               atomic.Uint64
	denied                               denials
	ownersUnknown, closedForgotten, lost atomic.Uint64
	peersEvicted, shed, acceptedFirst    atomic.Uint64
}

// Counters count from the start of the Router, but FlowsLive.
type Counters struct {
	FlowsTotal      uint64
	FlowsLive       uint64
	RefusedTotal    uint64 // flows that no outbound could connect
	DeniedTotal     uint64 // flows that a rule rejected or dropped, or the guard denied
	PanicsTotal     uint64 // flows lost to a fault of ours
	OwnersFailed    uint64 // look-ups of an owner that failed
	ClosedForgotten uint64 // closed flows that went out of the table early, for want of room
	EventsLost      uint64 // events that a slow watcher did not get
	PeersEvicted    uint64 // datagram flows that ended to make room for another
	StreamsShed     uint64 // idle connections that did
	DialsEvicted    uint64 // dials that did
	DialsLive       int    // in flight
	AcceptedFirst   uint64 // clients that were accepted before their outbound was asked, for their name
}

// Counters returns a snapshot.
func (r *Router) Counters() Counters {
	c := &r.counts
	r.dials.mu.Lock()
	live, evicted := r.dials.total, r.dials.evicted
	r.dials.mu.Unlock()
	return Counters{
		StreamsShed: c.shed.Load(), DialsEvicted: evicted, DialsLive: live,
		FlowsTotal: c.flows.Load(), FlowsLive: uint64(r.table.len()), RefusedTotal: c.refused.Load(), DeniedTotal: c.denied.total(),
		PanicsTotal: c.panics.Load(), OwnersFailed: c.ownersUnknown.Load(),
		ClosedForgotten: c.closedForgotten.Load(), EventsLost: c.lost.Load(),
		PeersEvicted: c.peersEvicted.Load(), AcceptedFirst: c.acceptedFirst.Load(),
	}
}

// The kinds of denials that are not the guard's own.
const (
	byRule  = "rule"
	byFault = "fault" // the guard could not judge
)

// denials are counts of denied flows by kind.
type denials struct {
	mu   sync.Mutex
	kind map[string]uint64
}

// add counts one, and says whether it was the first of its kind.
func (d *denials) add(kind string) (first bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kind == nil {
		d.kind = make(map[string]uint64)
	}
	d.kind[kind]++
	return d.kind[kind] == 1
}

func (d *denials) total() (n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, of := range d.kind {
		n += of
	}
	return n
}

// Denials returns Counters.DeniedTotal by kind: "rule", and those of the guard's
// flow.Denied.
func (r *Router) Denials() map[string]uint64 {
	d := &r.counts.denied
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.kind)
}

// ways is what is counted of each outbound, by name. It outlives reloads.
type ways struct {
	mu    sync.Mutex
	known map[string]*way
}

// get returns the counts under a name, new ones at first.
func (w *ways) get(name string) *way {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known == nil {
		w.known = make(map[string]*way)
	}
	if w.known[name] == nil {
		w.known[name] = &way{name: name}
	}
	return w.known[name]
}

// find returns the counts under a name that Reload has seen, or nil.
func (w *ways) find(name string) *way {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.known[name]
}

// way is what is counted of one outbound. A nil way counts nothing.
type way struct {
	name            string
	dials, failures atomic.Uint64
	up, down        atomic.Int64 // of flows that have ended

	mu        sync.Mutex
	connectMS float64 // EWMA; 0: never connected
	row       int     // failures with no success since
	warned    bool
	since     time.Time // of row
}

// The weight of a new connect time in the average, and the failures in a row
// that make a spell: one alone is as often the destination's fault.
const (
	ewmaWeight   = 0.2
	spellBegins  = 3
	millisPerSec = 1000
)

// connected counts a dial that worked, and took so long.
func (w *way) connected(took time.Duration, log *slog.Logger) {
	if w == nil {
		return
	}
	w.dials.Add(1)
	ms := took.Seconds() * millisPerSec
	w.mu.Lock()
	if w.connectMS == 0 {
		w.connectMS = ms
	}
	w.connectMS += ewmaWeight * (ms - w.connectMS)
	row, warned, since := w.row, w.warned, w.since
	w.row, w.warned = 0, false
	w.mu.Unlock()
	if warned {
		log.Warn("outbound works again", "outbound", w.name, "failures", row, "lasted", time.Since(since).Round(time.Millisecond))
	}
}

// failed counts a dial that did not. That the client left is nobody's failure;
// that the destination said no makes no spell: the outbound works.
func (w *way) failed(err error, why flow.Reason, log *slog.Logger) {
	if w == nil {
		return
	}
	w.dials.Add(1)
	if why == flow.Canceled || why == flow.Expired { // as the client wanted it
		return
	}
	w.failures.Add(1)
	if why == flow.Refused {
		return
	}
	w.mu.Lock()
	w.row++
	if w.row == 1 {
		w.since = time.Now()
	}
	warn := w.row == spellBegins
	w.warned = w.warned || warn
	w.mu.Unlock()
	if warn {
		log.Warn("outbound fails", "outbound", w.name, "failures", spellBegins, "reason", why.String(), "err", err)
	}
}

// OutboundStats is what the flows did with one outbound, since the start of
// the Router.
type OutboundStats struct {
	DialsTotal, FailuresTotal uint64
	UpBytes, DownBytes        uint64
	ConnectMS                 *float64 // average of the last connects; nil: none yet
}

// Outbounds returns the counts of every outbound that rules can have used, by
// name, those that a reload took away included.
func (r *Router) Outbounds() map[string]OutboundStats {
	t := &r.table
	t.mu.Lock()
	defer t.mu.Unlock()
	stats := r.ways.stats()
	for e := t.live.next; e != &t.live; e = e.next {
		e.mu.Lock()
		w := e.way
		e.mu.Unlock()
		if w == nil {
			continue
		}
		s := stats[w.name]
		s.UpBytes += uint64(e.up.Load())
		s.DownBytes += uint64(e.down.Load())
		stats[w.name] = s
	}
	return stats
}

func (w *ways) stats() map[string]OutboundStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	stats := make(map[string]OutboundStats, len(w.known))
	for name, way := range w.known {
		stats[name] = way.stats()
	}
	return stats
}

func (w *way) stats() OutboundStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := OutboundStats{
		DialsTotal: w.dials.Load(), FailuresTotal: w.failures.Load(),
		UpBytes: uint64(w.up.Load()), DownBytes: uint64(w.down.Load()),
	}
	if ms := w.connectMS; ms > 0 {
		s.ConnectMS = &ms
	}
	return s
}
