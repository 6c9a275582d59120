package stack

import (
	"context"
	"sync"
	"time"

	gvbuffer "gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Two kinds of segments can come before netstack can make sense of them. They
// are kept for a moment, and given to it then.
//
// A SYN for ports whose last connection is about to end, but has not: its last
// ACK or RST lies in netstack's queue, or it is in TIME-WAIT. Netstack queues
// the SYN behind that, and resets or swallows it when the connection is gone,
// since only a listening endpoint could take it. So it waits here until the
// connection is gone (RFC 9293 §3.10.7.4 lets a new one follow at once). One
// that is in its place for longer than synKept is alive, and challenges the SYN
// as RFC 5961 §4 wants.
//
// A RST for a connection that Accept is about to get, from a client that has
// sent something already. Netstack hands no endpoint out that was reset before,
// and would throw away what the client knows to be received. So the RST waits
// until the handshake is over. That it follows data its sequence number says:
// one that only answers our SYN-ACK must pass, it ends the handshake.

const (
	synKept = 500 * time.Millisecond
	// synLook is how often the connections are looked at that SYNs wait for.
	// There is no event for their end: it is seen by who closed them, and by
	// the conn's queue, which is not ours any more.
	synLook = time.Millisecond
	// maxSYNs bounds the SYNs that wait.
	maxSYNs = 256
)

// reuse has the SYNs that wait for the end of the connection before them.
type reuse struct {
	t    *streams
	wake chan struct{}

	mu   sync.Mutex
	syns map[gvstack.TransportEndpointID]keptSYN
}

type keptSYN struct {
	pkt   []byte
	seq   uint32
	until time.Time
}

func newReuse(t *streams) *reuse {
	return &reuse{t: t, wake: make(chan struct{}, 1), syns: make(map[gvstack.TransportEndpointID]keptSYN)}
}

// keep says whether a segment, of which pkt is the whole packet, is kept. It is
// called by the readers for every one, and copies what it keeps.
func (t *streams) keep(h ipHeader, pkt []byte) bool {
	seg := header.TCP(pkt[h.off:])
	if len(seg) < header.TCPMinimumSize {
		return false
	}
	const judged = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagFin | header.TCPFlagRst
	flags := seg.Flags() & judged
	if flags&(header.TCPFlagSyn|header.TCPFlagRst) == 0 {
		return false
	}
	id := gvstack.TransportEndpointID{
		LocalAddress: gvAddr(h.dst), LocalPort: seg.DestinationPort(),
		RemoteAddress: gvAddr(h.src), RemotePort: seg.SourcePort(),
	}
	if flags == header.TCPFlagSyn {
		return t.reuse.keep(id, seg.SequenceNumber(), pkt)
	}
	return flags.Contains(header.TCPFlagRst) && t.keepReset(id, seg.SequenceNumber(), pkt)
}

// keepReset keeps a RST for the end of the handshake.
func (t *streams) keepReset(id gvstack.TransportEndpointID, seq uint32, pkt []byte) bool {
	t.table.mu.Lock()
	defer t.table.mu.Unlock()
	p := t.table.byID[id]
	if p == nil || p.phase != handshaking || p.conn != nil || p.err != nil || seq == p.seq+1 {
		return false
	}
	p.reset = append([]byte(nil), pkt...)
	return true
}

// keep keeps a SYN whose ports have a connection still.
func (r *reuse) keep(id gvstack.TransportEndpointID, seq uint32, pkt []byte) bool {
	if !r.taken(id, seq) {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	old, again := r.syns[id]
	if !again && len(r.syns) >= maxSYNs {
		r.t.s.count.lateSYN.Add(1)
		return false
	}
	if !again {
		old.until = time.Now().Add(synKept)
	}
	r.syns[id] = keptSYN{append([]byte(nil), pkt...), seq, old.until}
	select {
	case r.wake <- struct{}{}:
	default:
	}
	return true
}

// taken says whether another connection than the one that the SYN asks for has
// these ports.
func (r *reuse) taken(id gvstack.TransportEndpointID, seq uint32) bool {
	r.t.table.mu.Lock()
	p := r.t.table.byID[id]
	shaking := p != nil && p.phase == handshaking
	repeat := shaking && p.seq == seq
	r.t.table.mu.Unlock()
	if repeat {
		return false
	}
	return shaking || r.t.s.gv.FindTransportEndpoint(networkOf(id.RemoteAddress), tcp.ProtocolNumber, id, nicID) != nil
}

// run gives netstack the SYNs whose time has come, until ctx ends. Without any
// it sleeps.
func (r *reuse) run(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
			tick.Reset(synLook)
		case now := <-tick.C:
			if !r.look(now) {
				tick.Reset(time.Hour)
			}
		}
	}
}

// look returns whether SYNs are left that wait.
func (r *reuse) look(now time.Time) bool {
	var due []keptSYN
	r.mu.Lock()
	for id, syn := range r.syns {
		late := now.After(syn.until)
		if !late && r.taken(id, syn.seq) {
			continue
		}
		if late {
			r.t.s.count.lateSYN.Add(1)
		}
		delete(r.syns, id)
		due = append(due, syn)
	}
	left := len(r.syns) > 0
	r.mu.Unlock()
	for _, syn := range due {
		r.t.s.inject(syn.pkt)
	}
	return left
}

// inject gives netstack a packet that was kept. The packet is netstack's then.
func (s *Stack) inject(pkt []byte) {
	proto := tcpip.NetworkProtocolNumber(header.IPv4ProtocolNumber)
	if pkt[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	p := gvstack.NewPacketBuffer(gvstack.PacketBufferOptions{
		Payload: gvbuffer.MakeWithView(gvbuffer.NewViewWithData(pkt)),
	})
	s.link.to.DeliverNetworkPacket(proto, p)
	p.DecRef()
}

// networkOf is the network protocol of an address.
func networkOf(a tcpip.Address) tcpip.NetworkProtocolNumber {
	if a.Len() == header.IPv4AddressSize {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
