package router

import (
	"container/list"
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/relay"
	"cgtun/rules"
)

// Datagrams, theory of operation.
//
// A client source is one flow.PacketConn with many peers. Rules judge each peer
// by itself, so the table has one flow for each source and peer. The outbound
// that a verdict names gets one socket for all peers of a family (the mapping
// is endpoint-independent, RFC 4787 §4.1), opened for the first of them.
//
// The goroutine of ServePackets reads the client, finds the peer of each
// datagram, and sends runs of one outbound on in one batch, joined datagrams as
// they are. Each outbound socket has a goroutine for the way back. It lets
// everything through, also from peers the client never wrote to (§5), and counts
// it where there is a flow. What fails for one peer is told to the client by
// ICMP; a socket that fails as a whole is closed, and opened again by the
// datagram after.
//
// A verdict other than an outbound, and a socket that could not be opened, is
// remembered for a moment, so that a client that insists makes no new flow with
// every datagram; so is one that ended as soon as it was open.

// PacketOptions bound what datagrams can fill; zero values mean the defaults.
type PacketOptions struct {
	// PeersPerSource is how many peers of one source are flows at a time:
	// 1,024. The longest silent one makes room.
	PeersPerSource int
	// Peers is the same for all sources together: 16,384. Beyond it each
	// source keeps one.
	Peers int
	// Idle ends the flow of a peer that is silent while others of its source
	// are not: 5 min. Where all are, the capture ends them (RFC 4787 §4.3).
	Idle time.Duration
}

func (o PacketOptions) withDefaults() PacketOptions {
	if o.PeersPerSource == 0 {
		o.PeersPerSource = 1024
	}
	if o.Peers == 0 {
		o.Peers = 16384
	}
	if o.Idle == 0 {
		o.Idle = 5 * time.Minute
	}
	return o
}

const (
	// How long a refusal is remembered, and a socket that did not open.
	refusedFor = 10 * time.Second
	failedFor  = time.Second
	// ownerFor is how long the owner of a source is believed: a port can pass
	// to another process, and a scan need not look up its owner at every step.
	ownerFor = time.Second
	// sweepEvery is how often silent peers of a busy source are looked for.
	sweepEvery = 10 * time.Second
)

// ServePackets sees all flows of one client source to their end. It implements
// flow.Handler.
func (r *Router) ServePackets(ctx context.Context, client flow.PacketConn) {
	s := &source{
		r:      r,
		o:      r.opts.Packets.withDefaults(),
		client: client,
		peers:  make(map[netip.AddrPort]*peer),
		idle:   list.New(),
		outs:   make(map[outKey]*packetOut),
		fell:   make(map[outKey]time.Time),
		moves:  make(map[outKey]*moving),
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { client.Close() })
	defer func() {
		why := flow.Closed
		if ctx.Err() != nil {
			why = flow.Canceled
		}
		cancel()
		stop()
		s.close(why)
	}()
	defer r.recovered(s.noEntry(), func() {})
	s.serve(ctx)
}

// source is the state of one ServePackets.
type source struct {
	r      *Router
	o      PacketOptions
	client flow.PacketConn

	owner   *flow.Owner // as of ownedAt
	ownedAt time.Time
	asked   atomic.Pointer[passed]
	answers []flow.Datagram // to queries of the batch
	swept   time.Time

	turnedAway bool // a flow, for want of room

	mu    sync.Mutex
	peers map[netip.AddrPort]*peer
	idle  *list.List // of *peer, the longest silent first
	outs  map[outKey]*packetOut
	fell  map[outKey]time.Time // when one ended as soon as it was open

	moves map[outKey]*moving // of the goroutine that reads the client

	back sync.WaitGroup // the goroutines of outs
}

// peer is the flow between the source and one peer.
type peer struct {
	addr netip.AddrPort
	e    *entry
	out  *packetOut  // nil: refused
	tell flow.Reason // what the client hears if out is nil
	// until is when a refusal is forgotten.
	until time.Time
	// judged is the version of the guard that let it pass.
	judged uint64
	// held are copies of the first datagrams, while nothing is decided: a rule
	// hangs on a name that the client has not said to its end. Not nil then.
	held  []flow.Datagram
	since time.Time // of the first of them

	// Guarded by source.mu.
	place *list.Element
	last  time.Time   // of the last datagram in either direction
	wrong flow.Reason // the failure that nothing has come after, or 0
}

// noEntry stands for the flows of the source where a panic is reported: they
// end with the source.
func (s *source) noEntry() *entry {
	return &entry{flow: s.client.Flow(), r: s.r, state: flow.StateClosed}
}

// serve moves the client's datagrams until there are no more.
func (s *source) serve(ctx context.Context) {
	b := relay.NewBatch(s.client)
	defer b.Release()
	for {
		dgs, err := b.Read()
		if err != nil {
			return
		}
		s.forward(ctx, dgs)
		if s.turnedAway && !s.served() {
			return // it takes none meanwhile; the next datagram asks again
		}
	}
}

// served says whether there is a socket for any peer.
func (s *source) served() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.outs) > 0
}

// forward sends the datagrams to the outbounds of their peers, in runs as long
// as possible.
func (s *source) forward(ctx context.Context, dgs []flow.Datagram) {
	now := time.Now()
	s.sweep(now)
	var run *packetOut
	var p *peer
	start := 0
	for i := range dgs {
		d := &dgs[i]
		if s.query(ctx, d, now) {
			s.send(run, dgs[start:i])
			run, start = nil, i+1
			continue
		}
		if p == nil || p.addr != d.Peer {
			p = s.peer(ctx, d, now)
		}
		if p.held != nil {
			s.send(run, dgs[start:i])
			run, start = nil, i+1
			s.hear(ctx, p, d, now)
			continue
		}
		p.e.up.Add(int64(len(d.Data)))
		if p.out == run {
			if run == nil {
				s.unreachable(d.Peer, p.tell, nil)
			}
			continue
		}
		s.send(run, dgs[start:i])
		run, start = p.out, i
		if run == nil {
			s.unreachable(d.Peer, p.tell, nil)
		}
	}
	s.send(run, dgs[start:])
	s.answer()
}

// send sends a run to one outbound socket; nil: to none.
func (s *source) send(out *packetOut, dgs []flow.Datagram) {
	if out == nil || len(dgs) == 0 {
		return
	}
	failed := s.failed
	if out.movable {
		out.silence.sent(time.Now())
		failed = func(e *flow.PeerError) {
			if gone(e) {
				out.silence.lost.Store(true)
				return // the client's next try goes another way
			}
			s.failed(e)
		}
	}
	if err := relay.Send(out.conn, dgs, failed); err != nil {
		s.drop(out, err)
	}
}

// peer returns the flow with addr, a new one if there is none that still holds.
func (s *source) peer(ctx context.Context, d *flow.Datagram, now time.Time) *peer {
	addr := d.Peer
	s.mu.Lock()
	p := s.peers[addr]
	s.mu.Unlock()
	if p != nil && p.out != nil && p.out.movable && !p.out.dead.Load() {
		s.move(p.out, now)
	}
	if p != nil && p.holds(now) && s.passes(p) {
		s.mu.Lock()
		p.last = now
		s.idle.MoveToBack(p.place)
		s.mu.Unlock()
		return p
	}
	if p != nil {
		s.end(p, flow.Closed)
	}
	s.makeRoom()
	p = s.newPeer(ctx, d, now)
	s.mu.Lock()
	p.last = now
	p.place = s.idle.PushBack(p)
	s.peers[addr] = p
	s.mu.Unlock()
	return p
}

// holds says whether what was decided about a peer still stands.
func (p *peer) holds(now time.Time) bool {
	if p.held != nil {
		return true
	}
	if p.out == nil {
		return now.Before(p.until)
	}
	return !p.out.dead.Load()
}

// passes says whether the guard still lets a peer pass, and its socket can still
// send. Both are asked again when the answer may be another one; why it is, the
// flow says that comes after.
func (s *source) passes(p *peer) bool {
	guard := s.r.opts.Guard
	version := guard.Version()
	if p.out == nil || p.judged == version {
		return true
	}
	p.judged = version
	if local := p.out.conn.Local; local.IsValid() && !guard.Has(local) {
		s.drop(p.out, errAddressGone)
		return false
	}
	return s.r.aside(func() error { return guard.Judge(p.e.flow, dialer.Leaves(p.out.key.outbound)) }) == nil
}

// errAddressGone: of IPv4 such a socket says that there is no route, as it does for
// other reasons, too; of IPv6 it sends on, and nothing comes back.
var errAddressGone = errors.New("this machine has lost the address of the socket")

// newPeer makes a flow, asks the rules, and opens a socket where there is none.
func (s *source) newPeer(ctx context.Context, d *flow.Datagram, now time.Time) *peer {
	addr := d.Peer
	src := s.client.Flow()
	f := flow.New(src.Proto, src.Src, addr, src.Attachment)
	s.r.livePeers.Add(1)
	p := &peer{addr: addr, e: s.r.begin(f)}
	settled := false
	defer func() {
		if !settled { // a panic goes through here: nobody else knows p yet
			s.r.livePeers.Add(-1)
			p.e.end(flow.Unknown)
		}
	}()
	s.lookUpOwner(ctx, f, now)
	facts := p.e.facts(s.owner)
	if verdict, outbound, missing := s.r.match(facts); missing == 0 {
		s.settle(ctx, p, facts, "", verdict, outbound, now)
	} else {
		p.held, p.since = []flow.Datagram{}, now
	}
	settled = true
	return p
}

// settle carries out what is decided about a new peer.
func (s *source) settle(ctx context.Context, p *peer, facts *rules.Facts, from string, verdict rules.Verdict, outbound out, now time.Time) {
	f := p.e.flow
	p.e.decided(verdict, facts, from)
	if outbound.Outbound == nil {
		p.refuse(s.r, verdict, now)
		if facts.Owner != nil && facts.Owner.Lost {
			p.until = now.Add(ownerFor) // the next one may be known
		}
		return
	}
	p.judged = s.r.opts.Guard.Version()
	if err := s.r.judge(p.e, outbound.leaves); err != nil {
		p.tell, p.until = refusalOf(f.Proto), now.Add(refusedFor)
		p.e.end(flow.ReasonOf(err))
		return
	}
	began := time.Now()
	out, err := s.open(ctx, outbound.Outbound, p.e)
	if errors.Is(err, errors.ErrUnsupported) {
		p.notCarried(s.r, now)
		return
	}
	if err != nil {
		why := p.e.dialled(began, err)
		s.turnedAway = s.turnedAway || noPlace(err)
		p.tell, p.until = why, now.Add(failedFor)
		if f.Proto == flow.UDP && why != flow.Prohibited && why != flow.Canceled {
			// Without cgtun sendto(2) would fail. Of the ICMP errors every
			// socket hears of port-unreachable, and most of no other
			// (udp_err of net/ipv4/udp.c).
			p.tell = flow.Refused
		}
		p.e.end(why)
		return
	}
	p.out = out
	p.e.path(out.conn.Path)
}

func (s *source) lookUpOwner(ctx context.Context, f *flow.Flow, now time.Time) {
	if now.Sub(s.ownedAt) > ownerFor {
		s.owner, s.ownedAt = s.r.owner(ctx, f), now
	}
}

// refuse ends the flow of a peer that the rules give no outbound.
func (p *peer) refuse(r *Router, v rules.Verdict, now time.Time) {
	tell, why := r.refusal(v, p.e.flow.Proto)
	p.tell, p.until = tell, now.Add(refusedFor)
	p.e.end(why)
}

// notCarried ends the flow of a peer whose outbound cannot carry such datagrams:
// the client is told at once, and no failure of the outbound's is counted.
func (p *peer) notCarried(r *Router, now time.Time) {
	r.counts.refused.Add(1)
	p.tell, p.until = flow.Refused, now.Add(refusedFor)
	if p.e.flow.Proto == flow.ICMP {
		p.tell = flow.Prohibited
	}
	p.e.end(p.tell)
}

// seen counts what came back.
func (s *source) seen(dgs []flow.Datagram) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	var p *peer
	for i := range dgs {
		if p == nil || p.addr != dgs[i].Peer {
			if p = s.peers[dgs[i].Peer]; p == nil {
				continue
			}
			p.last, p.wrong = now, 0
			s.idle.MoveToBack(p.place)
		}
		p.e.down.Add(int64(len(dgs[i].Data)))
	}
}

// failed tells the client what became of its datagrams to one peer, if it sent
// any: a made-up error is not passed on.
func (s *source) failed(e *flow.PeerError) {
	why := e.FlowReason()
	s.mu.Lock()
	p := s.peers[e.Peer]
	if p != nil && p.out != nil {
		p.wrong = why
	}
	s.mu.Unlock()
	if p != nil {
		s.unreachable(e.Peer, why, e.ICMP)
	}
}

// unreachable tells the client. An error means that its device has gone, which
// the next read says too.
func (s *source) unreachable(peer netip.AddrPort, why flow.Reason, said *flow.ICMPError) {
	_ = s.client.Unreachable(peer, why, said)
}

// makeRoom ends the longest silent peer where one more would be too many.
func (s *source) makeRoom() {
	s.mu.Lock()
	n := s.idle.Len()
	var victim *peer
	if n >= s.o.PeersPerSource || (n > 0 && s.r.livePeers.Load() >= int64(s.o.Peers)) {
		victim = s.idle.Front().Value.(*peer)
	}
	s.mu.Unlock()
	if victim != nil {
		s.r.counts.peersEvicted.Add(1)
		s.end(victim, flow.Closed)
	}
}

// sweep ends the flows that have been silent for too long, and forgets refusals.
func (s *source) sweep(now time.Time) {
	if now.Sub(s.swept) < sweepEvery {
		return
	}
	s.swept = now
	for {
		s.mu.Lock()
		front := s.idle.Front()
		s.mu.Unlock()
		if front == nil {
			return
		}
		p := front.Value.(*peer)
		s.mu.Lock()
		silent := now.Sub(p.last)
		s.mu.Unlock()
		if silent < s.o.Idle {
			return
		}
		s.end(p, flow.Closed)
	}
}

// end takes a peer out of the source and ends its flow. A failure that nothing
// came after is the reason.
func (s *source) end(p *peer, why flow.Reason) {
	s.mu.Lock()
	if s.peers[p.addr] != p {
		s.mu.Unlock()
		return
	}
	delete(s.peers, p.addr)
	s.idle.Remove(p.place)
	if p.wrong != 0 && why == flow.Closed {
		why = p.wrong
	}
	s.mu.Unlock()
	s.r.livePeers.Add(-1)
	p.e.end(why)
}

// close ends everything of the source and waits for it.
func (s *source) close(why flow.Reason) {
	s.client.Close()
	s.mu.Lock()
	outs := make([]*packetOut, 0, len(s.outs))
	for _, out := range s.outs {
		outs = append(outs, out)
	}
	peers := make([]*peer, 0, len(s.peers))
	for _, p := range s.peers {
		peers = append(peers, p)
	}
	s.mu.Unlock()
	for _, out := range outs {
		s.drop(out, nil)
	}
	s.back.Wait()
	for _, p := range peers {
		s.end(p, why)
	}
}
