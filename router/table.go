package router

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/rules"
)

// table has the live flows, and those that closed lately. Live ones hang in a
// ring of their own links: nothing grows, and nothing stays grown after a
// flood.
type table struct {
	keep    time.Duration
	bound   int
	watches watches

	mu     sync.Mutex
	live   entry // the ring's head, no flow
	count  int
	closed []*entry // by end, the oldest at first; a ring once it is full
	first  int

	attachments map[string]*AttachmentStats // bytes of flows that have ended
}

func (t *table) init(o Options) {
	t.keep, t.bound = o.KeepClosed, o.MaxClosed
	t.live.prev, t.live.next = &t.live, &t.live
	t.watches.buffer = o.WatchBuffer
}

func (t *table) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count
}

// entry is a flow in the table, from begin to its end and a while after it.
// Small: there is one for every idle connection.
type entry struct {
	flow     *flow.Flow
	up, down atomic.Int64 // bytes from and to the client
	r        *Router
	asked    string // as which the client itself looked its destination up, if that is sure

	prev, next *entry // under table.mu, while it lives

	mu     sync.Mutex
	state  string
	use    string // empty: not decided
	rule   int32
	again  int32 // replays
	reason flow.Reason
	way    *way // nil: no outbound was asked
	owner  *flow.Owner
	name   string   // of the destination; "": not known
	from   string   // where it was found
	hops   []string // the path
	ended  time.Time

	cancel   context.CancelCauseFunc // ends the flow; nil: its ends are not connected
	kernel   *net.TCPConn            // the server's end, if it is a kernel socket
	patience dialer.Patience
	watched  *streamEnds // for silence; nil: it is not

	moved   int64 // bytes, and 1, as of movedAt; Run's
	movedAt time.Time
}

// begin puts a flow into the table. Whoever calls it calls end once.
func (r *Router) begin(f *flow.Flow) *entry {
	e := &entry{flow: f, r: r, state: flow.StateDialing}
	t := &r.table
	t.mu.Lock()
	e.prev, e.next = t.live.prev, &t.live
	e.prev.next, e.next.prev = e, e
	t.count++
	t.of(f.Attachment).FlowsLive++
	t.mu.Unlock()
	r.counts.flows.Add(1)
	t.watches.tell(flow.EventOpen, e)
	return e
}

// decided notes what the rules said, and of what: from is where the name was
// found, if not in the DNS.
func (e *entry) decided(v rules.Verdict, facts *rules.Facts, from string) {
	e.mu.Lock()
	e.use, e.rule, e.name, e.from = v.Use, int32(v.Rule), facts.Name, from
	if facts.Owner != nil && !facts.Owner.Lost {
		e.owner = facts.Owner
	}
	if from == "" {
		e.from = fromDNS
	}
	e.way = e.r.ways.find(v.Use)
	e.mu.Unlock()
	e.r.table.watches.tell(flow.EventUpdate, e)
}

// path notes that the outbound is connected, and by which path. The names are
// kept, not copied. The bytes are those of the last hop: where a group was asked,
// of the outbound that it has chosen.
func (e *entry) path(names []string) {
	var way *way
	if n := len(names); n > 0 {
		way = e.r.ways.find(names[n-1])
	}
	e.mu.Lock()
	e.state, e.hops = flow.StateOpen, names
	if way != nil {
		e.way = way
	}
	e.mu.Unlock()
	e.r.table.watches.tell(flow.EventUpdate, e)
}

// replayed notes how often the client's bytes were sent again.
func (e *entry) replayed(times int) {
	e.mu.Lock()
	e.again = int32(times)
	e.mu.Unlock()
}

// closing notes that one side has ended in order.
func (e *entry) closing() {
	e.mu.Lock()
	first := e.state == flow.StateOpen
	if first {
		e.state = flow.StateClosing
	}
	e.mu.Unlock()
	if first {
		e.r.table.watches.tell(flow.EventUpdate, e)
	}
}

// ending says whether one side has ended in order, and the other not yet.
func (e *entry) ending() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state == flow.StateClosing
}

// end takes the flow out of the live ones. Only the first call counts.
func (e *entry) end(why flow.Reason) {
	e.mu.Lock()
	if e.state == flow.StateClosed {
		e.mu.Unlock()
		return
	}
	e.state, e.reason, e.ended = flow.StateClosed, why, time.Now()
	e.kernel, e.cancel, e.watched = nil, nil, nil
	way, outbound := e.way, e.use
	e.mu.Unlock()
	if way != nil {
		outbound = way.name
	}
	e.r.table.retire(e, way)
	e.r.opts.Meter.Ended(e.flow.Proto, outbound, why)
	e.r.table.watches.tell(flow.EventClose, e)
	e.log()
}

// retire moves an entry from the live ones to the closed ones, and its bytes to
// the outbound's: one step for who sums up both.
func (t *table) retire(e *entry, w *way) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if w != nil {
		w.up.Add(e.up.Load())
		w.down.Add(e.down.Load())
	}
	a := t.of(e.flow.Attachment)
	a.FlowsLive--
	a.UpBytes += uint64(e.up.Load())
	a.DownBytes += uint64(e.down.Load())
	e.prev.next, e.next.prev = e.next, e.prev
	e.prev, e.next = nil, nil
	t.count--
	t.forget(e.ended.Add(-t.keep))
	if len(t.closed)-t.first >= t.bound {
		t.closed[t.first] = nil
		t.first++
		e.r.counts.closedForgotten.Add(1)
	}
	t.closed = append(t.closed, e)
}

// forget drops the closed flows that ended before then. Under t.mu.
func (t *table) forget(then time.Time) {
	for t.first < len(t.closed) && t.closed[t.first].ended.Before(then) {
		t.closed[t.first] = nil
		t.first++
	}
	// Half of the slice is gone: move the rest to the front, so that each
	// entry is moved about once.
	if t.first > len(t.closed)/2 {
		n := copy(t.closed, t.closed[t.first:])
		clear(t.closed[n:])
		t.closed, t.first = t.closed[:n], 0
	}
}

// alive returns the live flows, the oldest first, and forgets closed ones.
func (t *table) alive(now time.Time) []*entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forget(now.Add(-t.keep))
	return t.living()
}

// living returns them. Under t.mu.
func (t *table) living() []*entry {
	live := make([]*entry, 0, t.count)
	for e := t.live.next; e != &t.live; e = e.next {
		live = append(live, e)
	}
	return live
}

// entries returns the live flows and those that closed lately, in the order
// in which they began and ended.
func (t *table) entries(now time.Time) (live, closed []*entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forget(now.Add(-t.keep))
	return t.living(), append(closed, t.closed[t.first:]...)
}

// Flows returns a snapshot: the closed flows that are still remembered, the
// one that ended first at first, then the live ones, the oldest first.
func (r *Router) Flows() []flow.Info {
	now := time.Now()
	live, closed := r.table.entries(now)
	infos := make([]flow.Info, 0, len(live)+len(closed))
	for _, e := range append(closed, live...) {
		infos = append(infos, e.info(now))
	}
	return infos
}

// info is the entry as control shows it.
func (e *entry) info(now time.Time) flow.Info {
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.flow
	i := flow.Info{
		ID: f.ID, Proto: f.Proto.String(), Src: f.Src, Dst: f.Dst, Attachment: f.Attachment,
		Path: e.hops, State: e.state, Replays: int(e.again), UpBytes: e.up.Load(), DownBytes: e.down.Load(), Start: f.Start.UTC(),
	}
	if i.Path == nil {
		i.Path = []string{}
	}
	if name, from := e.name, e.from; name != "" {
		i.Name, i.NameFrom = &name, &from
	}
	if use := e.use; use != "" {
		i.Use = &use
	}
	if e.rule > 0 {
		rule := int(e.rule)
		i.Rule = &rule
	}
	if e.state == flow.StateClosed {
		now = e.ended
		why := e.reason.String()
		i.Reason = &why
	}
	i.AgeMS = now.Sub(f.Start).Milliseconds()
	if o := e.owner; o != nil {
		showOwner(&i, o)
	}
	return i
}

// showOwner gives copies: an Owner can be shared by many flows.
func showOwner(i *flow.Info, o *flow.Owner) {
	uid := o.UID
	i.UID = &uid
	if o.Cgroup != "" {
		cgroup := o.Cgroup
		i.Cgroup = &cgroup
	}
	if o.PID != 0 {
		pid := o.PID
		i.PID = &pid
	}
	if o.Process != "" {
		process := o.Process
		i.Process = &process
	}
}
