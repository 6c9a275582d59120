package stack

import (
	"errors"
	"fmt"
	"os"

	gvbuffer "gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"cgtun/flow"
	"cgtun/tun"
)

// A packet is read into two pieces. The first holds all headers that anybody
// sends, and small packets whole. The second, bodySize, holds the rest of a
// large segment and comes from a ring; with less than minBody in it the rest is
// copied instead, so that a small packet never holds a large piece.
const (
	headSize = 2 << 10
	bodySize = 64 << 10
	minBody  = bodySize / 2
)

// maxFailures is how many reads may fail in a row before the device is given up.
const maxFailures = 100

// reader takes the packets of one queue.
type reader struct {
	s    *Stack
	q    Queue
	head *gvbuffer.View
	body ring
	bufs [2][]byte
	line []byte // a packet in one piece, for those who need that
}

func newReader(s *Stack, q Queue) *reader {
	r := &reader{s: s, q: q}
	r.newHead()
	r.bufs[1] = r.body.take().AsSlice()
	return r
}

func (r *reader) newHead() {
	r.head = gvbuffer.NewViewSize(headSize)
	r.bufs[0] = r.head.AsSlice()
}

// close gives the views back.
func (r *reader) close() {
	r.head.Release()
	r.body.close()
}

// run reads until the device ends or the deadline of Run's end has come; the
// latter is no error.
func (r *reader) run() error {
	failures := 0
	for {
		off, n, err := r.q.ReadPacket(r.bufs[:])
		switch {
		case err == nil:
			failures = 0
			r.packet(off, n)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case tun.IsEnd(err):
			return fmt.Errorf("read device: %w", err)
		default:
			r.s.count.unread.Add(1)
			if failures++; failures > maxFailures {
				return fmt.Errorf("read device: %d times in a row: %w", failures, err)
			}
		}
	}
}

// packet decides about one packet of n bytes, which lies in r.bufs.
func (r *reader) packet(off tun.Offload, n int) {
	c := &r.s.count
	first := r.bufs[0][:min(n, len(r.bufs[0]))]
	h, err := parseIP(first, n)
	switch {
	case errors.Is(err, errSum):
		c.badSum.Add(1)
		return
	case err != nil:
		c.malformed.Add(1)
		return
	}
	if !r.s.o.Local(h.src) {
		c.notLocal.Add(1)
		return
	}
	if !oneHost(h.dst) || !oneHost(h.src) || h.dst.IsLinkLocalUnicast() {
		c.multicast.Add(1)
		return
	}
	if h.ttl <= 1 {
		c.expired.Add(1)
		if pkt, ok := icmpExpired(r.s.own, r.inOnePiece(n)); ok {
			r.s.sendError(pkt)
		}
		return
	}
	if h.fragment && h.proto == protoTCP {
		r.s.fragments.take(h, r.inOnePiece(n))
		return
	}
	if h.fragment {
		r.deliver(h, n)
		return
	}
	switch h.proto {
	case protoTCP:
		switch {
		case !off.NeedsCsum && !off.DataValid && !transportSumOK(h, r.inOnePiece(n)):
			c.badSum.Add(1)
		case n > len(first) || !r.s.tcp.keep(h, first):
			r.deliver(h, n)
		}
	case protoUDP:
		r.s.udp.deliver(off, h, r.inOnePiece(n))
	case protoICMPv4, protoICMPv6:
		r.s.takeEcho(off, h, r.inOnePiece(n))
	default:
		c.otherProto.Add(1)
		if pkt, ok := icmpError(flow.Refused, r.s.own, r.inOnePiece(n)); ok {
			r.s.sendError(pkt)
		}
	}
}

// inOnePiece returns the packet that was read last, contiguous, until the next.
func (r *reader) inOnePiece(n int) []byte {
	if n <= len(r.bufs[0]) {
		return r.bufs[0][:n]
	}
	r.line = append(append(r.line[:0], r.bufs[0]...), r.bufs[1][:n-headSize]...)
	return r.line
}

// deliver gives the packet to netstack.
func (r *reader) deliver(h ipHeader, n int) {
	r.head.CapLength(n)
	whole := gvbuffer.MakeWithView(r.head)
	r.newHead()
	switch rest := n - headSize; {
	case rest >= minBody:
		v := r.body.lend()
		v.CapLength(rest)
		_ = whole.Append(v)
		r.bufs[1] = r.body.take().AsSlice()
	case rest > 0:
		_ = whole.Append(gvbuffer.NewViewWithData(r.bufs[1][:rest]))
	}
	proto := tcpip.NetworkProtocolNumber(header.IPv4ProtocolNumber)
	if h.src.Is6() {
		proto = header.IPv6ProtocolNumber
	}
	pkt := gvstack.NewPacketBuffer(gvstack.PacketBufferOptions{Payload: whole})
	r.s.link.to.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// sendError sends an ICMP error if the rate allows it.
func (s *Stack) sendError(pkt []byte) {
	if !s.tcp.errors.Allow() {
		s.count.limited.Add(1)
		return
	}
	if err := s.link.write(tun.Offload{}, [][]byte{pkt}); err != nil {
		s.count.unwritten.Add(1)
	}
}
