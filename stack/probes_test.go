package stack

import (
	"bytes"
	"net/netip"
	"testing"

	"cgtun/flow"
)

var router4, router6 = netip.MustParseAddr("203.0.113.254"), netip.MustParseAddr("2001:db8::fe")

// What a router says of a probe comes from the router and quotes the probe as
// the client sent it, whichever of several it was; without a probe, what the
// outbound sent.
func TestErrorsQuoteTheirProbe(t *testing.T) {
	u, device, sources := startUDP(t, UDPOptions{})
	ttl := func(pkt []byte, n int, id byte) []byte {
		if pkt[0]>>4 == 6 {
			return edit(pkt, func(b []byte) { b[7], b[3] = byte(n), id }) // the flow label
		}
		return resum(edit(pkt, func(b []byte) { b[8], b[5] = byte(n), id }))
	}
	for _, tt := range []struct {
		client, server netip.AddrPort
		router         netip.Addr
		kind           uint8
	}{{client4, server4, router4, 11}, {client6, server6, router6, 3}} {
		at := 8
		if tt.client.Addr().Is6() {
			at = 7
		}
		var sent [][]byte
		for n := 2; n < 6; n++ {
			sent = append(sent, ttl(udpPacket(tt.client, tt.server, bytes.Repeat([]byte{byte(n)}, 100)), n, byte(n)))
			u.packet(local, sent[len(sent)-1])
		}
		c := (<-sources).(*session)
		if d := readOne(t, c); d.TTL != 1 {
			t.Errorf("a TTL of 2 becomes %d", d.TTL)
		}
		for i, orig := range sent {
			payload := orig[len(orig)-100:]
			said := &flow.ICMPError{From: tt.router, Type: tt.kind, Quote: payload}
			if err := c.Unreachable(tt.server, flow.HostUnreachable, said); err != nil {
				t.Fatal(err)
			}
			pkt := device.take()[0].pkt
			h, kind, _, _ := checkICMP(t, pkt)
			if h.src != tt.router || h.dst != tt.client.Addr() || kind != tt.kind {
				t.Errorf("probe %d: type %d from %s", i, kind, h.src)
			}
			quote := pkt[h.off+8:]
			want := edit(orig, func(b []byte) { b[at] = 1 })
			if at == 8 {
				want = resum(want)
			}
			if !bytes.Equal(quote, want) {
				t.Errorf("probe %d quoted as\n%x, want\n%x", i, quote, want)
			}
		}
		// Of what was no probe: the headers and what came back.
		said := &flow.ICMPError{From: tt.router, Type: tt.kind, Quote: []byte("no probe")}
		_ = c.Unreachable(tt.server, flow.HostUnreachable, said)
		pkt := device.take()[0].pkt
		h, _, _, _ := checkICMP(t, pkt)
		q, err := parseIP(pkt[h.off+8:], len(pkt[h.off+8:]))
		if err != nil || q.ttl != 1 || q.src != tt.client.Addr() || q.dst != tt.server.Addr() || !bytes.HasSuffix(pkt, []byte("no probe")) {
			t.Errorf("quotes %+v: %v", q, err)
		}
		// What no router says is not repeated, but told in our own words.
		for _, odd := range []flow.ICMPError{{Type: 5}, {Type: tt.kind, Code: 9}, {Type: 200}} {
			odd.From = tt.router
			_ = c.Unreachable(tt.server, flow.HostUnreachable, &odd)
			if h, _, _, _ := checkICMP(t, device.take()[0].pkt); h.src != tt.server.Addr() {
				t.Errorf("%+v: is repeated", odd)
			}
		}
	}
}

// The kernel's own word comes from the device.
func TestOwnErrorsComeFromTheDevice(t *testing.T) {
	own := newOwnAddresses([]netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fd00:101::1")})
	for _, tt := range []struct {
		pkt  []byte
		from netip.Addr
		said flow.ICMPError
	}{
		{udpPacket(client4, server4, nil), own.v4, flow.ICMPError{Type: 3, Code: 4, Info: 1400}},
		{udpPacket(client6, server6, nil), own.v6, flow.ICMPError{Type: 2, Info: 1400}},
	} {
		if tt.from != own.v4 && tt.from != netip.MustParseAddr("fd00:101::1") {
			t.Errorf("v6 address %s", tt.from)
		}
		pkt, ok := icmpSaid(&tt.said, own, bytes.Clone(tt.pkt))
		if h, kind, _, mtu := checkICMP(t, pkt); !ok || h.src != tt.from || mtu != 1400 || kind != tt.said.Type {
			t.Errorf("from %s, MTU %d", h.src, mtu)
		}
		pkt, ok = icmpError(flow.Prohibited, own, tt.pkt)
		if h, _, _, _ := checkICMP(t, pkt); !ok || h.src != tt.from {
			t.Errorf("prohibited: from %s", h.src)
		}
		pkt, ok = icmpExpired(own, tt.pkt)
		if h, _, _, _ := checkICMP(t, pkt); !ok || h.src != tt.from {
			t.Errorf("expired: from %s", h.src)
		}
	}
}
