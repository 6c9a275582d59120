package stack

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
	"time"

	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"cgtun/flow"
)

const (
	// firstRepeat is when the first repeat of a SYN is late: Linux sends it
	// after 1 s.
	firstRepeat = 1500 * time.Millisecond
	// repeatSlack is added to twice the last gap: older kernels double it.
	repeatSlack = 500 * time.Millisecond
	// handshakeTime bounds the wait for a client's ACK. Netstack gives up
	// before; this is for a SYN that it did not take at all.
	handshakeTime = 20 * time.Second
	// sweepPending is how often those who gave up are looked for.
	sweepPending = 250 * time.Millisecond

	// verdictKept is how long an answer is remembered, for the repeat that
	// crossed it on the way. Silence is remembered as long as SYNs come.
	verdictKept = 250 * time.Millisecond
	silenceKept = 10 * time.Second
	maxVerdicts = 4096
)

// phase of a pending.
type phase uint8

const (
	dialing     phase = iota // the SYN is held
	handshaking              // netstack has it
	over                     // taken out of the table
)

// pending is a client whose SYN was not answered, or whose handshake is not
// done. It is the flow.Stream that the handler gets.
type pending struct {
	t      *streams
	id     gvstack.TransportEndpointID
	flow   *flow.Flow
	ctx    context.Context
	cancel context.CancelFunc
	place  *list.Element
	turn   turn

	// Under table.mu.
	phase    phase
	seq      uint32
	syn      *gvstack.PacketBuffer // held while dialing
	last     time.Time             // of its SYNs
	gap      time.Duration         // between the last two; 0: only one came
	conn     *conn                 // the end of the handshake
	err      error
	reset    []byte        // a RST that came before the end of the handshake
	shaken   chan struct{} // closed when conn or err is set; made by Accept
	answered bool          // Accept or Reject was called
}

// verdict is an answer that a repeated SYN gets again.
type verdict struct {
	seq   uint32
	why   flow.Reason
	until time.Time
}

// table has all pendings, oldest first, and the verdicts.
type table struct {
	o     *TCPOptions
	count *counters

	mu       sync.Mutex
	closed   bool
	byID     map[gvstack.TransportEndpointID]*pending
	age      *list.List // of *pending
	sources  map[netip.Addr]int
	dests    map[netip.Addr]int
	verdicts map[gvstack.TransportEndpointID]verdict
	// shaking are the handshakes that netstack has. One can be evicted before
	// its endpoint is there to be aborted, and would then stay until netstack
	// gives up.
	shaking map[*pending]struct{}
	wake    chan struct{} // something is there to be swept
}

func newTable(o *TCPOptions, count *counters) *table {
	return &table{
		o: o, count: count,
		byID:     make(map[gvstack.TransportEndpointID]*pending),
		age:      list.New(),
		sources:  make(map[netip.Addr]int),
		dests:    make(map[netip.Addr]int),
		verdicts: make(map[gvstack.TransportEndpointID]verdict),
		shaking:  make(map[*pending]struct{}),
		wake:     make(chan struct{}, 1),
	}
}

func (t *table) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.age.Len()
}

// What a SYN is.
type synKind uint8

const (
	synNew synKind = iota
	synRepeat
	synJudged // verdict says how it was answered
	synLate   // the stack ends
)

// classifyLocked says what a SYN is and notes its time.
func (t *table) classifyLocked(id gvstack.TransportEndpointID, seq uint32, now time.Time) (synKind, flow.Reason) {
	if t.closed {
		return synLate, 0
	}
	if p := t.byID[id]; p != nil {
		if p.seq == seq || p.phase != dialing {
			p.gap, p.last = now.Sub(p.last), now
			p.turn.again()
			return synRepeat, 0
		}
		// The client forgot the first attempt and makes another one.
		t.removeLocked(p)
		p.cancel()
	}
	if v, ok := t.verdicts[id]; ok {
		if v.seq == seq && now.Before(v.until) {
			if v.why == flow.Dropped {
				v.until = now.Add(silenceKept)
				t.verdicts[id] = v
			}
			return synJudged, v.why
		}
		delete(t.verdicts, id)
	}
	return synNew, 0
}

// addLocked makes room and takes p in. Those who had to go are returned; the
// caller ends them without the lock.
func (t *table) addLocked(p *pending) (gone []*pending) {
	src, dst := p.flow.Src.Addr(), p.flow.Dst.Addr()
	if t.sources[src] >= t.o.PendingPerSource {
		gone = append(gone, t.evictLocked(func(o *pending) bool { return o.flow.Src.Addr() == src }))
		t.count.evictedSource.Add(1)
	}
	if t.dests[dst] >= t.o.PendingPerDestination {
		gone = append(gone, t.evictLocked(func(o *pending) bool { return o.flow.Dst.Addr() == dst }))
		t.count.evictedDest.Add(1)
	}
	if t.age.Len() >= t.o.Pending {
		gone = append(gone, t.evictLocked(func(*pending) bool { return true }))
		t.count.evicted.Add(1)
	}
	t.byID[p.id] = p
	p.place = t.age.PushBack(p)
	t.sources[src]++
	t.dests[dst]++
	t.wakeSweeper()
	return gone
}

// evictLocked takes out the oldest that matches. In a flood that is the first
// one or nearly so.
func (t *table) evictLocked(match func(*pending) bool) *pending {
	for e := t.age.Front(); e != nil; e = e.Next() {
		if p := e.Value.(*pending); match(p) {
			t.removeLocked(p)
			return p
		}
	}
	return nil
}

// removeLocked takes p out, if it is in.
func (t *table) removeLocked(p *pending) {
	if p.phase == over {
		return
	}
	p.phase = over
	p.turn.leave()
	if p.syn != nil {
		p.syn.DecRef()
		p.syn = nil
	}
	delete(t.byID, p.id)
	t.age.Remove(p.place)
	decrement(t.sources, p.flow.Src.Addr())
	decrement(t.dests, p.flow.Dst.Addr())
}

func decrement(m map[netip.Addr]int, a netip.Addr) {
	if m[a]--; m[a] <= 0 {
		delete(m, a)
	}
}

// judgeLocked remembers the answer to p. The bound is no more than a bound: a
// table that is full forgets anything.
func (t *table) judgeLocked(p *pending, why flow.Reason) {
	kept := verdictKept
	if why == flow.Dropped {
		kept = silenceKept
	}
	if len(t.verdicts) >= maxVerdicts {
		for id := range t.verdicts {
			delete(t.verdicts, id)
			break
		}
	}
	t.verdicts[p.id] = verdict{p.seq, why, time.Now().Add(kept)}
	t.wakeSweeper()
}

func (t *table) wakeSweeper() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// run looks for clients who gave up until ctx ends. With an empty table it
// sleeps.
func (t *table) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		}
		tick := time.NewTicker(sweepPending)
		for busy := true; busy; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case now := <-tick.C:
				busy = t.sweep(now)
			}
		}
		tick.Stop()
	}
}

// sweep cancels the dials of clients whose SYN is overdue, ends handshakes that
// were evicted, forgets old verdicts, and returns whether anything is left.
func (t *table) sweep(now time.Time) bool {
	var gone []*pending
	t.mu.Lock()
	for e := t.age.Front(); e != nil; {
		p := e.Value.(*pending)
		e = e.Next()
		if now.Sub(p.last) > p.patience() {
			t.removeLocked(p)
			gone = append(gone, p)
		}
	}
	for id, v := range t.verdicts {
		if now.After(v.until) {
			delete(t.verdicts, id)
		}
	}
	var late []*pending
	for p := range t.shaking {
		if p.phase == over {
			late = append(late, p)
		}
	}
	busy := t.age.Len() > 0 || len(t.verdicts) > 0 || len(t.shaking) > 0
	t.mu.Unlock()
	endAll(late, (*pending).abortHandshake)
	t.count.gaveUp.Add(uint64(len(gone)))
	endAll(gone, func(p *pending) { p.cancel() })
	return busy
}

// patience is how long after a SYN its repeat is waited for, or after Accept the
// end of the handshake.
func (p *pending) patience() time.Duration {
	if p.phase == handshaking {
		return handshakeTime
	}
	if p.gap == 0 {
		return firstRepeat
	}
	return 2*p.gap + repeatSlack
}

// close takes no more in and cancels all dials.
func (t *table) close() {
	var gone []*pending
	t.mu.Lock()
	t.closed = true
	for t.age.Len() > 0 {
		p := t.age.Front().Value.(*pending)
		t.removeLocked(p)
		gone = append(gone, p)
	}
	t.mu.Unlock()
	for _, p := range gone {
		p.cancel()
	}
}
