package stack_test

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/stack"
	"cgtun/tun"
)

// wire is a device without a kernel: packets in by send, out by the channel.
type wire struct {
	in   chan []wirePacket
	next []wirePacket // the rest of a burst; the reader's
	out  chan []byte
	done chan struct{}
	once sync.Once
}

type wirePacket struct {
	off tun.Offload
	pkt []byte
}

func newWire() *wire {
	return &wire{in: make(chan []wirePacket), out: make(chan []byte, 1024), done: make(chan struct{})}
}

func (w *wire) ReadPacket(bufs [][]byte) (tun.Offload, int, error) {
	for len(w.next) == 0 {
		select {
		case w.next = <-w.in:
		case <-w.done:
			return tun.Offload{}, 0, os.ErrDeadlineExceeded
		}
	}
	p := w.next[0]
	w.next = w.next[1:]
	rest := p.pkt
	for _, b := range bufs {
		rest = rest[copy(b, rest):]
	}
	return p.off, len(p.pkt) - len(rest), nil
}

func (w *wire) WritePacket(_ tun.Offload, slices [][]byte) error {
	var pkt []byte
	for _, b := range slices {
		pkt = append(pkt, b...)
	}
	select {
	case w.out <- pkt:
	default: // nobody looks
	}
	return nil
}

func (w *wire) SetReadDeadline(t time.Time) error {
	if !t.IsZero() {
		w.once.Do(func() { close(w.done) })
	}
	return nil
}

// send gives the stack a packet and returns when it took it.
func (w *wire) send(off tun.Offload, pkt []byte) { w.burst(wirePacket{off, pkt}) }

// burst gives the stack packets that it reads without a pause between them.
func (w *wire) burst(pkts ...wirePacket) {
	select {
	case w.in <- pkts:
	case <-w.done:
	}
}

// answer returns the first packet out that matches, within two seconds.
func (w *wire) answer(match func(pkt []byte) bool) []byte {
	late := time.After(2 * time.Second)
	for {
		select {
		case pkt := <-w.out:
			if match(pkt) {
				return pkt
			}
		case <-late:
			return nil
		}
	}
}

// accepting answers every client and holds it until its flow ends.
type accepting struct{}

func (accepting) ServeStream(ctx context.Context, s flow.Stream) {
	if s.Flow().Dst.Port() == 9 {
		s.Reject(flow.Refused, nil)
		return
	}
	c, err := s.Accept()
	if err != nil {
		return
	}
	<-ctx.Done()
	c.Reset()
}

func (accepting) ServePackets(ctx context.Context, c flow.PacketConn) {
	defer c.Close()
	buf := []flow.Datagram{{Data: make([]byte, 2048)}}
	for {
		if _, err := c.ReadBatch(buf); err != nil {
			return
		}
		buf[0].Data = buf[0].Data[:cap(buf[0].Data)]
	}
}

func startWire(t testing.TB, o stack.Options) (*wire, *stack.Stack) {
	t.Helper()
	return startWireFor(t, accepting{}, o)
}

func startWireFor(t testing.TB, h flow.Handler, o stack.Options) (*wire, *stack.Stack) {
	t.Helper()
	w := newWire()
	s, err := stack.New([]stack.Queue{w}, h, o)
	if err != nil {
		t.Fatal(err)
	}
	labtest.Background(t, "the stack", s.Run)
	return w, s
}

// segment is a TCP segment from 10.9.0.1 with a right checksum.
func segment(srcPort, dstPort uint16, flags header.TCPFlags, seq uint32, options []byte) []byte {
	return encode(header.TCPFields{SrcPort: srcPort, DstPort: dstPort, SeqNum: seq, Flags: flags, WindowSize: 65535,
		DataOffset: uint8(header.TCPMinimumSize + len(options))}, options)
}

// encode is the packet of a segment; options are followed by data.
func encode(f header.TCPFields, optionsAndData []byte) []byte {
	size := header.TCPMinimumSize + len(optionsAndData)
	pkt := make([]byte, header.IPv4MinimumSize+size)
	src, dst := tcpip.AddrFrom4([4]byte{10, 9, 0, 1}), tcpip.AddrFrom4([4]byte{10, 7, 0, 2})
	ip := header.IPv4(pkt)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(pkt)), TTL: 64, Protocol: 6, SrcAddr: src, DstAddr: dst})
	ip.SetChecksum(^ip.CalculateChecksum())
	tcp := header.TCP(pkt[header.IPv4MinimumSize:])
	tcp.Encode(&f)
	copy(tcp[header.TCPMinimumSize:], optionsAndData)
	tcp.SetChecksum(^checksum.Checksum(tcp, header.PseudoHeaderChecksum(6, src, dst, uint16(size))))
	return pkt
}

// answers says what a segment from port gets: the flags of a TCP segment, or 0.
func (w *wire) answers(port uint16) header.TCPFlags {
	pkt := w.answer(func(b []byte) bool {
		return len(b) >= 40 && b[0]>>4 == 4 && b[9] == 6 && binary.BigEndian.Uint16(b[22:]) == port
	})
	if pkt == nil {
		return 0
	}
	return header.TCP(pkt[20:]).Flags()
}

const synAck = header.TCPFlagSyn | header.TCPFlagAck

func TestOddSegments(t *testing.T) {
	w, s := startWire(t, stack.Options{})
	const ece, cwr = header.TCPFlags(0x40), header.TCPFlags(0x80)
	for i, tt := range []struct {
		name    string
		dst     uint16
		flags   header.TCPFlags
		options []byte
		want    header.TCPFlags
	}{
		{"plain", 80, header.TCPFlagSyn, nil, synAck},
		{"ECN", 80, header.TCPFlagSyn | ece | cwr, nil, synAck},
		{"fast open cookie request", 80, header.TCPFlagSyn, []byte{34, 2, 1, 1}, synAck},
		{"MPTCP", 80, header.TCPFlagSyn, []byte{30, 4, 1, 1}, synAck},
		{"unknown option", 80, header.TCPFlagSyn, []byte{253, 4, 1, 1}, synAck},
		{"cut option", 80, header.TCPFlagSyn, []byte{1, 1, 8, 10}, synAck},
		{"refused", 9, header.TCPFlagSyn, nil, header.TCPFlagRst | header.TCPFlagAck},
		{"SYN and FIN", 80, header.TCPFlagSyn | header.TCPFlagFin, nil, 0},
		{"SYN and RST", 80, header.TCPFlagSyn | header.TCPFlagRst, nil, 0},
		{"stray RST", 80, header.TCPFlagRst, nil, 0},
		{"stray ACK", 80, header.TCPFlagAck, nil, header.TCPFlagRst},
	} {
		port := uint16(2000 + i)
		w.send(tun.Offload{}, segment(port, tt.dst, tt.flags, 7, tt.options))
		if got := w.answers(port); got != tt.want {
			t.Errorf("%s: answered %v, want %v", tt.name, got, tt.want)
		}
	}
	if n := s.Stats().OddSYN; n != 2 {
		t.Errorf("%d odd SYNs counted, want 2", n)
	}
}

func TestWhatIsTurnedAwayIsCounted(t *testing.T) {
	w, s := startWire(t, stack.Options{Local: func(a netip.Addr) bool { return a == netip.MustParseAddr("10.9.0.1") }})
	good := segment(3000, 80, header.TCPFlagSyn, 1, nil)
	change := func(f func(b []byte)) []byte {
		b := append([]byte(nil), good...)
		f(b)
		ip := header.IPv4(b)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		return b
	}
	for _, tt := range []struct {
		name  string
		pkt   []byte
		count func(stack.Stats) uint64
	}{
		{"spoofed source", change(func(b []byte) { b[15] = 9 }), func(s stack.Stats) uint64 { return s.NotLocal }},
		{"wrong TCP sum", change(func(b []byte) { b[36]++ }), func(s stack.Stats) uint64 { return s.BadChecksum }},
		{"wrong IP sum", func() []byte { b := change(func([]byte) {}); b[10]++; return b }(), func(s stack.Stats) uint64 { return s.BadChecksum }},
		{"cut", good[:25], func(s stack.Stats) uint64 { return s.Malformed }},
		{"multicast", change(func(b []byte) { b[16] = 224 }), func(s stack.Stats) uint64 { return s.Multicast }},
		{"protocol 132", change(func(b []byte) { b[9] = 132 }), func(s stack.Stats) uint64 { return s.OtherProtocol }},
	} {
		before := tt.count(s.Stats())
		w.send(tun.Offload{}, tt.pkt)
		w.send(tun.Offload{}, nil) // taken only after the first was looked at
		if got := tt.count(s.Stats()) - before; got < 1 {
			t.Errorf("%s: not counted", tt.name)
		}
	}
	// The last one is told so: protocol unreachable.
	if w.answer(func(b []byte) bool { return b[9] == 1 && b[20] == 3 && b[21] == 2 }) == nil {
		t.Error("protocol 132 was not answered with protocol unreachable")
	}
}

// A flood of SYNs from many ports to an open port, half of them never answered
// by an ACK, leaves no more than the bound, and a new client is served.
func TestFloodOfSYNs(t *testing.T) {
	w, s := startWire(t, stack.Options{TCP: stack.TCPOptions{Pending: 256}})
	for i := range 20_000 {
		w.send(tun.Offload{}, segment(uint16(1024+i), uint16(80+i>>16), header.TCPFlagSyn, uint32(i), nil))
	}
	st := s.Stats()
	if st.Pending > 256 || st.Evicted+st.EvictedSource+st.EvictedDest == 0 {
		t.Errorf("%d pending, %d evicted, bound 256", st.Pending, st.Evicted+st.EvictedSource+st.EvictedDest)
	}
	for len(w.out) > 0 {
		<-w.out
	}
	w.send(tun.Offload{}, segment(500, 80, header.TCPFlagSyn, 1, nil))
	if got := w.answers(500); got != synAck {
		t.Errorf("a client after the flood got %v", got)
	}
}

// oddPackets are what FuzzPackets begins with, and TestMutatedPackets changes.
func oddPackets() [][]byte {
	return [][]byte{
		segment(4000, 80, header.TCPFlagSyn, 1, []byte{2, 4, 5, 180}),
		segment(4000, 80, header.TCPFlagAck|header.TCPFlagPsh, 2, nil),
		{0x45, 0, 0, 28, 0, 0, 0x20, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 7, 0, 2, 0, 1, 0, 2, 0, 8, 0, 0},
		{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 9, 0, 1, 10, 7, 0, 2, 8, 0, 0, 0, 0, 1, 0, 1},
		append([]byte{0x60, 0, 0, 0, 0, 16, 44, 64, 0xfd, 9, 15: 0, 23: 1, 24: 0xfd, 7, 39: 2}, 6, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 2, 0, 0, 0, 0),
		{0x46, 0, 0, 24, 0, 0, 0, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 7, 0, 2, 131, 4, 4, 0},
	}
}

// resumIP makes the sum of a v4 header right, if it is one: what is mutated is to
// get past it.
func resumIP(pkt []byte) {
	if len(pkt) < 20 || pkt[0]>>4 != 4 {
		return
	}
	if n := int(pkt[0]&15) * 4; n >= 20 && n <= len(pkt) {
		ip := header.IPv4(pkt)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
	}
}

// A flood of packets with mutated lengths, options, extension headers and ICMP
// inside ICMP ends nothing, fills nothing, and clients are served beside it.
func TestMutatedPackets(t *testing.T) {
	n := 50_000
	if labtest.Soak() {
		n = 1_000_000
	}
	w, s := startWire(t, stack.Options{TCP: stack.TCPOptions{Pending: 256}})
	seeds := oddPackets()
	// An ICMP error about a segment, one about that, and extension headers in a row.
	inner := seeds[0]
	for _, kind := range []byte{3, 11} {
		b := append([]byte{0x45, 0, 0, byte(28 + len(inner)), 0, 0, 0, 0, 64, 1, 0, 0, 10, 9, 0, 1, 10, 7, 0, 2, kind, 1, 0, 0, 0, 0, 0, 0}, inner...)
		seeds, inner = append(seeds, b), b
	}
	six := append([]byte{0x60, 0, 0, 0, 0, 56, 0, 64, 0xfd, 9, 15: 0, 23: 1, 24: 0xfd, 7, 39: 2},
		60, 0, 1, 4, 0, 0, 0, 0, 43, 0, 1, 4, 0, 0, 0, 0, 60, 0, 4, 0, 0, 0, 0, 0, 44, 0, 1, 4, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 9,
		0x12, 0x34, 0, 7, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)
	seeds = append(seeds, six)
	rng := rand.New(rand.NewChaCha8([32]byte{4}))
	var start runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&start)
	for i := range n {
		pkt := append([]byte(nil), seeds[rng.IntN(len(seeds))]...)
		for range 1 + rng.IntN(6) {
			switch at := rng.IntN(len(pkt)); rng.IntN(4) {
			case 0:
				pkt[at] = byte(rng.Uint32())
			case 1:
				pkt[at] ^= 1 << rng.IntN(8)
			case 2:
				pkt = pkt[:max(1, at)]
			case 3:
				pkt = append(pkt, make([]byte, rng.IntN(64))...)
			}
		}
		if rng.IntN(8) > 0 {
			resumIP(pkt)
		}
		off := tun.Offload{NeedsCsum: rng.IntN(2) == 0}
		if rng.IntN(4) == 0 {
			off.GSOType, off.GSOSize = uint8(rng.IntN(8)), uint16(rng.IntN(3000))
		}
		w.send(off, pkt)
		if i%(n/20) != 0 {
			continue
		}
		for len(w.out) > 0 {
			<-w.out
		}
		port := uint16(50_000 + i/(n/20))
		w.send(tun.Offload{}, segment(port, 81, header.TCPFlagSyn, uint32(i), nil))
		if got := w.answers(port); got != synAck {
			t.Errorf("after %d packets a client got %v", i, got)
		}
	}
	var end runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&end)
	t.Logf("heap %d MiB at first, %d MiB after %d packets; %+v", start.HeapInuse>>20, end.HeapInuse>>20, n, s.Stats())
	if grown := int64(end.HeapInuse) - int64(start.HeapInuse); grown > 96<<20 {
		t.Errorf("%d MiB more after the flood", grown>>20)
	}
}

// Whatever comes in, a client is served after it.
func FuzzPackets(f *testing.F) {
	for _, seed := range oddPackets() {
		f.Add(seed, uint8(0), uint16(0), true)
		f.Add(seed, uint8(1), uint16(1400), false)
	}
	w, _ := startWire(f, stack.Options{})
	port, seq := uint16(10000), uint32(0)
	f.Fuzz(func(t *testing.T, pkt []byte, kind uint8, size uint16, fixSum bool) {
		pkt = append([]byte(nil), pkt[:min(len(pkt), 65535)]...)
		if fixSum {
			resumIP(pkt)
		}
		w.send(tun.Offload{GSOType: kind, GSOSize: size, NeedsCsum: fixSum}, pkt)
		for len(w.out) > 0 {
			<-w.out
		}
		if port++; port < 10000 {
			port = 10000
		}
		seq += 100_000
		w.send(tun.Offload{}, segment(port, 81, header.TCPFlagSyn, seq, nil))
		got := w.answers(port)
		if got != synAck {
			t.Errorf("a client after it got %v", got)
		}
		w.send(tun.Offload{}, segment(port, 81, header.TCPFlagRst, seq+1, nil))
	})
}
