// Package router takes the flows of every capture and sees each one to its
// end: whose is it, what do the rules say, dial, answer the client, move the
// bytes. It owns the table of live flows, the counters and what is
// remembered of flows that closed lately.
//
// It knows neither captures nor kinds of outbounds: a flow comes in as a
// flow.Stream or flow.PacketConn, and leaves by a dialer.Outbound that it
// looks up by the name in the verdict. Captures call it as their
// flow.Handler; control shows its table; cmd gives it rules and outbounds.
//
// Each flow has one goroutine of control, the one in which the capture calls
// ServeStream or ServePackets. The client's SYN is answered only once the
// outbound has connected, so that a client learns the truth.
package router

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/replay"
	"cgtun/rules"
)

// Owners finds the process behind a flow. A nil Owner without an error: there is
// none on this machine. An error: there was one, or nobody knows. Safe for
// concurrent use.
type Owners interface {
	Owner(context.Context, *flow.Flow) (*flow.Owner, error)
}

// Guard judges where flows want to go, before their outbound is asked. Safe for
// concurrent use.
type Guard interface {
	// Judge says why a flow may not reach its destination by an outbound whose
	// sockets leave so, by a *flow.Denied. Nil: it may. It may ask the kernel.
	Judge(f *flow.Flow, leaves []dialer.Leave) error
	// Version changes whenever another answer is possible: who is served by
	// datagrams is judged again then.
	Version() uint64
	// Has says whether this machine has an address. A socket that is bound to
	// one that has gone is closed.
	Has(netip.Addr) bool
}

// noGuard lets everything pass.
type noGuard struct{}

func (noGuard) Judge(*flow.Flow, []dialer.Leave) error { return nil }
func (noGuard) Version() uint64                        { return 0 }
func (noGuard) Has(netip.Addr) bool                    { return true }

// Meter is told of dials, and of flows. Safe for concurrent use; it does not
// block.
type Meter interface {
	dialer.Meter
	// Ended is called once for each flow. outbound is its last one, or what the
	// rules had for it; "" if it ended before that was known.
	Ended(proto flow.Proto, outbound string, why flow.Reason)
}

// noMeter counts nothing.
type noMeter struct{}

func (noMeter) Dialled(string, time.Duration, flow.Reason) {}
func (noMeter) Ended(flow.Proto, string, flow.Reason)      {}

// Options are what a Router needs and its bounds; zero values mean the
// defaults.
type Options struct {
	Logger *slog.Logger // default: none
	Owners Owners       // default: every owner is unknown
	Guard  Guard        // default: every destination is open
	Meter  Meter        // default: nobody is told
	// Resolver answers what is sent to port 53. Default: that is a flow as any
	// other.
	Resolver Resolver

	// Deadline of a flow from its start to its connection: 30 s.
	Deadline time.Duration
	// OwnerTimeout bounds one look-up of an owner: 1 s. After it the owner
	// counts as unknown.
	OwnerTimeout time.Duration
	// KeepClosed is how long a closed flow stays in the table: 60 s.
	KeepClosed time.Duration
	// MaxClosed is how many closed flows stay at most, the newest ones: 4096
	// (about 600 bytes each). Counters.ClosedForgotten counts the others.
	MaxClosed int
	// WatchBuffer is how many events wait for one watcher that is slow:
	// 1024. Counters.EventsLost counts what found no room.
	WatchBuffer int
	// Packets bounds what datagrams can fill.
	Packets PacketOptions
	// MaxSockets is how many outbound sockets there are at a time. A flow
	// that finds no room is refused and counted as refused: clients cannot
	// take the descriptors that the rest of the process lives on. 0: no bound.
	MaxSockets int
	// MaxDials is how many dials may be in flight at a time, and
	// MaxDialsPerSource for one address of an attachment; of IPv6 for a /64.
	// The oldest make room, and end as if their deadline was over.
	// Counters.DialsEvicted counts them. Defaults: 4,096, but half of
	// MaxSockets at most; half of it.
	MaxDials, MaxDialsPerSource int
	// MaxMemory is how many bytes the process may take above what it has when
	// New is called. New flows are refused before it is passed. 0: no bound.
	MaxMemory int64
	// MemoryUsed is told how much of MaxMemory is in use, again and again by
	// Run: it can make buffers smaller long before flows are refused. Nil:
	// nobody is.
	MemoryUsed func(used, limit int64)
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if o.Guard == nil {
		o.Guard = noGuard{}
	}
	if o.Meter == nil {
		o.Meter = noMeter{}
	}
	set := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	set(&o.Deadline, 30*time.Second)
	set(&o.OwnerTimeout, time.Second)
	set(&o.KeepClosed, time.Minute)
	if o.MaxClosed == 0 {
		o.MaxClosed = 4096
	}
	if o.WatchBuffer == 0 {
		o.WatchBuffer = 1024
	}
	if o.MaxDials == 0 {
		o.MaxDials = 4096
		if o.MaxSockets > 0 {
			o.MaxDials = max(1, min(o.MaxDials, o.MaxSockets/2))
		}
	}
	if o.MaxDialsPerSource == 0 {
		o.MaxDialsPerSource = max(1, o.MaxDials/2)
	}
	return o
}

// Router is a flow.Handler. Safe for concurrent use. Its only goroutine is that
// of Run: nothing is to be closed.
type Router struct {
	opts Options
	log  *slog.Logger

	policy atomic.Pointer[policy]
	table  table
	counts counters
	ways   ways
	dials  dials
	budget *replay.Budget
	asides flow.Workers // of aside
	pumps  flow.Workers // of relays and replays

	lookups lookups

	livePeers atomic.Int64 // of all PacketConns
	sockets   atomic.Int64 // places taken, at most MaxSockets
	streams   atomic.Int64 // connections, answered and not ended
	quiets    atomic.Bool  // some flow is, or was, watched for silence
	full      atomic.Bool  // that there was none is said, once a spell

	turnedAway atomic.Bool // a flow, for want of room, since shed looked

	maxMemory   atomic.Int64
	startMemory uint64      // bytes
	scarce      atomic.Bool // too little of MaxMemory is left

	reload sync.Mutex // one Reload at a time
}

// policy is what Reload swaps: immutable.
type policy struct {
	set     *rules.Set
	outs    map[string]out
	servers []server
	// asksNames says that an outbound is asked for names that clients looked up.
	asksNames bool
}

// server is an outbound with a server of its own.
type server interface{ IsServer(netip.AddrPort) bool }

// out returns the outbound of a verdict; there may be none. What is for the
// server of an outbound goes by direct: a client that uses that server by itself
// is not led through it twice, and no circle of outbounds can come about.
func (p *policy) out(v rules.Verdict, dst netip.AddrPort) out {
	o := p.outs[v.Use]
	if o.Outbound == nil {
		return o
	}
	for _, s := range p.servers {
		if direct, ok := p.outs[rules.UseDirect]; ok && s.IsServer(dst) {
			return direct
		}
	}
	return o
}

// out is an outbound and what is counted of it.
type out struct {
	dialer.Outbound
	way    *way
	leaves []dialer.Leave
}

// New returns a Router that refuses everything until Reload gives it rules.
func New(o Options) *Router {
	r := &Router{opts: o.withDefaults(), startMemory: usedMemory()}
	r.lookups.init()
	r.log = r.opts.Logger
	r.maxMemory.Store(r.opts.MaxMemory)
	r.table.init(r.opts)
	r.budget = replay.NewBudget(r.table.len)
	r.dials.most, r.dials.mostPerSource = r.opts.MaxDials, r.opts.MaxDialsPerSource
	r.policy.Store(&policy{set: rules.Empty()})
	return r
}

// Run looks after the flows that live for long, until ctx ends: servers that do
// not read for a while are not taken for dead (dialer.Patience), and closed
// flows are forgotten also when no new ones push them out. Without it MaxMemory
// is no bound.
func (r *Router) Run(ctx context.Context) error {
	var others sync.WaitGroup
	defer others.Wait()
	others.Go(func() { r.watchMemory(ctx) })
	others.Go(func() { r.lookForQuiet(ctx) })
	others.Go(func() { r.asides.Run(ctx) })
	others.Go(func() { r.pumps.Run(ctx) })
	tick := time.NewTicker(dialer.PatienceEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			live := r.table.alive(now)
			for _, e := range live {
				e.lookAfter()
				e.moves(now)
			}
			r.shed(live, now)
		}
	}
}

// Reload puts rules and outbounds in force for the flows that begin from now
// on; live ones keep what they have. The outbounds are known by the names that
// the rules use; counts go on under the same name.
func (r *Router) Reload(set *rules.Set, outbounds map[string]dialer.Outbound) {
	r.reload.Lock()
	defer r.reload.Unlock()
	p := &policy{set: set, outs: make(map[string]out, len(outbounds))}
	for name, o := range outbounds {
		p.outs[name] = out{Outbound: o, way: r.ways.get(name), leaves: dialer.Leaves(o)}
		if s, ok := o.(server); ok {
			p.servers = append(p.servers, s)
		}
		if n, ok := o.(interface{ AsksNames() bool }); ok && n.AsksNames() {
			p.asksNames = true
		}
	}
	r.policy.Store(p)
}

// decide asks the rules about a flow, and about its owner first. There is no
// Outbound for rules.Reject, rules.Drop and a name that nobody has. Missing is
// rules.FactName if only what the client sends can tell.
func (r *Router) decide(ctx context.Context, e *entry) (v rules.Verdict, o out, missing rules.Fact, facts *rules.Facts) {
	facts = e.facts(r.owner(ctx, e.flow))
	v, o, missing = r.match(facts)
	return v, o, missing, facts
}

// facts are what is known of a flow whose owner was looked up. A name that is not
// sure is there, and does not count as known.
func (e *entry) facts(owner *flow.Owner) *rules.Facts {
	facts := &rules.Facts{Flow: e.flow, Owner: owner, Known: rules.FactOwner}
	if e.r.opts.Resolver == nil {
		return facts
	}
	f := *e.flow
	f.Who = who(&f, owner)
	name, sure, own := e.r.opts.Resolver.Name(&f)
	if facts.Name = name; sure {
		facts.Known |= rules.FactName
	}
	if sure && own {
		e.asked = name
	}
	return facts
}

// match asks the rules.
func (r *Router) match(facts *rules.Facts) (rules.Verdict, out, rules.Fact) {
	p := r.policy.Load()
	v, missing := p.set.Match(facts)
	if missing != 0 {
		return v, out{}, missing
	}
	return v, p.out(v, facts.Flow.Dst), 0
}

// Explain says what the rules in force make of the facts, and which path a
// flow would take: nil where none would be dialled. An error is the guard's, or
// ErrUnsupported for pings and datagrams that the outbound cannot carry.
func (r *Router) Explain(f *rules.Facts) (v rules.Verdict, missing rules.Fact, path []string, err error) {
	p := r.policy.Load()
	if v, missing = p.set.Match(f); missing != 0 {
		return v, missing, nil, nil
	}
	o := p.out(v, f.Flow.Dst)
	if o.Outbound == nil {
		return v, 0, nil, nil
	}
	if err := r.opts.Guard.Judge(f.Flow, o.leaves); err != nil {
		return v, 0, nil, err
	}
	switch {
	case f.Flow.Proto == flow.ICMP:
		err = dialer.CanEcho(o.Outbound)
	case f.Flow.Proto == flow.UDP && !r.takes(f.Flow.Proto, f.Flow.Dst):
		err = dialer.CanOpenPackets(o.Outbound)
	}
	if err != nil {
		return v, 0, nil, err
	}
	return v, 0, dialer.PathOf(o.Outbound), nil
}

// recovered ends a flow whose goroutine panics: the flow is lost, the others
// are not. end tells the client.
func (r *Router) recovered(e *entry, end func()) {
	p := recover()
	if p == nil {
		return
	}
	r.panicked(p, "flow", e.flow.ID)
	e.end(flow.Unknown)
	end()
}
