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
	ttl        uint8  // of the error; 0: the default
}

// icmpError builds the ICMP error that tells the sender of orig why it failed: a
// whole IP packet, from us, for nobody else has said it. orig begins with an IP header
// and may be cut off behind its transport header. False: none may be sent
// (RFC 1122 §3.2.2, RFC 4443 §2.4 (e): about ICMP errors, later fragments, and
// what was sent to or from more than one host), or the reason asks for silence
// or for a RST. The caller limits the rate.
func icmpError(reason flow.Reason, own ownAddresses, orig []byte) ([]byte, bool) {
	h, err := parseHeaders(orig)
	if err != nil || !answerable(h, orig) {
		return nil, false
	}
	m, ok := icmpFor(reason, h)
	if !ok {
		return nil, false
	}
	return buildICMP(m, own.of(h), h, orig), true
}

// icmpExpired is what a router says of a packet that may pass none any more.
func icmpExpired(own ownAddresses, orig []byte) ([]byte, bool) {
	h, err := parseHeaders(orig)
	if err != nil || !answerable(h, orig) {
		return nil, false
	}
	return buildICMP(timeExceeded(h.src.Is4()), own.of(h), h, orig), true
}

// icmpSaid repeats what somebody on the way has said of orig, as a router
// between them would pass it on; what the kernel here said comes from us. False:
// it is nothing that can be said of orig, or e is nil. orig is the caller's no
// more.
func icmpSaid(e *flow.ICMPError, own ownAddresses, orig []byte) ([]byte, bool) {
	if e == nil {
		return nil, false
	}
	h, err := parseHeaders(orig)
	if err != nil || !answerable(h, orig) {
		return nil, false
	}
	m, ok := messageOf(e, h)
	if !ok {
		return nil, false
	}
	if m == timeExceeded(h.src.Is4()) {
		expire(orig, h)
	}
	m.ttl = e.TTL
	from := e.From
	if !from.IsValid() || from.Is4() != h.src.Is4() || !oneHost(from) {
		from = own.of(h)
	}
	return buildICMP(m, from, h, orig), true
}

// messageOf is e as a message about a packet, if it is one of the errors that
// routers and hosts send (RFC 1812 §5.2.7, RFC 4443 §3).
func messageOf(e *flow.ICMPError, h ipHeader) (icmpMessage, bool) {
	m := icmpMessage{kind: e.Type, code: e.Code}
	if h.src.Is4() {
		switch header.ICMPv4Type(e.Type) {
		case header.ICMPv4DstUnreachable:
			if header.ICMPv4Code(e.Code) == header.ICMPv4FragmentationNeeded {
				return tooBig(int(min(e.Info, 65535)), h), true
			}
			return m, e.Code <= 15
		case header.ICMPv4TimeExceeded:
			return m, e.Code <= 1
		case header.ICMPv4ParamProblem:
			m.word = e.Info << 24
			return m, e.Code <= 2
		}
		return m, false
	}
	switch header.ICMPv6Type(e.Type) {
	case header.ICMPv6DstUnreachable:
		return m, e.Code <= 8
	case header.ICMPv6PacketTooBig:
		return tooBig(int(min(e.Info, 65575)), h), true
	case header.ICMPv6TimeExceeded:
		return m, e.Code <= 1
	case header.ICMPv6ParamProblem:
		m.word = e.Info
		return m, e.Code <= 3
	}
	return m, false
}

func timeExceeded(v4 bool) icmpMessage {
	if v4 {
		return icmpMessage{kind: uint8(header.ICMPv4TimeExceeded)}
	}
	return icmpMessage{kind: uint8(header.ICMPv6TimeExceeded)}
}

// expire makes a packet look as it does to the router that drops it.
func expire(pkt []byte, h ipHeader) {
	if h.src.Is6() {
		pkt[7] = 1
		return
	}
	pkt[8] = 1
	pkt[10], pkt[11] = 0, 0
	sum := ^checksum.Checksum(pkt[:h.off], 0)
	pkt[10], pkt[11] = byte(sum>>8), byte(sum)
}

// ownAddresses are what the stack itself speaks from, as a router: zero where it
// has none.
type ownAddresses struct{ v4, v6 netip.Addr }

func newOwnAddresses(list []netip.Addr) (own ownAddresses) {
	for _, a := range list {
		switch {
		case a.Is4() && !own.v4.IsValid():
			own.v4 = a
		case a.Is6() && !a.IsLinkLocalUnicast() && !own.v6.IsValid():
			own.v6 = a
		}
	}
	return own
}

// of is the address to answer a packet from.
func (o ownAddresses) of(h ipHeader) netip.Addr {
	own := o.v6
	if h.src.Is4() {
		own = o.v4
	}
	if !own.IsValid() {
		return h.dst
	}
	return own
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
	case flow.Expired:
		return timeExceeded(v4), true
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
// 0: nobody knows it.
func tooBig(mtu int, h ipHeader) icmpMessage {
	if mtu == 0 {
		mtu = leastMTU
	}
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
func buildICMP(m icmpMessage, from netip.Addr, h ipHeader, orig []byte) []byte {
	proto, ipSize, most := uint8(protoICMPv4), header.IPv4MinimumSize, maxICMPv4
	if h.src.Is6() {
		proto, ipSize, most = protoICMPv6, header.IPv6MinimumSize, maxICMPv6
	}
	quote := orig[:min(len(orig), most-ipSize-icmpHeaderSize)]
	if h.end >= h.off && h.end < len(quote) {
		quote = quote[:h.end] // no padding
	}
	pkt := make([]byte, ipSize+icmpHeaderSize+len(quote))
	putIP(pkt, proto, m.ttl, from, h.src, icmpHeaderSize+len(quote))

	body := pkt[ipSize:]
	body[0], body[1] = m.kind, m.code
	body[4], body[5], body[6], body[7] = byte(m.word>>24), byte(m.word>>16), byte(m.word>>8), byte(m.word)
	copy(body[icmpHeaderSize:], quote)
	var sum uint16
	if proto == protoICMPv6 {
		sum = pseudoSum(proto, from, h.src, len(body))
	}
	sum = ^checksum.Checksum(body, sum)
	body[2], body[3] = byte(sum>>8), byte(sum)
	return pkt
}
