package stack

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"cgtun/flow"
	"cgtun/tun"
)

// ICMP echo. Requests are the datagrams of a session: one for each source
// address and identifier (RFC 5508 §3.1), whatever its peers. They are taken in
// the read loop, fragments behind netstack's reassembly. Nothing is answered from
// here: replies are the outbound's. All other ICMP is dropped, errors within
// errors too.

const (
	echoHeaderSize = 8
	// echoIdle ends a session (RFC 5508 REQ-2: 60 s at least): each ping(8) is
	// one, and has a socket.
	echoIdle = time.Minute
	// maxEcho4 is the largest ICMPv4 message, and the smaller of the two.
	maxEcho4 = 65535 - header.IPv4MinimumSize
)

// takeEcho takes an ICMP packet that is no fragment. It keeps nothing of it.
func (s *Stack) takeEcho(off tun.Offload, h ipHeader, pkt []byte) {
	if !off.NeedsCsum && !off.DataValid && !transportSumOK(h, pkt) {
		s.count.badSum.Add(1)
		return
	}
	d := flow.Datagram{Data: pkt[h.off:h.end], TTL: h.ttl - 1, DontFragment: h.whole}
	s.takeRequest(h.src, h.dst, d, headOf(h, pkt))
}

// takeICMP is netstack's handler of ICMP, which it has reassembled and verified.
// It takes everything, so that netstack answers nothing.
func (s *Stack) takeICMP(id gvstack.TransportEndpointID, pkt *gvstack.PacketBuffer) bool {
	msg := append([]byte(nil), pkt.TransportHeader().Slice()...)
	msg = append(msg, pkt.Data().AsRange().ToSlice()...)
	src, dst := addrPort(id.RemoteAddress, 0).Addr(), addrPort(id.LocalAddress, 0).Addr()
	s.takeRequest(src, dst, flow.Datagram{Data: msg, TTL: ttlOf(pkt) - 1}, nil)
	return true
}

// takeRequest takes an ICMP message if it is an echo request.
func (s *Stack) takeRequest(src, dst netip.Addr, d flow.Datagram, head []byte) {
	request, _ := echoTypes(src)
	if len(d.Data) < echoHeaderSize || d.Data[0] != request || d.Data[1] != 0 {
		s.count.icmp.Add(1)
		return
	}
	d.Peer = netip.AddrPortFrom(dst, 0)
	s.echo.take(netip.AddrPortFrom(src, binary.BigEndian.Uint16(d.Data[4:])), d, head)
}

// echoTypes are the ICMP types of a's family.
func echoTypes(a netip.Addr) (request, reply uint8) {
	if a.Is4() {
		return uint8(header.ICMPv4Echo), uint8(header.ICMPv4EchoReply)
	}
	return uint8(header.ICMPv6EchoRequest), uint8(header.ICMPv6EchoReply)
}

// writeEcho writes a reply as if from its peer, with the client's identifier.
func (s *session) writeEcho(d flow.Datagram) error {
	client, peer := s.src.Addr(), d.Peer.Addr()
	_, reply := echoTypes(client)
	if peer.Is4() != client.Is4() || len(d.Data) < echoHeaderSize || len(d.Data) > maxEcho4 || d.Data[0] != reply {
		return unix.EINVAL
	}
	pkt := make([]byte, header.IPv6MinimumSize+len(d.Data))
	n := putIP(pkt, icmpOf(client), d.TTL, peer, client, len(d.Data))
	putEcho(pkt[n:], d.Data, peer, client, s.src.Port())
	return s.u.cfg.Write(tun.Offload{}, [][]byte{pkt[:n+len(d.Data)]})
}

// offendingEcho makes an echo request to peer of what the outbound sent, or of
// nothing, with the number of the last one.
func (s *session) offendingEcho(peer netip.Addr, msg []byte) []byte {
	client := s.src.Addr()
	request, _ := echoTypes(client)
	if len(msg) < echoHeaderSize || msg[0] != request {
		msg = []byte{echoHeaderSize - 1: 0}
		msg[0] = request
		binary.BigEndian.PutUint16(msg[6:], uint16(s.echoSeq.Load()))
	}
	pkt := make([]byte, header.IPv6MinimumSize+len(msg))
	n := putIP(pkt, icmpOf(client), 0, client, peer, len(msg))
	putEcho(pkt[n:], msg, client, peer, s.src.Port())
	return pkt[:n+len(msg)]
}

// putEcho writes msg with an identifier and the checksum that it has then.
func putEcho(b, msg []byte, src, dst netip.Addr, id uint16) {
	b = b[:copy(b, msg)]
	binary.BigEndian.PutUint16(b[2:], 0)
	binary.BigEndian.PutUint16(b[4:], id)
	var sum uint16
	if src.Is6() {
		sum = pseudoSum(protoICMPv6, src, dst, len(b))
	}
	binary.BigEndian.PutUint16(b[2:], ^checksum.Checksum(b, sum))
}

func icmpOf(a netip.Addr) uint8 {
	if a.Is4() {
		return protoICMPv4
	}
	return protoICMPv6
}
