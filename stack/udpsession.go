package stack

import (
	"container/list"
	"encoding/binary"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"

	"cgtun/flow"
	"cgtun/tun"
)

// item is one entry of a session's queue. It owns its buffer.
type item struct {
	flow.Datagram // its Data is of buf
	buf           *slab
}

// What became of an item.
type putResult uint8

const (
	putDone putResult = iota
	putFull
	putEnded
)

// keptQueue is how many empty places an idle session's queue may keep.
const keptQueue = 32

// session is one client source, as a flow.PacketConn. Its methods are safe for
// concurrent use, but for ReadBatch and ReadLent, of which one call at a time
// may run.
type session struct {
	u        *udp
	flow     *flow.Flow
	src      netip.AddrPort
	lastUsed atomic.Int64  // udp.now of the last datagram in either direction
	general  atomic.Bool   // something went to another port than DNS's
	answered atomic.Bool   // something came back
	echoSeq  atomic.Uint32 // of the last echo request
	probes   probes
	turn     turn

	// Guarded by u.mu.
	stamp           int64 // lastUsed as it was when the lists were ordered
	inAll, inSource *list.Element

	mu     sync.Mutex
	filled sync.Cond // the queue has something, or the session has ended
	queue  []item    // from head on
	head   int
	bytes  int // memory of the queue's buffers
	ended  bool

	lent []*slab // by ReadLent, until the next call
	read bool    // something, once
}

func newSession(u *udp, src netip.AddrPort) *session {
	s := &session{u: u, src: src, flow: flow.New(u.cfg.Proto, src, netip.AddrPort{}, u.cfg.Attachment)}
	s.filled.L = &s.mu
	return s
}

// put appends it to the queue. The item's buffer is the session's if it says
// putDone. head, if not nil, is remembered; see probes.
func (s *session) put(it item, head []byte) putResult {
	size := len(it.buf.data)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return putEnded
	}
	o := &s.u.cfg.UDPOptions
	if len(s.queue)-s.head >= o.QueuePackets || s.bytes+size > o.QueueBytes ||
		s.u.queued.Load()+int64(size) > int64(o.TotalBytes) {
		return putFull
	}
	if s.u.cfg.Proto == flow.ICMP {
		s.echoSeq.Store(uint32(binary.BigEndian.Uint16(it.buf.data[6:])))
	}
	if it.Peer.Port() != dnsPort {
		s.general.Store(true)
	}
	if head != nil {
		s.probes.add(it.Peer, head)
	}
	if s.head > 0 && len(s.queue) == cap(s.queue) {
		// Reuse the places at the front instead of growing.
		n := copy(s.queue, s.queue[s.head:])
		clear(s.queue[n:])
		s.queue, s.head = s.queue[:n], 0
	}
	s.queue = append(s.queue, it)
	s.bytes += size
	s.u.queued.Add(int64(size))
	s.filled.Signal()
	return putDone
}

// take waits for the queue to have something and calls use with up to n items,
// oldest first.
func (s *session) take(n int, use func(i int, it item)) (int, error) {
	if s.read {
		s.turn.end()
	}
	s.read = true
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.head == len(s.queue) && !s.ended {
		s.filled.Wait()
	}
	if s.ended {
		return 0, io.EOF
	}
	n = min(n, len(s.queue)-s.head)
	freed := 0
	for i := range n {
		it := s.queue[s.head]
		s.queue[s.head] = item{}
		s.head++
		freed += len(it.buf.data)
		use(i, it)
	}
	s.bytes -= freed
	s.u.queued.Add(-int64(freed))
	if s.head == len(s.queue) {
		s.queue, s.head = s.queue[:0], 0
		if cap(s.queue) > keptQueue {
			s.queue = nil
		}
	}
	return n, nil
}

func (s *session) source() netip.Addr { return s.src.Addr() }

// begin is called with the table locked, or by the goroutine of another session.
func (s *session) begin() {
	s.u.handlers.Add(1)
	s.u.serving.Go(func() { s.u.serve(s) })
}

// Begun implements flow.PacketConn.
func (s *session) Begun() { s.turn.end() }

// Flow returns the source's flow. Its Dst is zero.
func (s *session) Flow() *flow.Flow { return s.flow }

// ReadBatch is as flow.PacketConn says. A datagram that is longer than its
// place is cut, as by recvmsg(2).
func (s *session) ReadBatch(dgs []flow.Datagram) (int, error) {
	return s.take(len(dgs), func(i int, it item) {
		data := dgs[i].Data
		dgs[i] = it.Datagram
		dgs[i].Data = data[:copy(data, it.Data)]
		it.buf.free()
	})
}

// ReadLent is ReadBatch with buffers of ours: what dgs had before does not
// matter, and what it gets may be used until the next call. So a session that
// waits holds no buffers, and nothing is copied.
func (s *session) ReadLent(dgs []flow.Datagram) (int, error) {
	for i, b := range s.lent {
		b.free()
		s.lent[i] = nil
	}
	s.lent = s.lent[:0]
	return s.take(len(dgs), func(i int, it item) {
		dgs[i] = it.Datagram
		s.lent = append(s.lent, it.buf)
	})
}

// Close ends the session: reads say io.EOF, what waits is dropped, and the next
// datagram of the source opens a new one.
func (s *session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil
	}
	s.ended = true
	for _, it := range s.queue[s.head:] {
		it.buf.free()
	}
	s.u.queued.Add(-int64(s.bytes))
	s.queue, s.head, s.bytes = nil, 0, 0
	s.filled.Broadcast()
	return nil
}

// Unreachable sends the ICMP error for a datagram from this source to peer. What
// is said to have happened is quoted with the datagram that it happened to; else
// one is made up: its addresses and ports are what the client's kernel finds the
// socket by (RFC 1122 §3.2.2 asks for no more than eight bytes of it).
func (s *session) Unreachable(peer netip.AddrPort, why flow.Reason, said *flow.ICMPError) error {
	if peer.Addr().Is4() != s.src.Addr().Is4() {
		return nil
	}
	if said != nil {
		if pkt, ok := icmpSaid(said, s.u.cfg.Own, s.quoted(peer, said)); ok {
			return s.sendICMP(pkt)
		}
	}
	if pkt, ok := icmpError(why, s.u.cfg.Own, s.offending(peer, nil)); ok {
		return s.sendICMP(pkt)
	}
	return nil
}

func (s *session) sendICMP(pkt []byte) error {
	if !s.u.icmp.Allow() {
		s.u.limited.Add(1)
		return nil
	}
	return s.u.cfg.Write(tun.Offload{}, [][]byte{pkt})
}
