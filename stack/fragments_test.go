package stack_test

import (
	"encoding/binary"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/stack"
	"cgtun/tun"
)

// fragments4 cuts a packet of IPv4 into two, the first of 16 bytes of payload.
func fragments4(pkt []byte, id uint16) (first, second []byte) {
	cut := func(from, to int, more bool) []byte {
		b := append(append([]byte(nil), pkt[:20]...), pkt[20+from:20+to]...)
		ip := header.IPv4(b)
		ip.SetTotalLength(uint16(len(b)))
		flags := uint8(0)
		if more {
			flags = header.IPv4FlagMoreFragments
		}
		ip.SetFlagsFragmentOffset(flags, uint16(from))
		ip.SetID(id)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		return b
	}
	size := len(pkt) - 20
	return cut(0, 16, true), cut(16, size, false)
}

// fragments6 makes the same segment one of IPv6, in two fragments.
func fragments6(port uint16, id uint32, bad uint16) (first, second []byte) {
	src, dst := tcpip.AddrFrom16([16]byte{0xfd, 9, 15: 1}), tcpip.AddrFrom16([16]byte{0xfd, 7, 15: 2})
	tcp := header.TCP(make([]byte, 24))
	tcp.Encode(&header.TCPFields{SrcPort: port, DstPort: 80, SeqNum: 7, DataOffset: 24, Flags: header.TCPFlagSyn, WindowSize: 65535})
	copy(tcp[20:], []byte{2, 4, 5, 180})
	tcp.SetChecksum(^tcp.CalculateChecksum(header.PseudoHeaderChecksum(6, src, dst, 24)) ^ bad)
	cut := func(from, to int, more bool) []byte {
		b := make([]byte, 48, 48+to-from)
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(8 + to - from), TransportProtocol: 44, HopLimit: 64, SrcAddr: src, DstAddr: dst})
		b[40] = 6
		word := uint16(from)
		if more {
			word |= 1
		}
		binary.BigEndian.PutUint16(b[42:], word)
		binary.BigEndian.PutUint32(b[44:], id)
		return append(b, tcp[from:to]...)
	}
	return cut(0, 16, true), cut(16, 24, false)
}

// A segment in fragments is served if its sum is right, and only then.
func TestFragmentsOfTCPAreVerified(t *testing.T) {
	w, s := startWire(t, stack.Options{})
	mss := []byte{2, 4, 5, 180}
	for i, tt := range []struct {
		name   string
		change func(first, second []byte) [][]byte
		want   header.TCPFlags
		count  func(stack.Stats) uint64
	}{
		{"in order", func(a, b []byte) [][]byte { return [][]byte{a, b} }, synAck, nil},
		{"last one first", func(a, b []byte) [][]byte { return [][]byte{b, a} }, synAck, nil},
		{"one twice", func(a, b []byte) [][]byte { return [][]byte{a, a, b} }, synAck, nil},
		{"wrong sum", func(a, b []byte) [][]byte { b[23] ^= 1; return [][]byte{a, b} }, 0, func(s stack.Stats) uint64 { return s.BadChecksum }},
		{"overlap", func(a, b []byte) [][]byte {
			c := append(append([]byte(nil), a...), make([]byte, 8)...) // 24 bytes where 16 end
			header.IPv4(c).SetTotalLength(uint16(len(c)))
			header.IPv4(c).SetChecksum(0)
			header.IPv4(c).SetChecksum(^header.IPv4(c).CalculateChecksum())
			return [][]byte{a, c, b}
		}, 0, func(s stack.Stats) uint64 { return s.Malformed }},
	} {
		port := uint16(6000 + i)
		var before uint64
		if tt.count != nil {
			before = tt.count(s.Stats())
		}
		for _, pkt := range tt.change(fragments4(segment(port, 80, header.TCPFlagSyn, 7, mss), uint16(i+1))) {
			w.send(tun.Offload{}, pkt)
		}
		if got := w.answers(port); got != tt.want {
			t.Errorf("%s: answered %v, want %v", tt.name, got, tt.want)
		}
		if tt.count != nil && tt.count(s.Stats()) == before {
			t.Errorf("%s: not counted", tt.name)
		}
	}
	for i, bad := range []uint16{0, 1} {
		port := uint16(6100 + i)
		first, second := fragments6(port, uint32(i+1), bad)
		w.send(tun.Offload{}, first)
		w.send(tun.Offload{}, second)
		got := w.answer(func(b []byte) bool {
			return len(b) >= 60 && b[0]>>4 == 6 && b[6] == 6 && binary.BigEndian.Uint16(b[42:]) == port
		})
		if want := bad == 0; (got != nil && header.TCP(got[40:]).Flags() == synAck) != want {
			t.Errorf("IPv6, sum off by %d: answered %x", bad, got)
		}
	}
}

// Fragments that never become whole are bounded.
func TestFragmentsAreBounded(t *testing.T) {
	w, s := startWire(t, stack.Options{})
	for i := range 1000 {
		first, _ := fragments4(segment(7000, 80, header.TCPFlagSyn, 7, nil), uint16(i))
		w.send(tun.Offload{}, first)
	}
	w.send(tun.Offload{}, nil)
	if n := s.Stats().Fragmented; n != 1000-64 {
		t.Errorf("%d made room, want %d", n, 1000-64)
	}
}

// The same for datagrams, which netstack reassembles.
func TestFragmentsOfUDPAreVerified(t *testing.T) {
	w, s := startWire(t, stack.Options{})
	datagram := func(port, bad uint16) []byte {
		src, dst := tcpip.AddrFrom4([4]byte{10, 9, 0, 1}), tcpip.AddrFrom4([4]byte{10, 7, 0, 2})
		pkt := make([]byte, 20+32)
		header.IPv4(pkt).Encode(&header.IPv4Fields{TotalLength: uint16(len(pkt)), TTL: 64, Protocol: 17, SrcAddr: src, DstAddr: dst})
		udp := header.UDP(pkt[20:])
		udp.Encode(&header.UDPFields{SrcPort: port, DstPort: 53, Length: 32})
		udp.SetChecksum(^udp.CalculateChecksum(header.PseudoHeaderChecksum(17, src, dst, 32)) ^ bad)
		return pkt
	}
	for i, bad := range []uint16{0, 1} {
		first, second := fragments4(datagram(uint16(8000+i), bad), uint16(i+1))
		w.send(tun.Offload{}, first)
		w.send(tun.Offload{}, second)
		w.send(tun.Offload{}, nil)
	}
	if st := s.Stats(); st.UDP.Opened != 1 || st.BadChecksum != 1 {
		t.Errorf("%d sessions, %d wrong sums; want 1 and 1", st.UDP.Opened, st.BadChecksum)
	}
}
