package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The protocol numbers that the read loop and the ICMP errors tell apart.
const (
	protoHopByHop = 0
	protoICMPv4   = 1
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoICMPv6   = 58
	protoDestOpts = 60
)

// maxExtensions bounds the IPv6 extension headers that are walked. RFC 8200
// §4.1 has at most six in an ordinary packet.
const maxExtensions = 8

var (
	errShort      = errors.New("packet shorter than its headers say")
	errVersion    = errors.New("neither IPv4 nor IPv6")
	errExtensions = errors.New("malformed or too many IPv6 extension headers")
	errSum        = errors.New("wrong checksum")
)

// ipHeader is what an IP header says. It refers to no packet.
type ipHeader struct {
	src, dst netip.Addr
	proto    uint8 // of what begins at off, after all IPv6 extension headers
	fragment bool  // part of a datagram: only reassembly knows the rest
	later    bool  // a fragment, and not the first one: no transport header
	ttl      uint8 // or hop limit
	whole    bool  // nobody may cut it up: DF of IPv4, of IPv6 that nobody has
	named    int   // offset of the byte that holds proto (RFC 4443 §3.4)
	off      int   // where the transport header begins
	end      int   // where the packet ends, by its own account
}

// parseIP reads and checks the IP header of a packet of n bytes that begins with
// head: lengths, the IPv4 header's checksum, and a bounded chain of IPv6 extension
// headers, all of it within head. Bytes after end are allowed, as padding.
func parseIP(head []byte, n int) (ipHeader, error) {
	h, err := parseHeaders(head)
	if err != nil {
		return h, err
	}
	if h.end > n || h.off > h.end || h.off > len(head) {
		return h, errShort
	}
	if h.src.Is4() && checksum.Checksum(head[:h.off], 0) != 0xffff {
		return h, errSum
	}
	return h, nil
}

// parseHeaders reads the IP header of a packet that may have been cut off
// somewhere after it.
func parseHeaders(pkt []byte) (ipHeader, error) {
	if len(pkt) == 0 {
		return ipHeader{}, errShort
	}
	switch pkt[0] >> 4 {
	case 4:
		return parseIPv4(pkt)
	case 6:
		return parseIPv6(pkt)
	}
	return ipHeader{}, errVersion
}

func parseIPv4(pkt []byte) (ipHeader, error) {
	if len(pkt) < header.IPv4MinimumSize {
		return ipHeader{}, errShort
	}
	flags := binary.BigEndian.Uint16(pkt[6:])
	h := ipHeader{
		src:      netip.AddrFrom4([4]byte(pkt[12:16])),
		dst:      netip.AddrFrom4([4]byte(pkt[16:20])),
		proto:    pkt[9],
		fragment: flags&0x3fff != 0, // more fragments, or an offset
		later:    flags&0x1fff != 0,
		ttl:      pkt[8],
		whole:    flags&0x4000 != 0,
		named:    9,
		off:      int(pkt[0]&0x0f) * 4,
		end:      int(binary.BigEndian.Uint16(pkt[2:])),
	}
	if h.off < header.IPv4MinimumSize || h.off > len(pkt) {
		return h, errShort
	}
	return h, nil
}

func parseIPv6(pkt []byte) (ipHeader, error) {
	if len(pkt) < header.IPv6MinimumSize {
		return ipHeader{}, errShort
	}
	h := ipHeader{
		src:   netip.AddrFrom16([16]byte(pkt[8:24])),
		dst:   netip.AddrFrom16([16]byte(pkt[24:40])),
		proto: pkt[6],
		ttl:   pkt[7],
		whole: true,
		named: 6,
		off:   header.IPv6MinimumSize,
		end:   header.IPv6MinimumSize + int(binary.BigEndian.Uint16(pkt[4:])),
	}
	for range maxExtensions {
		switch h.proto {
		case protoHopByHop, protoRouting, protoDestOpts, protoFragment:
		default:
			return h, nil
		}
		if len(pkt) < h.off+8 || (h.proto == protoHopByHop && h.off != header.IPv6MinimumSize) {
			return h, errExtensions
		}
		if h.proto == protoFragment {
			h.fragment, h.whole = true, false
			h.later = binary.BigEndian.Uint16(pkt[h.off+2:])&^7 != 0
		}
		size := 8
		if h.proto != protoFragment {
			size += int(pkt[h.off+1]) * 8
		}
		h.proto, h.named = pkt[h.off], h.off
		h.off += size
		if h.off > len(pkt) {
			return h, errExtensions
		}
		if h.later {
			return h, nil // what follows is payload, whatever it looks like
		}
	}
	return h, errExtensions
}

// pseudoSum is the sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1): what
// a checksum field holds when the kernel is to add the rest.
func pseudoSum(proto uint8, src, dst netip.Addr, length int) uint16 {
	return header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(proto), gvAddr(src), gvAddr(dst), uint16(length))
}

// transportSumOK checks the TCP, UDP or ICMPv6 checksum of a packet that parseIP
// took and that is no fragment. The read loop asks for packets that carry
// neither NEEDS_CSUM nor DATA_VALID: those of raw sockets.
func transportSumOK(h ipHeader, pkt []byte) bool {
	segment := pkt[h.off:h.end]
	if h.proto == protoICMPv4 {
		return checksum.Checksum(segment, 0) == 0xffff
	}
	if h.proto == protoUDP {
		if len(segment) < header.UDPMinimumSize {
			return false
		}
		udp := header.UDP(segment)
		if h.src.Is4() && udp.Checksum() == 0 {
			return true // the sender made none, as RFC 768 lets it
		}
		if n := int(udp.Length()); n < len(segment) {
			segment = segment[:n] // the rest is padding
		}
	}
	return checksum.Checksum(segment, pseudoSum(h.proto, h.src, h.dst, len(segment))) == 0xffff
}

// gvAddr is a as gVisor writes addresses.
func gvAddr(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

// defaultTTL is that of packets of our own, and of those whose TTL nobody knows.
const defaultTTL = 64

// putIP writes an IPv4 or IPv6 header without options in front of length bytes
// of proto and returns its size. b must have room for 40 bytes. A ttl of 0 is the
// default.
func putIP(b []byte, proto, ttl uint8, src, dst netip.Addr, length int) int {
	if ttl == 0 {
		ttl = defaultTTL
	}
	if src.Is4() {
		ip := header.IPv4(b[:header.IPv4MinimumSize])
		ip.Encode(&header.IPv4Fields{
			TotalLength: uint16(header.IPv4MinimumSize + length),
			TTL:         ttl,
			Protocol:    proto,
			SrcAddr:     gvAddr(src),
			DstAddr:     gvAddr(dst),
		})
		ip.SetChecksum(^ip.CalculateChecksum())
		return header.IPv4MinimumSize
	}
	header.IPv6(b[:header.IPv6MinimumSize]).Encode(&header.IPv6Fields{
		PayloadLength:     uint16(length),
		TransportProtocol: tcpip.TransportProtocolNumber(proto),
		HopLimit:          ttl,
		SrcAddr:           gvAddr(src),
		DstAddr:           gvAddr(dst),
	})
	return header.IPv6MinimumSize
}
