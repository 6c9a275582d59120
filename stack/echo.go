package stack

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"cgtun/flow"
	"cgtun/tun"
)

// ICMP echo. Requests come from netstack, reassembled and verified, and are the
// datagrams of a session: one for each source address and identifier (RFC 5508
// §3.1), whatever its peers. Nothing is answered from here: replies are the
// outbound's. All other ICMP is dropped, errors within errors too.

const (
	echoHeaderSize = 8
	// maxEcho4 is the largest ICMPv4 message, and the smaller of the two.
	maxEcho4 = 65535 - header.IPv4MinimumSize
)

// takeICMP is netstack's handler of ICMP. It takes everything, so that netstack
// answers nothing.
func (s *Stack) takeICMP(id gvstack.TransportEndpointID, pkt *gvstack.PacketBuffer) bool {
	msg := append([]byte(nil), pkt.TransportHeader().Slice()...)
	msg = append(msg, pkt.Data().AsRange().ToSlice()...)
	src, dst := addrPort(id.RemoteAddress, 0), addrPort(id.LocalAddress, 0)
	request, _ := echoTypes(src.Addr())
	if len(msg) < echoHeaderSize || msg[0] != request || msg[1] != 0 {
		s.count.icmp.Add(1)
		return true
	}
	src = netip.AddrPortFrom(src.Addr(), binary.BigEndian.Uint16(msg[4:]))
	s.echo.take(src, dst, msg, 0)
	return true
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
	n := putIP(pkt, icmpOf(client), peer, client, len(d.Data))
	putEcho(pkt[n:], d.Data, peer, client, s.src.Port())
	return s.u.cfg.Write(tun.Offload{}, [][]byte{pkt[:n+len(d.Data)]})
}

// offendingEcho makes an echo request to peer, with the number of the last one.
func (s *session) offendingEcho(peer netip.Addr) []byte {
	client := s.src.Addr()
	request, _ := echoTypes(client)
	msg := [echoHeaderSize]byte{0: request}
	binary.BigEndian.PutUint16(msg[6:], uint16(s.echoSeq.Load()))
	pkt := make([]byte, header.IPv6MinimumSize+echoHeaderSize)
	n := putIP(pkt, icmpOf(client), client, peer, echoHeaderSize)
	putEcho(pkt[n:], msg[:], client, peer, s.src.Port())
	return pkt[:n+echoHeaderSize]
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
