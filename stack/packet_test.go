package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

var (
	client4 = netip.MustParseAddrPort("10.9.0.1:4000")
	server4 = netip.MustParseAddrPort("192.0.2.7:53")
	client6 = netip.MustParseAddrPort("[fd09::1]:4000")
	server6 = netip.MustParseAddrPort("[2001:db8::7]:53")
)

// ipPacket puts an IP header in front of body.
func ipPacket(proto uint8, src, dst netip.Addr, body []byte) []byte {
	b := make([]byte, 40, 40+len(body))
	n := putIP(b, proto, 0, src, dst, len(body))
	return append(b[:n], body...)
}

// udpPacket makes a whole UDP packet with its checksum.
func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	seg := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(seg, src.Port())
	binary.BigEndian.PutUint16(seg[2:], dst.Port())
	binary.BigEndian.PutUint16(seg[4:], uint16(8+len(payload)))
	seg = append(seg, payload...)
	sum := ^checksum.Checksum(seg, pseudoSum(protoUDP, src.Addr(), dst.Addr(), len(seg)))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(seg[6:], sum)
	return ipPacket(protoUDP, src.Addr(), dst.Addr(), seg)
}

// resum corrects the header checksum of an IPv4 packet.
func resum(pkt []byte) []byte {
	n := int(pkt[0]&15) * 4
	pkt[10], pkt[11] = 0, 0
	binary.BigEndian.PutUint16(pkt[10:], ^checksum.Checksum(pkt[:n], 0))
	return pkt
}

// extended puts extension headers between the IPv6 header and what follows.
func extended(pkt []byte, kinds ...uint8) []byte {
	next := pkt[6]
	var chain []byte
	for i, k := range kinds {
		h := make([]byte, 8)
		h[0] = next
		if i+1 < len(kinds) {
			h[0] = kinds[i+1]
		}
		if k == protoFragment {
			h[3] = 0 // offset 0, no more
		}
		chain = append(chain, h...)
	}
	out := slices.Concat(pkt[:40], chain, pkt[40:])
	out[6] = kinds[0]
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

func edit(pkt []byte, f func(b []byte)) []byte {
	pkt = slices.Clone(pkt)
	f(pkt)
	return pkt
}

func TestParseIP(t *testing.T) {
	v4, v6 := udpPacket(client4, server4, []byte("hello")), udpPacket(client6, server6, []byte("hello"))
	many := slices.Repeat([]uint8{protoDestOpts}, maxExtensions)
	tests := []struct {
		name  string
		pkt   []byte
		want  ipHeader
		error error
	}{
		{name: "v4", pkt: v4, want: ipHeader{src: client4.Addr(), dst: server4.Addr(), proto: 17, ttl: 64, named: 9, off: 20, end: 33}},
		{name: "v6", pkt: v6, want: ipHeader{src: client6.Addr(), dst: server6.Addr(), proto: 17, ttl: 64, whole: true, named: 6, off: 40, end: 53}},
		{name: "v4 whole, at the last router", pkt: resum(edit(v4, func(b []byte) { b[6], b[8] = 0x40, 1 })),
			want: ipHeader{src: client4.Addr(), dst: server4.Addr(), proto: 17, ttl: 1, whole: true, named: 9, off: 20, end: 33}},
		{name: "padding", pkt: append(slices.Clone(v4), 0, 0, 0), want: ipHeader{src: client4.Addr(), dst: server4.Addr(), proto: 17, ttl: 64, named: 9, off: 20, end: 33}},
		{name: "v4 first fragment", pkt: resum(edit(v4, func(b []byte) { b[6] = 0x20 })),
			want: ipHeader{src: client4.Addr(), dst: server4.Addr(), proto: 17, ttl: 64, fragment: true, named: 9, off: 20, end: 33}},
		{name: "v4 later fragment", pkt: resum(edit(v4, func(b []byte) { b[7] = 1 })),
			want: ipHeader{src: client4.Addr(), dst: server4.Addr(), proto: 17, ttl: 64, fragment: true, later: true, named: 9, off: 20, end: 33}},
		{name: "v6 extensions", pkt: extended(v6, protoHopByHop, protoDestOpts),
			want: ipHeader{src: client6.Addr(), dst: server6.Addr(), proto: 17, ttl: 64, whole: true, named: 48, off: 56, end: 69}},
		{name: "v6 fragment", pkt: extended(v6, protoFragment),
			want: ipHeader{src: client6.Addr(), dst: server6.Addr(), proto: 17, ttl: 64, fragment: true, named: 40, off: 48, end: 61}},
		{name: "v6 later fragment", pkt: edit(extended(v6, protoFragment), func(b []byte) { b[43] = 8 }),
			want: ipHeader{src: client6.Addr(), dst: server6.Addr(), proto: 17, ttl: 64, fragment: true, later: true, named: 40, off: 48, end: 61}},
		{name: "empty", error: errShort},
		{name: "version", pkt: []byte{0x50, 0}, error: errVersion},
		{name: "v4 cut", pkt: v4[:19], error: errShort},
		{name: "v4 header too short", pkt: edit(v4, func(b []byte) { b[0] = 0x44 }), error: errShort},
		{name: "v4 header beyond the packet", pkt: edit(v4, func(b []byte) { b[0] = 0x4f }), error: errShort},
		{name: "v4 longer than it is", pkt: v4[:len(v4)-1], error: errShort},
		{name: "v4 total below header", pkt: resum(edit(v4, func(b []byte) { b[3] = 10 })), error: errShort},
		{name: "v4 checksum", pkt: edit(v4, func(b []byte) { b[8]++ }), error: errSum},
		{name: "v6 cut", pkt: v6[:39], error: errShort},
		{name: "v6 longer than it is", pkt: v6[:len(v6)-1], error: errShort},
		{name: "v6 too many extensions", pkt: extended(v6, append(many, protoDestOpts)...), error: errExtensions},
		{name: "v6 late hop-by-hop", pkt: extended(v6, protoDestOpts, protoHopByHop), error: errExtensions},
		{name: "v6 extension beyond the packet", pkt: edit(extended(v6, protoDestOpts), func(b []byte) { b[41] = 255 }), error: errExtensions},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseIP(tt.pkt, len(tt.pkt))
			if !errors.Is(err, tt.error) {
				t.Fatalf("error %v, want %v", err, tt.error)
			}
			if err == nil && got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestTransportSum(t *testing.T) {
	for _, good := range [][]byte{udpPacket(client4, server4, []byte("odd")), udpPacket(client6, server6, []byte("even"))} {
		h, err := parseIP(good, len(good))
		if err != nil {
			t.Fatal(err)
		}
		if !transportSumOK(h, good) {
			t.Errorf("right sum of %v refused", h.src)
		}
		bad := edit(good, func(b []byte) { b[len(b)-1]++ })
		if transportSumOK(h, bad) {
			t.Errorf("wrong sum of %v taken", h.src)
		}
		none := edit(bad, func(b []byte) { b[h.off+6], b[h.off+7] = 0, 0 })
		if got, want := transportSumOK(h, none), h.src.Is4(); got != want {
			t.Errorf("no sum of %v: %v, want %v", h.src, got, want)
		}
	}
}

func FuzzParseIP(f *testing.F) {
	seedPackets(f)
	f.Fuzz(func(t *testing.T, pkt []byte) {
		h, err := parseIP(pkt, len(pkt))
		if err != nil {
			return
		}
		if h.off < 20 || h.off > h.end || h.end > len(pkt) || h.named >= h.off {
			t.Errorf("impossible header %+v of %d bytes", h, len(pkt))
		}
		if h.later && !h.fragment {
			t.Errorf("a later fragment is none: %+v", h)
		}
		transportSumOK(h, pkt)
	})
}

func seedPackets(f *testing.F) {
	v4, v6 := udpPacket(client4, server4, []byte("hello")), udpPacket(client6, server6, []byte("hello"))
	for _, pkt := range [][]byte{
		v4, v6,
		resum(edit(v4, func(b []byte) { b[6] = 0x20 })),
		extended(v6, protoHopByHop, protoRouting, protoDestOpts, protoFragment),
		edit(extended(v6, protoFragment), func(b []byte) { b[43] = 8 }),
		ipPacket(protoICMPv4, client4.Addr(), server4.Addr(), []byte{8, 0, 0, 0, 0, 0, 0, 0}),
		ipPacket(protoICMPv6, client6.Addr(), server6.Addr(), []byte{128, 0, 0, 0, 0, 0, 0, 0}),
		ipPacket(132, client6.Addr(), server6.Addr(), make([]byte, 12)),
	} {
		f.Add(pkt)
	}
}
