package stack

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
	"cgtun/tun"
)

// UDP, theory of operation.
//
// Datagrams are taken in the read loop, before netstack, because only there the
// virtio header says whether a packet is one datagram or a train of joined ones
// (USO). Fragments go through netstack's reassembly and come back by
// deliverReassembled. Netstack has no UDP endpoint.
//
// A session is one client address and port, whatever its peers (RFC 4787 §4.1);
// what an outbound brings back for it is written into the tun by hand, from
// whatever peer it is (§5). It begins with its first datagram, runs the
// handler's ServePackets in a goroutine, and ends when that returns. It is ended
// from here (ReadBatch says io.EOF) when nothing has passed in either direction
// for the idle time, which is shorter where there are many, when it is the longest
// idle one and room is needed, and when run ends.
//
// Datagrams wait for the handler in the session's queue, bounded in number and
// bytes, with a bound over all queues. A full queue drops the newest: a sender
// that is too fast loses what a too small socket buffer would lose.

// UDPOptions bound the datagram side of a stack. Zero values mean the defaults.
type UDPOptions struct {
	// Sessions is how many client sources are kept; beyond it the longest
	// idle one goes. Default 4,096: each may hold two outbound sockets.
	Sessions int
	// SessionsPerSource is the same for one source address. Default three
	// quarters of Sessions.
	SessionsPerSource int
	// QueuePackets and QueueBytes bound what waits in one session: reads of
	// the tun, each with one datagram or joined ones, and the memory that
	// they are in. Defaults 2,048 and 4 MiB.
	QueuePackets, QueueBytes int
	// TotalBytes bounds the memory of all queues together. Default 32 MiB.
	TotalBytes int
	// Idle ends a session. RFC 4787 §4.3 wants 2 minutes at least, and 5 is
	// its advice and the default.
	Idle time.Duration
	// IdleDNS ends a session that has only ever asked port 53. Default 30 s,
	// beyond the retries of resolvers.
	IdleDNS time.Duration
	// IdleMany ends those that nobody has answered where there are more than a
	// 64th of Sessions, and the longest idle ones where there are more than an
	// eighth, so that what a flood leaves goes soon. Default 30 s.
	IdleMany time.Duration
	// Left says which of these sources have no socket any more: where there are
	// more than a 64th of Sessions, theirs end after IdleMany, too. It may take a
	// while. Nil: nobody knows.
	Left func(sources []netip.AddrPort) []netip.AddrPort
	// ICMPRate is how many ICMP errors a second are sent. Default 1,000.
	ICMPRate int
}

func (o *UDPOptions) setDefaults() {
	o.Sessions = orDefault(o.Sessions, 4096)
	o.SessionsPerSource = orDefault(o.SessionsPerSource, max(1, o.Sessions/4*3))
	o.QueuePackets = orDefault(o.QueuePackets, 2048)
	o.QueueBytes = orDefault(o.QueueBytes, 4<<20)
	o.TotalBytes = orDefault(o.TotalBytes, 32<<20)
	o.Idle = orDefault(o.Idle, 5*time.Minute)
	o.IdleDNS = orDefault(o.IdleDNS, 30*time.Second)
	o.IdleMany = orDefault(o.IdleMany, 30*time.Second)
	o.ICMPRate = orDefault(o.ICMPRate, 1000)
}

func orDefault[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// UDPCounters say what became of datagrams that no session took, and of
// sessions. All but Sessions only grow.
type UDPCounters struct {
	Sessions  int    // live now
	Opened    uint64 // sessions ever
	Evicted   uint64 // sessions ended for room
	Malformed uint64 // packets with impossible headers, or to nobody in particular
	BadSum    uint64 // packets of raw sockets with a wrong checksum
	QueueFull uint64 // reads dropped because nobody took those before, or no session could be
	Unwritten uint64 // datagrams that the tun did not take
	ICMPLimit uint64 // ICMP errors not sent because of the rate
}

const (
	sweepEvery = 5 * time.Second
	// secondChances bounds how many sessions are looked at to find one that
	// is really idle; see idlest.
	secondChances = 16
	dnsPort       = 53
)

// udpConfig is what a udp is made of.
type udpConfig struct {
	UDPOptions
	Proto      flow.Proto // UDP, or ICMP for echo
	Attachment string
	Own        ownAddresses
	Handler    flow.Handler
	// Tight says that there is no memory for more sessions than there are. Nil:
	// there always is.
	Tight func() bool
	// Write puts one packet, in pieces, into the tun. Safe for concurrent
	// use; keeps nothing.
	Write func(tun.Offload, [][]byte) error
}

// udp is the datagram side of a stack. deliver and deliverReassembled may be
// called from several read loops at once.
type udp struct {
	cfg   udpConfig
	began time.Time // what lastUsed counts from
	icmp  *rate.Limiter

	queued   atomic.Int64 // bytes in all queues
	handlers atomic.Int64 // of sessions, also of those that have ended and are not gone yet
	noJoin   atomic.Bool  // this kernel's tun does not take joined datagrams
	opened   atomic.Uint64
	evicted  atomic.Uint64
	bad      atomic.Uint64
	badSum   atomic.Uint64
	full     atomic.Uint64
	lost     atomic.Uint64
	limited  atomic.Uint64

	mu       sync.Mutex
	sessions map[netip.AddrPort]*session
	idle     *list.List                // of *session, by stamp, the oldest first
	sources  map[netip.Addr]*list.List // the same for each source address
	serve    func(*session)            // nil before run
	waiting  []*session                // opened before run
	turns    *turns
	ended    bool

	serving sync.WaitGroup // goroutines in ServePackets
}

func newUDP(cfg udpConfig) *udp {
	cfg.setDefaults()
	return &udp{
		cfg:      cfg,
		began:    time.Now(),
		icmp:     rate.NewLimiter(rate.Limit(cfg.ICMPRate), max(1, cfg.ICMPRate/5)),
		sessions: make(map[netip.AddrPort]*session),
		idle:     list.New(),
		sources:  make(map[netip.Addr]*list.List),
		turns:    newTurns(),
	}
}

// run serves the sessions until ctx ends, and returns when the last handler
// has.
func (u *udp) run(ctx context.Context) error {
	u.mu.Lock()
	u.serve = func(s *session) {
		defer s.turn.end()
		u.cfg.Handler.ServePackets(ctx, s)
		s.Close()
		u.forget(s)
		u.handlers.Add(-1)
	}
	for _, s := range u.waiting {
		u.askLocked(s)
	}
	u.waiting = nil
	u.mu.Unlock()

	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			u.sweep()
			continue
		case <-ctx.Done():
		}
		break
	}
	u.mu.Lock()
	u.ended = true
	for _, s := range u.sessions {
		s.turn.leave()
		s.Close()
	}
	u.mu.Unlock()
	u.serving.Wait()
	return ctx.Err()
}

// deliver takes one packet of UDP as it was read from the tun, whole and in one
// piece, with its header. It keeps nothing of it.
func (u *udp) deliver(off tun.Offload, h ipHeader, pkt []byte) {
	if h.end-h.off < header.UDPMinimumSize {
		u.bad.Add(1)
		return
	}
	seg := header.UDP(pkt[h.off:h.end])
	length := int(seg.Length())
	joined := off.GSOType == tun.GSOUDPL4
	if length < header.UDPMinimumSize || length > len(seg) || (off.GSOType != tun.GSONone && (!joined || off.GSOSize == 0)) {
		u.bad.Add(1)
		return
	}
	if !off.NeedsCsum && !off.DataValid && !transportSumOK(h, pkt) {
		u.badSum.Add(1)
		return
	}
	payload := seg[header.UDPMinimumSize:length]
	segment := 0
	if joined && int(off.GSOSize) < len(payload) {
		segment = int(off.GSOSize)
	}
	src := netip.AddrPortFrom(h.src, seg.SourcePort())
	dst := netip.AddrPortFrom(h.dst, seg.DestinationPort())
	d := flow.Datagram{Peer: dst, Data: payload, Segment: segment, TTL: h.ttl - 1, DontFragment: h.whole}
	u.take(src, d, headOf(h, pkt))
}

// deliverReassembled takes a datagram that came in fragments. It keeps nothing
// of payload.
func (u *udp) deliverReassembled(src, dst netip.AddrPort, ttl uint8, payload []byte) {
	u.take(src, flow.Datagram{Peer: dst, Data: payload, TTL: ttl - 1}, nil)
}

// take puts a datagram into the queue of its session. head is as headOf says.
func (u *udp) take(src netip.AddrPort, d flow.Datagram, head []byte) {
	dst, payload := d.Peer, d.Data
	if u.cfg.Proto == flow.UDP && (src.Port() == 0 || dst.Port() == 0) || !oneHost(src.Addr()) ||
		!oneHost(dst.Addr()) || len(payload) > slabSizes[len(slabSizes)-1] {
		u.bad.Add(1)
		return
	}
	buf := getSlab(len(payload))
	d.Data = buf.data[:copy(buf.data, payload)]
	it := item{Datagram: d, buf: buf}
	now := u.now()
	// A session may end between finding and filling it; its successor is new
	// and does not.
	for range 2 {
		s := u.session(src, now)
		if s == nil {
			break
		}
		s.lastUsed.Store(now)
		switch s.put(it, head) {
		case putDone:
			return
		case putFull:
			u.full.Add(1)
			buf.free()
			return
		}
		u.forget(s)
	}
	buf.free()
}

// now is the time since the stack began, in nanoseconds.
func (u *udp) now() int64 { return int64(time.Since(u.began)) }

// session finds or opens the session of src. Nil: there can be none now.
func (u *udp) session(src netip.AddrPort, now int64) *session {
	u.mu.Lock()
	defer u.mu.Unlock()
	if s := u.sessions[src]; s != nil {
		return s
	}
	if u.ended {
		return nil
	}
	if u.handlers.Load() >= int64(u.cfg.Sessions+max(u.cfg.Sessions/2, 16)) {
		u.full.Add(1) // they come faster than the old ones go
		return nil
	}
	own := u.sources[src.Addr()]
	if own != nil && own.Len() >= u.cfg.SessionsPerSource {
		u.evictLocked(own)
	} else if len(u.sessions) >= u.mostLocked() {
		u.evictLocked(u.idle)
	}
	if own = u.sources[src.Addr()]; own == nil { // the eviction may have taken the list
		own = list.New()
		u.sources[src.Addr()] = own
	}
	s := newSession(u, src)
	s.stamp = now
	s.inAll, s.inSource = u.idle.PushBack(s), own.PushBack(s)
	u.sessions[src] = s
	u.opened.Add(1)
	if u.serve == nil {
		u.waiting = append(u.waiting, s)
		return s
	}
	u.askLocked(s)
	return s
}

// askLocked has a session begin when it is its turn.
func (u *udp) askLocked(s *session) {
	if b := u.turns.ask(&s.turn, s); b != nil {
		gone := b.(*session)
		u.evicted.Add(1)
		gone.Close()
		u.forgetLocked(gone)
	}
}

// mostLocked is how many sessions there may be: as many as there are, if they are
// many and memory is short.
func (u *udp) mostLocked() int {
	if u.cfg.Tight != nil && u.cfg.Tight() {
		return min(max(len(u.sessions), u.cfg.Sessions/8), u.cfg.Sessions)
	}
	return u.cfg.Sessions
}

// evictLocked ends the longest idle session of l.
func (u *udp) evictLocked(l *list.List) {
	s := u.idlestLocked(l)
	u.evicted.Add(1)
	s.Close()
	u.forgetLocked(s)
}

// idlestLocked finds the longest idle session of l. Passing datagrams only
// leave their time in lastUsed, so the lists are in the order of a time that
// may be old: who has been used since gets its new place here. When all that
// are looked at have, the first one it is.
func (u *udp) idlestLocked(l *list.List) *session {
	for range secondChances {
		s := l.Front().Value.(*session)
		if !u.restampLocked(s) {
			return s
		}
	}
	return l.Front().Value.(*session)
}

// restampLocked moves a session that was used since its stamp to its new place.
func (u *udp) restampLocked(s *session) bool {
	last := s.lastUsed.Load()
	if last <= s.stamp {
		return false
	}
	s.stamp = last
	u.idle.MoveToBack(s.inAll)
	u.sources[s.src.Addr()].MoveToBack(s.inSource)
	return true
}

// forget takes an ended session out of the table, if it is there.
func (u *udp) forget(s *session) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.forgetLocked(s)
}

func (u *udp) forgetLocked(s *session) {
	if u.sessions[s.src] != s {
		return
	}
	delete(u.sessions, s.src)
	s.turn.leave()
	u.idle.Remove(s.inAll)
	own := u.sources[s.src.Addr()]
	own.Remove(s.inSource)
	if own.Len() == 0 {
		delete(u.sources, s.src.Addr())
	}
}

// sweep ends the sessions that have been idle for too long.
func (u *udp) sweep() {
	gone := u.overdue(u.now())
	gone = append(gone, u.left()...)
	endAll(gone, func(s *session) { s.Close() })
}

// left takes out sessions that nobody can use any more, where there are many.
func (u *udp) left() (gone []*session) {
	if u.cfg.Left == nil {
		return nil
	}
	var idle []netip.AddrPort
	u.mu.Lock()
	since := u.now() - int64(u.cfg.IdleMany)
	if len(u.sessions) > u.cfg.Sessions/64 {
		for src, s := range u.sessions {
			if s.lastUsed.Load() <= since {
				idle = append(idle, src)
			}
		}
	}
	u.mu.Unlock()
	if len(idle) == 0 {
		return nil
	}
	left := u.cfg.Left(idle)
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, src := range left {
		if s := u.sessions[src]; s != nil && s.lastUsed.Load() <= since {
			gone = append(gone, s)
			u.forgetLocked(s)
		}
	}
	return gone
}

// overdue takes out those sessions.
func (u *udp) overdue(now int64) (gone []*session) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, s := range u.sessions {
		limit := u.cfg.Idle
		switch {
		case !s.general.Load():
			limit = u.cfg.IdleDNS
		case !s.answered.Load() && len(u.sessions) > u.cfg.Sessions/64:
			limit = min(limit, u.cfg.IdleMany)
		}
		if now-s.lastUsed.Load() >= int64(limit) {
			gone = append(gone, s)
			u.forgetLocked(s)
		}
	}
	for len(u.sessions) > u.cfg.Sessions/8 {
		s := u.idle.Front().Value.(*session)
		if u.restampLocked(s) {
			continue
		}
		if now-s.stamp < int64(u.cfg.IdleMany) {
			break
		}
		gone = append(gone, s)
		u.forgetLocked(s)
	}
	return gone
}

// counters returns what has been counted so far.
func (u *udp) counters() UDPCounters {
	u.mu.Lock()
	live := len(u.sessions)
	u.mu.Unlock()
	return UDPCounters{
		Sessions:  live,
		Opened:    u.opened.Load(),
		Evicted:   u.evicted.Load(),
		Malformed: u.bad.Load(),
		BadSum:    u.badSum.Load(),
		QueueFull: u.full.Load(),
		Unwritten: u.lost.Load(),
		ICMPLimit: u.limited.Load(),
	}
}
