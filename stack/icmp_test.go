package stack

import (
	"bytes"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"cgtun/flow"
)

// checkICMP parses an ICMP error and returns its type, code and last word.
func checkICMP(t *testing.T, pkt []byte) (h ipHeader, kind, code uint8, word uint32) {
	t.Helper()
	h, err := parseIP(pkt, len(pkt))
	if err != nil {
		t.Fatalf("the error is no packet: %v", err)
	}
	body := pkt[h.off:h.end]
	var sum uint16
	if h.src.Is6() {
		sum = pseudoSum(protoICMPv6, h.src, h.dst, len(body))
	}
	if checksum.Checksum(body, sum) != 0xffff {
		t.Error("wrong ICMP checksum")
	}
	if h.end != len(pkt) || len(body) < 8 {
		t.Fatalf("%d bytes of ICMP in %d", len(body), len(pkt))
	}
	return h, body[0], body[1], uint32(body[4])<<24 | uint32(body[5])<<16 | uint32(body[6])<<8 | uint32(body[7])
}

func TestICMPErrorSaysTheReason(t *testing.T) {
	packets := map[string][]byte{
		"udp4":  udpPacket(client4, server4, []byte("x")),
		"udp6":  udpPacket(client6, server6, []byte("x")),
		"tcp4":  ipPacket(protoTCP, client4.Addr(), server4.Addr(), make([]byte, 20)),
		"tcp6":  ipPacket(protoTCP, client6.Addr(), server6.Addr(), make([]byte, 20)),
		"sctp4": ipPacket(132, client4.Addr(), server4.Addr(), make([]byte, 12)),
		"sctp6": extended(ipPacket(132, client6.Addr(), server6.Addr(), make([]byte, 12)), protoDestOpts),
		"ping4": ipPacket(protoICMPv4, client4.Addr(), server4.Addr(), []byte{8, 0, 0, 0, 0, 0, 0, 0}),
		"ping6": ipPacket(protoICMPv6, client6.Addr(), server6.Addr(), []byte{128, 0, 0, 0, 0, 0, 0, 0}),
	}
	type message struct {
		kind, code uint8
		word       uint32
	}
	tests := []struct {
		reason flow.Reason
		packet string
		want   message // zero: none
	}{
		{flow.Refused, "udp4", message{3, 3, 0}},
		{flow.Refused, "udp6", message{1, 4, 0}},
		{flow.Refused, "tcp4", message{}},
		{flow.Refused, "tcp6", message{}},
		{flow.Refused, "sctp4", message{3, 2, 0}},
		{flow.Refused, "sctp6", message{4, 1, 40}},
		{flow.Refused, "ping4", message{3, 13, 0}},
		{flow.Refused, "ping6", message{1, 1, 0}},
		{flow.NetUnreachable, "tcp4", message{3, 0, 0}},
		{flow.NetUnreachable, "tcp6", message{1, 0, 0}},
		{flow.HostUnreachable, "tcp4", message{3, 1, 0}},
		{flow.HostUnreachable, "udp6", message{1, 3, 0}},
		{flow.TimedOut, "tcp4", message{3, 1, 0}},
		{flow.Unknown, "tcp6", message{1, 3, 0}},
		{flow.Prohibited, "udp4", message{3, 13, 0}},
		{flow.Prohibited, "udp6", message{1, 1, 0}},
		{flow.TooBig, "udp4", message{3, 4, 1280}},
		{flow.TooBig, "udp6", message{2, 0, 1280}},
		{flow.Expired, "tcp4", message{11, 0, 0}},
		{flow.Expired, "udp6", message{3, 0, 0}},
		{flow.Reset, "tcp4", message{}},
		{flow.Dropped, "udp4", message{}},
		{flow.Closed, "udp4", message{}},
		{flow.Canceled, "udp6", message{}},
	}
	for _, tt := range tests {
		t.Run(tt.reason.String()+" "+tt.packet, func(t *testing.T) {
			orig := packets[tt.packet]
			pkt, ok := icmpError(tt.reason, ownAddresses{}, orig)
			if ok != (tt.want != message{}) {
				t.Fatalf("sent: %v", ok)
			}
			if !ok {
				return
			}
			h, kind, code, word := checkICMP(t, pkt)
			if got := (message{kind, code, word}); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			of, _ := parseIP(orig, len(orig))
			if h.src != of.dst || h.dst != of.src {
				t.Errorf("goes from %v to %v", h.src, h.dst)
			}
			if !bytes.Equal(pkt[h.off+8:], orig) {
				t.Error("the packet is not quoted")
			}
		})
	}
}

func TestICMPErrorIsNotSentAbout(t *testing.T) {
	v4, v6 := udpPacket(client4, server4, nil), udpPacket(client6, server6, nil)
	tests := []struct {
		name string
		pkt  []byte
	}{
		{"an ICMPv4 error", ipPacket(protoICMPv4, client4.Addr(), server4.Addr(), append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, v4...))},
		{"an ICMPv6 error", ipPacket(protoICMPv6, client6.Addr(), server6.Addr(), append([]byte{1, 4, 0, 0, 0, 0, 0, 0}, v6...))},
		{"a redirect", ipPacket(protoICMPv6, client6.Addr(), server6.Addr(), []byte{137, 0, 0, 0, 0, 0, 0, 0})},
		{"ICMP without a type", ipPacket(protoICMPv4, client4.Addr(), server4.Addr(), nil)},
		{"a later fragment", resum(edit(v4, func(b []byte) { b[7] = 1 }))},
		{"a later v6 fragment", edit(extended(v6, protoFragment), func(b []byte) { b[43] = 8 })},
		{"multicast", ipPacket(protoUDP, client4.Addr(), netip.MustParseAddr("224.0.0.251"), make([]byte, 8))},
		{"v6 multicast", ipPacket(protoUDP, client6.Addr(), netip.MustParseAddr("ff02::fb"), make([]byte, 8))},
		{"broadcast", ipPacket(protoUDP, client4.Addr(), netip.MustParseAddr("255.255.255.255"), make([]byte, 8))},
		{"a source of nobody", ipPacket(protoUDP, netip.IPv4Unspecified(), server4.Addr(), make([]byte, 8))},
		{"a multicast source", ipPacket(protoUDP, netip.MustParseAddr("ff02::1"), server6.Addr(), make([]byte, 8))},
		{"garbage", []byte{0x45, 1, 2}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, ok := icmpError(flow.HostUnreachable, ownAddresses{}, tt.pkt); ok {
				t.Error("sent")
			}
			if _, ok := icmpExpired(ownAddresses{}, tt.pkt); ok {
				t.Error("time exceeded sent")
			}
		})
	}
}

func TestICMPErrorIsBoundedAndNamesTheMTU(t *testing.T) {
	for _, tt := range []struct {
		client, server netip.AddrPort
		size, mtu      int
		word           uint32
	}{
		{client4, server4, maxICMPv4, 1400, 1400},
		{client6, server6, maxICMPv6, 1400, 1400},
		{client6, server6, maxICMPv6, 600, 1280}, // RFC 8200: never less
		{client4, server4, maxICMPv4, 10, 68},
	} {
		said := &flow.ICMPError{Type: 3, Code: 4, Info: uint32(tt.mtu)}
		if tt.client.Addr().Is6() {
			said = &flow.ICMPError{Type: 2, Info: uint32(tt.mtu)}
		}
		pkt, ok := icmpSaid(said, ownAddresses{}, udpPacket(tt.client, tt.server, make([]byte, 3000)))
		if !ok || len(pkt) != tt.size {
			t.Errorf("%v: %d bytes, want %d", tt.client, len(pkt), tt.size)
		}
		if _, _, _, word := checkICMP(t, pkt); word != tt.word {
			t.Errorf("%v: MTU %d, want %d", tt.client, word, tt.word)
		}
	}
}

// No error is ever answered by another one, whatever it is about.
func FuzzICMPError(f *testing.F) {
	seedPackets(f)
	f.Fuzz(func(t *testing.T, orig []byte) {
		for reason := flow.Unknown; reason <= flow.Canceled; reason++ {
			pkt, ok := icmpError(reason, ownAddresses{}, orig)
			if !ok {
				continue
			}
			if h, _, _, _ := checkICMP(t, pkt); h.dst.IsMulticast() || len(pkt) > maxICMPv6 {
				t.Errorf("%d bytes to %v", len(pkt), h.dst)
			}
			if _, again := icmpError(flow.HostUnreachable, ownAddresses{}, pkt); again {
				t.Error("an ICMP error about an ICMP error")
			}
		}
		for kind := range 16 {
			said := &flow.ICMPError{From: client6.Addr(), Type: uint8(kind), Code: uint8(len(orig)), Info: uint32(len(orig)) << 13}
			if pkt, ok := icmpSaid(said, ownAddresses{}, bytes.Clone(orig)); ok {
				checkICMP(t, pkt)
			}
		}
	})
}
