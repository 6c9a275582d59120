package stack

import (
	"bytes"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
)

// Probes, theory of operation.
//
// Who looks for the routers on a path sends packets that pass few of them, and
// knows the answers by what they quote: ports and sequence numbers, but also
// the IP header's identification, lengths and checksums (traceroute, tracepath,
// mtr). The outbound's socket sends something else, and an error brings only a
// part of that back. So the beginnings of the last packets whose TTL is lower
// than any system's default are kept, until errors come for them.

const (
	// probeTTL is the largest TTL of a probe: the lowest default that any
	// system ever had.
	probeTTL = 32
	// keptProbes is how many are on their way at once: a TTL each.
	keptProbes = 32
	// probeHead is what is kept of one: an IPv6 header, that of the transport,
	// and enough of the payload to tell them apart.
	probeHead = 80
)

// probe is the beginning of a packet.
type probe struct {
	peer netip.AddrPort
	off  uint8 // of the transport header
	size uint8 // bytes of head
	head [probeHead]byte
}

// probes are the last ones of a session, guarded by its mu. Most have none.
type probes struct {
	last *[keptProbes]probe
	next int
}

// headOf returns the beginning of a packet that may be a probe, or nil.
func headOf(h ipHeader, pkt []byte) []byte {
	if h.ttl > probeTTL || h.off+8 > min(len(pkt), probeHead) {
		return nil
	}
	return pkt[:min(h.end, len(pkt), probeHead)]
}

// add keeps a copy of head, which headOf returned.
func (p *probes) add(peer netip.AddrPort, head []byte) {
	h, err := parseHeaders(head)
	if err != nil {
		return
	}
	if p.last == nil {
		p.last = new([keptProbes]probe)
	}
	one := &p.last[p.next]
	p.next = (p.next + 1) % keptProbes
	one.peer, one.off = peer, uint8(h.off)
	one.size = uint8(copy(one.head[:], head))
}

// find returns the newest probe to peer that quote, which the outbound sent, can
// be of, as a packet with as much of quote as there is. Nil: there is none.
func (p *probes) find(peer netip.AddrPort, proto flow.Proto, quote []byte) []byte {
	if p.last == nil {
		return nil
	}
	for i := range keptProbes {
		one := &p.last[(p.next+2*keptProbes-1-i)%keptProbes]
		if one.size == 0 || one.peer != peer {
			continue
		}
		transport := one.head[one.off:one.size]
		body, known := transport[8:], quote
		if proto == flow.ICMP {
			if len(quote) < echoHeaderSize || !bytes.Equal(quote[6:8], transport[6:8]) {
				continue
			}
			known = quote[echoHeaderSize:]
		}
		if n := min(len(body), len(known)); !bytes.Equal(body[:n], known[:n]) {
			continue
		}
		pkt := append([]byte(nil), one.head[:one.size]...)
		if len(known) > len(body) {
			pkt = append(pkt, known[len(body):]...)
		}
		return pkt
	}
	return nil
}

// quoted returns the packet to peer that is said to have failed, or its
// beginning, as the client sent it.
func (s *session) quoted(peer netip.AddrPort, said *flow.ICMPError) []byte {
	s.mu.Lock()
	pkt := s.probes.find(peer, s.u.cfg.Proto, said.Quote)
	s.mu.Unlock()
	if pkt == nil {
		pkt = s.offending(peer, said.Quote)
	}
	return pkt
}

// offending makes a packet to peer of quote, which the outbound sent, or of
// nothing. Peer is of the client's family.
func (s *session) offending(peer netip.AddrPort, quote []byte) []byte {
	quote = quote[:min(len(quote), maxICMPv6)]
	if s.u.cfg.Proto == flow.ICMP {
		return s.offendingEcho(peer.Addr(), quote)
	}
	length := header.UDPMinimumSize + len(quote)
	b := make([]byte, header.IPv6MinimumSize+length)
	n := putIP(b, protoUDP, 0, s.src.Addr(), peer.Addr(), length)
	header.UDP(b[n:]).Encode(&header.UDPFields{SrcPort: s.src.Port(), DstPort: peer.Port(), Length: uint16(length)})
	copy(b[n+header.UDPMinimumSize:], quote)
	return b[:n+length]
}
