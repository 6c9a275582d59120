package stack

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
)

const (
	icmpHeaderSize = 8
	// An error quotes as much of the packet as fits into what every path
	// carries: RFC 1812 §4.3.2.3 for IPv4, RFC 4443 §2.4 (c) for IPv6.
	maxICMPv4 = 576
	maxICMPv6 = 1280
	// leastMTU is told when a datagram is too big for a path whose MTU nobody
	// named: the least that IPv6 has, and that IPv4 paths have in practice.
	leastMTU = 1280
)

// icmpMessage is the part of an ICMP error that differs.
type icmpMessage struct {
	kind, code uint8
	word       uint32 // the last four bytes of the header: MTU or pointer
}

// icmpError builds the ICMP error that tells the sender of orig why it failed: a
// whole IP packet, as if from orig's destination. orig begins with an IP header
// and may be cut off behind its transport header. False: none may be sent
// (RFC 1122 §3.2.2, RFC 4443 §2.4 (e): about ICMP errors, later fragments, and
// what was sent to or from more than one host), or the reason asks for silence
// or for a RST. The caller limits the rate.
func icmpError(reason flow.Reason, orig []byte) ([]byte, bool) {
	h, err := parseHeaders(orig)
	if err != nil || !answerable(h, orig) {
		return nil, false
	}
	m, ok := icmpFor(reason, h)
	if !ok {
		return nil, false
	}
	return buildICMP(m, h, orig), true
}

// icmpTooBig is icmpError for flow.TooBig on a path whose MTU is known.
func icmpTooBig(mtu int, orig []byte) ([]byte, bool) {
	h, err := parseHeaders(orig)
	if err != nil || !answerable(h, orig) {
		return nil, false
	}
	return buildICMP(tooBig(mtu, h), h, orig), true
}

// icmpFor maps a reason to a message. Refused is a RST for TCP and no ICMP;
// ICMP itself has no ports, so that a refused ping is prohibited; of other
// protocols nobody speaks, which has a message of its own.
func icmpFor(reason flow.Reason, h ipHeader) (icmpMessage, bool) {
	v4 := h.src.Is4()
	switch reason {
	case flow.Refused:
		switch {
		case h.proto == protoTCP:
			return icmpMessage{}, false
		case h.proto == protoICMPv4 || h.proto == protoICMPv6:
			return icmpFor(flow.Prohibited, h)
		case h.proto == protoUDP:
			return unreachable(v4, header.ICMPv4PortUnreachable, header.ICMPv6PortUnreachable), true
		case v4:
			return icmpMessage{kind: uint8(header.ICMPv4DstUnreachable), code: uint8(header.ICMPv4ProtoUnreachable)}, true
		}
		return icmpMessage{
			kind: uint8(header.ICMPv6ParamProblem),
			code: uint8(header.ICMPv6UnknownHeader),
			word: uint32(h.named),
		}, true
	case flow.HostUnreachable, flow.TimedOut, flow.Unknown:
		return unreachable(v4, header.ICMPv4HostUnreachable, header.ICMPv6AddressUnreachable), true
	case flow.NetUnreachable:
		return unreachable(v4, header.ICMPv4NetUnreachable, header.ICMPv6NetworkUnreachable), true
	case flow.Prohibited:
		return unreachable(v4, header.ICMPv4AdminProhibited, header.ICMPv6Prohibited), true
	case flow.TooBig:
		return tooBig(leastMTU, h), true
	}
	return icmpMessage{}, false
}

// unreachable picks the family's code of "destination unreachable".
func unreachable(v4 bool, code4 header.ICMPv4Code, code6 header.ICMPv6Code) icmpMessage {
	if v4 {
		return icmpMessage{kind: uint8(header.ICMPv4DstUnreachable), code: uint8(code4)}
	}
	return icmpMessage{kind: uint8(header.ICMPv6DstUnreachable), code: uint8(code6)}
}

// tooBig names mtu, within what the family allows (RFC 791: 68, RFC 8200: 1280).
func tooBig(mtu int, h ipHeader) icmpMessage {
	if h.src.Is4() {
		return icmpMessage{
			kind: uint8(header.ICMPv4DstUnreachable),
			code: uint8(header.ICMPv4FragmentationNeeded),
			word: uint32(min(max(mtu, 68), 65535)),
		}
	}
	return icmpMessage{kind: uint8(header.ICMPv6PacketTooBig), word: uint32(max(mtu, maxICMPv6))}
}

// answerable says whether an ICMP error about orig may be sent at all.
func answerable(h ipHeader, orig []byte) bool {
	if h.later || !oneHost(h.src) || !oneHost(h.dst) {
		return false
	}
	if h.proto != protoICMPv4 && h.proto != protoICMPv6 {
		return true
	}
	if len(orig) <= h.off {
		return false // the type decides, and it is not there
	}
	switch kind := orig[h.off]; {
	case h.src.Is4():
		// Everything but queries and their answers (RFC 792) may be an error.
		switch header.ICMPv4Type(kind) {
		case header.ICMPv4Echo, header.ICMPv4EchoReply, header.ICMPv4Timestamp, header.ICMPv4TimestampReply:
			return true
		}
		return false
	default:
		return kind >= 128 && header.ICMPv6Type(kind) != header.ICMPv6RedirectMsg
	}
}

// oneHost says whether a is the address of a single host that could get or send
// an answer.
func oneHost(a netip.Addr) bool {
	return !a.IsMulticast() && !a.IsUnspecified() && !a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// buildICMP writes the packet: IP header, ICMP header, and the beginning of
// orig.
func buildICMP(m icmpMessage, h ipHeader, orig []byte) []byte {
	proto, ipSize, most := uint8(protoICMPv4), header.IPv4MinimumSize, maxICMPv4
	if h.src.Is6() {
		proto, ipSize, most = protoICMPv6, header.IPv6MinimumSize, maxICMPv6
	}
	quote := orig[:min(len(orig), most-ipSize-icmpHeaderSize)]
	if h.end >= h.off && h.end < len(quote) {
		quote = quote[:h.end] // no padding
	}
	pkt := make([]byte, ipSize+icmpHeaderSize+len(quote))
	putIP(pkt, proto, h.dst, h.src, icmpHeaderSize+len(quote))

	body := pkt[ipSize:]
	body[0], body[1] = m.kind, m.code
	body[4], body[5], body[6], body[7] = byte(m.word>>24), byte(m.word>>16), byte(m.word>>8), byte(m.word)
	copy(body[icmpHeaderSize:], quote)
	var sum uint16
	if proto == protoICMPv6 {
		sum = pseudoSum(proto, h.dst, h.src, len(body))
	}
	sum = ^checksum.Checksum(body, sum)
	body[2], body[3] = byte(sum>>8), byte(sum)
	return pkt
}
