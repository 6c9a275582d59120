package stack

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"cgtun/flow"
)

// # Theory of operation
//
// Truth. A client learns by the answer to its SYN whether the far end is there,
// so the SYN is held until the outbound has connected.
//
//	SYN ──► handle ──► pending (dialing), handler runs ServeStream (turns.go)
//	                     │ Accept ──► the held SYN goes to netstack's forwarder:
//	                     │            SYN-ACK, ACK (handshaking) ──► conn
//	                     │ Reject ──► RST, an ICMP error, or silence
//	                     │ repeats of the SYN only say that the client waits
//	                     └ no repeat in time: the client has given up, and the
//	                       dial is cancelled. There is no other sign: a client
//	                       that closes while it connects sends nothing.
//
// Netstack has its own bound on forwarded handshakes and no idea of dials, so
// the table of pendings is ours (pending.go). When it is full the oldest goes:
// under a flood of SYNs a new client is served at once, and what is lost is
// nearly always one of the flood. Its dial is cancelled, or its half-open
// endpoint aborted.
//
// An answer is remembered for a moment (verdict), because the client's repeat
// may have crossed it: it gets the same answer and starts no second dial.
//
// What is answered as a plain SYN: ECN bits, TCP fast open, MPTCP and IP options
// are not taken up and do not hurt. SYN with FIN or RST is dropped. Any other
// segment without a connection gets a RST (RFC 9293 §3.5.2).
//
// Endings (conn.go). CloseWrite is a FIN. Close is a FIN, or a RST if the client
// had sent what nobody read. Reset first waits until the client has acknowledged
// what was written, then sends RST. A closed connection that makes no progress
// for the linger time is given up. TIME-WAIT lasts 20 ms: the 60 s of the book
// would swallow a new SYN on the same ports without an answer, and a tun neither
// reorders nor delays.

const (
	timeWait = 20 * time.Millisecond
	// synRetries bounds how long a half-open endpoint waits for the client's
	// ACK: about 15 s.
	synRetries = 3
	// firstBuffer is what a buffer may hold before it has grown; it limits,
	// and holds nothing by itself.
	minBuffer, firstBuffer = 4 << 10, 128 << 10
	// icmpErrors a second are sent at most.
	icmpErrors = 5000

	// errorDelay is how old a SYN is at least when an ICMP error answers it. A
	// Linux client that is still inside of connect(2) takes the error for a
	// hint, and goes on: seen when a rule refuses within microseconds.
	errorDelay = 2 * time.Millisecond

	keepAliveInterval = 10 * time.Second
	keepAliveCount    = 6
)

// streams is the TCP side of a stack.
type streams struct {
	s      *Stack
	h      flow.Handler
	table  *table
	turns  *turns
	reuse  *reuse
	fwd    *tcp.Forwarder
	errors *rate.Limiter

	serving sync.WaitGroup // goroutines in ServeStream
	servers flow.Workers   // whose they are
	shakers flow.Workers   // of handshake

	mu         sync.Mutex
	ctx        context.Context // of all flows; nil before begin
	handshakes sync.WaitGroup  // goroutines in handshake
	ended      bool
}

func newStreams(s *Stack, h flow.Handler) *streams {
	t := &streams{
		s: s, h: h,
		table:  newTable(&s.o.TCP, &s.count),
		turns:  newTurns(),
		errors: rate.NewLimiter(icmpErrors, icmpErrors/5),
	}
	t.reuse = newReuse(t)
	// Handshakes that were evicted stay in the forwarder until they end.
	t.fwd = tcp.NewForwarder(s.gv, min(firstBuffer, s.o.TCP.Buffer), 2*s.o.TCP.Pending, func(r *tcp.ForwarderRequest) {
		t.shakers.Go(func() { t.handshake(r) })
	})
	return t
}

// protocolOptions are those that hold for all connections.
func (t *streams) protocolOptions() []tcpip.SettableTransportProtocolOption {
	o := &t.s.o.TCP
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	// RACK and its tail probes retransmit hundreds of times a second on a
	// link that loses nothing.
	recovery := tcpip.TCPRecovery(0)
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	linger := tcpip.TCPLingerTimeoutOption(o.Linger)
	retries := tcpip.TCPSynRetriesOption(synRetries)
	first := min(firstBuffer, o.Buffer)
	return []tcpip.SettableTransportProtocolOption{
		&sack, &moderate, &recovery, &wait, &linger, &retries,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: min(minBuffer, first), Default: first, Max: o.Buffer},
		&tcpip.TCPSendBufferSizeRangeOption{Min: min(minBuffer, first), Default: first, Max: o.Buffer},
	}
}

// begin lets flows in. Before it SYNs are dropped.
func (t *streams) begin(ctx context.Context) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ctx = ctx
}

// run looks after the table until ctx ends, lets nothing more in, and returns
// when the last handler has.
func (t *streams) run(ctx context.Context) {
	var kept sync.WaitGroup
	kept.Go(func() { t.reuse.run(ctx) })
	kept.Go(func() { t.servers.Run(ctx) })
	kept.Go(func() { t.shakers.Run(ctx) })
	t.table.run(ctx)
	kept.Wait()
	t.mu.Lock()
	t.ended = true
	t.mu.Unlock()
	t.table.close()
	t.serving.Wait()
}

// endHandshakes ends those that are left after run, and returns when their
// goroutines are gone.
func (t *streams) endHandshakes() {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		t.handshakes.Wait()
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		// Again and again: an endpoint may come into being only now.
		t.table.mu.Lock()
		left := slices.Collect(maps.Keys(t.table.shaking))
		t.table.mu.Unlock()
		for _, p := range left {
			p.abortHandshake()
		}
		select {
		case <-gone:
			return
		case <-tick.C:
		}
	}
}

// handle is called by a reader for each segment that belongs to no connection.
// False lets netstack answer with RST.
func (t *streams) handle(id gvstack.TransportEndpointID, pkt *gvstack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	const judged = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagFin | header.TCPFlagRst
	switch flags := h.Flags() & judged; {
	case flags == header.TCPFlagSyn:
		t.syn(id, h.SequenceNumber(), pkt)
		return true
	case flags.Contains(header.TCPFlagRst):
		t.clientReset(id)
		if flags.Contains(header.TCPFlagSyn) {
			t.s.count.oddSYN.Add(1)
		}
		return true
	case flags.Contains(header.TCPFlagSyn | header.TCPFlagFin):
		t.s.count.oddSYN.Add(1)
		return true
	}
	return false
}

// syn holds a new SYN, or notes a repeated one.
func (t *streams) syn(id gvstack.TransportEndpointID, seq uint32, pkt *gvstack.PacketBuffer) {
	now := time.Now()
	t.table.mu.Lock()
	kind, why := t.table.classifyLocked(id, seq, now)
	if kind != synNew {
		t.table.mu.Unlock()
		if kind == synJudged {
			t.answer(id, pkt, why, nil)
		}
		return
	}
	t.mu.Lock()
	parent := t.ctx
	if t.ended {
		parent = nil
	}
	t.mu.Unlock()
	if parent == nil {
		t.table.mu.Unlock()
		return
	}
	p := &pending{t: t, id: id, seq: seq, last: now, syn: pkt.Clone()}
	p.flow = flow.New(flow.TCP, addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort), t.s.o.Attachment)
	p.flow.TTL = ttlOf(pkt) - 1
	p.ctx, p.cancel = context.WithCancel(parent)
	var gone []*pending
	if b := t.turns.ask(&p.turn, p); b != nil {
		gone = append(gone, b.(*pending))
		t.table.removeLocked(gone[0])
		t.s.count.evicted.Add(1)
	}
	gone = append(gone, t.table.addLocked(p)...)
	t.table.mu.Unlock()
	for _, g := range gone {
		g.evict()
	}
}

func (p *pending) source() netip.Addr { return p.flow.Src.Addr() }

// begin is called with the table locked, or by the goroutine of another pending: run
// waits for those after it has closed the table.
func (p *pending) begin() {
	p.t.serving.Add(1)
	p.t.servers.Go(func() { p.t.serve(p) })
}

// serve runs the handler of one flow to its end.
func (t *streams) serve(p *pending) {
	defer t.serving.Done()
	defer p.turn.end()
	defer p.cancel()
	t.h.ServeStream(p.ctx, p)
	if !p.answered {
		p.Reject(flow.Unknown, nil)
	}
}

// clientReset cancels the dial of a client that says itself that it gave up.
func (t *streams) clientReset(id gvstack.TransportEndpointID) {
	t.table.mu.Lock()
	p := t.table.byID[id]
	if p == nil || p.phase != dialing {
		t.table.mu.Unlock()
		return
	}
	t.table.removeLocked(p)
	t.table.mu.Unlock()
	t.s.count.gaveUp.Add(1)
	p.cancel()
}

// evict ends a pending that was taken out for room.
func (p *pending) evict() {
	if p == nil {
		return
	}
	p.cancel()
	p.abortHandshake()
}

// abortHandshake ends a half-open endpoint, if there is one.
func (p *pending) abortHandshake() {
	if ep := p.t.s.gv.FindTransportEndpoint(networkOf(p.id.RemoteAddress), tcp.ProtocolNumber, p.id, nicID); ep != nil {
		ep.Abort()
	}
}

// Flow implements flow.Stream.
func (p *pending) Flow() *flow.Flow { return p.flow }

// Begun implements flow.Stream.
func (p *pending) Begun() { p.turn.end() }

// Accept implements flow.Stream: it answers the SYN and waits for the client's
// ACK. The error wraps context.Canceled if there is nobody any more who asked.
func (p *pending) Accept() (flow.Conn, error) {
	t := p.t
	p.turn.end()
	t.table.mu.Lock()
	if p.answered || p.phase != dialing {
		p.answered = true
		t.table.mu.Unlock()
		return nil, p.goneError("the client has given up")
	}
	p.answered = true
	p.phase, p.last = handshaking, time.Now()
	p.shaken = make(chan struct{})
	syn := p.syn
	p.syn = nil
	t.table.mu.Unlock()

	t.fwd.HandlePacket(p.id, syn)
	syn.DecRef()
	select {
	case <-p.shaken:
	case <-p.ctx.Done():
		p.abortHandshake()
	}
	t.table.mu.Lock()
	c, err := p.conn, p.err
	p.conn = nil
	t.table.removeLocked(p) // from now on handshake throws an endpoint away
	t.table.mu.Unlock()
	if c == nil {
		if err == nil {
			err = p.goneError("it was ended first")
		}
		return nil, err
	}
	t.s.count.accepted.Add(1)
	return c, nil
}

func (p *pending) goneError(why string) error {
	return fmt.Errorf("answer %s: %s: %w", p.flow.Src, why, context.Canceled)
}

// handshake runs in a goroutine of its own, for the SYN that Accept gave to the
// forwarder.
func (t *streams) handshake(r *tcp.ForwarderRequest) {
	t.table.mu.Lock()
	p := t.table.byID[r.ID()]
	if p == nil || p.phase != handshaking || p.shaken == nil {
		t.table.mu.Unlock()
		r.Complete(false)
		return
	}
	t.handshakes.Add(1)
	t.table.shaking[p] = struct{}{}
	t.table.mu.Unlock()
	defer t.handshakes.Done()

	c := &conn{s: t.s, local: p.flow.Dst, remote: p.flow.Src}
	ep, terr := r.CreateEndpoint(&c.wq)
	// Before Accept returns: the forwarder ignores a SYN for ports that it is
	// busy with, and one may be waiting.
	r.Complete(false)
	if terr == nil {
		c.open(ep)
	}
	t.table.mu.Lock()
	delete(t.table.shaking, p)
	taken := p.phase == handshaking
	var reset []byte
	if taken && terr == nil {
		p.conn, reset = c, p.reset
	} else if taken {
		p.err = p.goneError(terr.String())
	}
	if taken {
		close(p.shaken)
	}
	t.table.mu.Unlock()
	switch {
	case !taken && terr == nil:
		c.released()
		ep.Abort()
	case reset != nil:
		t.s.inject(reset)
	}
}

// Reject implements flow.Stream.
func (p *pending) Reject(why flow.Reason, said *flow.ICMPError) {
	t := p.t
	p.turn.end()
	t.table.mu.Lock()
	p.answered = true
	syn := p.syn
	p.syn = nil
	came := p.last
	if p.phase == dialing && why != flow.Canceled {
		t.table.judgeLocked(p, why)
	}
	t.table.removeLocked(p)
	t.table.mu.Unlock()
	t.s.count.rejected.Add(1)
	if syn != nil {
		if !silentOrReset(why) {
			time.Sleep(errorDelay - time.Since(came))
		}
		t.answer(p.id, syn, why, said)
		syn.DecRef()
	}
}

// answer tells a client why there is no connection.
func (t *streams) answer(id gvstack.TransportEndpointID, syn *gvstack.PacketBuffer, why flow.Reason, said *flow.ICMPError) {
	if why == flow.Dropped || why == flow.Canceled {
		return
	}
	if !silentOrReset(why) {
		orig := append([]byte(nil), syn.NetworkHeader().Slice()...)
		orig = append(orig, syn.TransportHeader().Slice()...)
		pkt, ok := icmpSaid(said, t.s.own, orig)
		if !ok {
			pkt, ok = icmpError(why, t.s.own, orig)
		}
		if ok {
			t.s.sendError(pkt)
			return
		}
	}
	// A RST is what netstack sends for a segment that nobody wants.
	t.s.gv.TransportProtocolInstance(tcp.ProtocolNumber).HandleUnknownDestinationPacket(id, syn)
}

// silentOrReset says whether a reason has no ICMP error.
func silentOrReset(why flow.Reason) bool {
	switch why {
	case flow.Dropped, flow.Canceled, flow.Refused, flow.Reset, flow.Closed:
		return true
	}
	return false
}
