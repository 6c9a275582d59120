package stack

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
	"cgtun/tun"
)

const (
	udpSumOffset = 6 // of the checksum in a UDP header
	// maxJoined bounds the datagrams of one packet into the tun: a queue
	// writes up to 62 pieces without copying, and the kernel, which cuts the
	// packet up again, takes 64.
	maxJoined = 61
	// The largest payload: 65,535 bytes less the headers that the IP length
	// counts.
	maxPayload4 = 65535 - header.IPv4MinimumSize - header.UDPMinimumSize
	maxPayload6 = 65535 - header.UDPMinimumSize
)

// udpWriter is the scratch space of one WriteBatch.
type udpWriter struct {
	header [header.IPv6MinimumSize + header.UDPMinimumSize]byte
	pieces [1 + maxJoined][]byte // the header, then the payloads
}

var udpWriters = sync.Pool{New: func() any { return new(udpWriter) }}

// WriteBatch is as flow.PacketConn says. Datagrams that the tun does not take
// are lost, and counted, as a full socket buffer loses them; the error is for a
// device that has gone. A datagram of any size goes as one packet, larger than
// the MTU if need be: it is for a socket of this namespace.
func (s *session) WriteBatch(dgs []flow.Datagram) (int, error) {
	w := udpWriters.Get().(*udpWriter)
	defer udpWriters.Put(w)
	defer clear(w.pieces[:])
	s.lastUsed.Store(s.u.now())
	s.answered.Store(true)
	limit := maxPayload4
	if s.src.Addr().Is6() {
		limit = maxPayload6
	}
	for i := 0; i < len(dgs); {
		n := 1
		if s.u.cfg.Proto == flow.UDP && !s.u.noJoin.Load() {
			n = joinable(dgs[i:], limit)
		}
		err := s.writeJoined(w, dgs[i:i+n], limit)
		switch {
		case err == nil:
		case tun.IsEnd(err):
			return i, err
		default:
			s.u.lost.Add(uint64(n))
		}
		i += n
	}
	return len(dgs), nil
}

// joinable counts the datagrams at the front that can share a packet: to one
// peer, with one TTL, all as long as the first but for the last, which may be shorter.
func joinable(dgs []flow.Datagram, limit int) int {
	first := &dgs[0]
	size := len(first.Data)
	if first.Segment != 0 || size == 0 {
		return 1
	}
	total := size
	for n := 1; n < min(len(dgs), maxJoined); n++ {
		next := &dgs[n]
		length := len(next.Data)
		total += length
		if next.Segment != 0 || next.Peer != first.Peer || next.TTL != first.TTL || length == 0 || length > size || total > limit {
			return n
		}
		if length < size {
			return n + 1
		}
	}
	return min(len(dgs), maxJoined)
}

// writeJoined writes datagrams of one peer as one packet, and one by one where
// the kernel refuses that.
func (s *session) writeJoined(w *udpWriter, dgs []flow.Datagram, limit int) error {
	if s.u.cfg.Proto == flow.ICMP {
		return s.writeEcho(dgs[0])
	}
	segment := dgs[0].Segment
	if len(dgs) > 1 {
		segment = len(dgs[0].Data)
	}
	if segment == 0 || (len(dgs) == 1 && len(dgs[0].Data) <= segment) {
		return s.writePacket(w, dgs, 0, limit)
	}
	if !s.u.noJoin.Load() {
		err := s.writePacket(w, dgs, segment, limit)
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
		// Kernels before 6.2 know no such packets in a tun.
		s.u.noJoin.Store(true)
	}
	var failed error
	for _, d := range dgs {
		for rest := d.Data; len(rest) > 0; {
			n := min(segment, len(rest))
			one := [1]flow.Datagram{{Peer: d.Peer, Data: rest[:n], TTL: d.TTL}}
			if err := s.writePacket(w, one[:], 0, limit); err != nil {
				failed = err
			}
			rest = rest[n:]
		}
	}
	return failed
}

// writePacket writes the payloads of dgs behind one header. segment, if not 0,
// is the size of the datagrams that it stands for. The kernel finishes the
// checksums.
func (s *session) writePacket(w *udpWriter, dgs []flow.Datagram, segment, limit int) error {
	peer, client := dgs[0].Peer, s.src
	length := header.UDPMinimumSize
	pieces := w.pieces[:1]
	for _, d := range dgs {
		length += len(d.Data)
		if len(d.Data) > 0 {
			pieces = append(pieces, d.Data)
		}
	}
	if length-header.UDPMinimumSize > limit || peer.Addr().Is4() != client.Addr().Is4() {
		return unix.EMSGSIZE
	}
	n := putIP(w.header[:], protoUDP, dgs[0].TTL, peer.Addr(), client.Addr(), length)
	header.UDP(w.header[n:]).Encode(&header.UDPFields{
		SrcPort:  peer.Port(),
		DstPort:  client.Port(),
		Length:   uint16(length),
		Checksum: pseudoSum(protoUDP, peer.Addr(), client.Addr(), length),
	})
	off := tun.Offload{NeedsCsum: true, CsumStart: uint16(n), CsumOffset: udpSumOffset}
	n += header.UDPMinimumSize
	if segment != 0 {
		off.GSOType, off.GSOSize, off.HdrLen = tun.GSOUDPL4, uint16(segment), uint16(n)
	}
	pieces[0] = w.header[:n]
	return s.u.cfg.Write(off, pieces)
}
