package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/tun"
)

// fakeTun keeps the packets that were written.
type fakeTun struct {
	mu      sync.Mutex
	packets []writtenPacket
	noUSO   bool // an old kernel
	err     error
}

type writtenPacket struct {
	off tun.Offload
	pkt []byte
}

func (f *fakeTun) write(off tun.Offload, pieces [][]byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	if f.noUSO && off.GSOType != tun.GSONone {
		return fmt.Errorf("write packet: %w", unix.EINVAL)
	}
	f.packets = append(f.packets, writtenPacket{off, slices.Concat(pieces...)})
	return nil
}

func (f *fakeTun) take() []writtenPacket {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.packets
	f.packets = nil
	return p
}

// packetsHandler serves every source with serve.
type packetsHandler struct {
	serve func(context.Context, flow.PacketConn)
}

func (h packetsHandler) ServeStream(_ context.Context, s flow.Stream) { s.Reject(flow.Refused, nil) }
func (h packetsHandler) ServePackets(ctx context.Context, c flow.PacketConn) {
	h.serve(ctx, c)
}

// startUDP runs a udp whose sources come out of the channel; their handlers end
// with the test or when the source is closed.
func startUDP(t testing.TB, o UDPOptions) (*udp, *fakeTun, chan flow.PacketConn) {
	device := new(fakeTun)
	sources := make(chan flow.PacketConn, 64)
	u := newUDP(udpConfig{Proto: flow.UDP, UDPOptions: o, Attachment: "home", Write: device.write, Handler: packetsHandler{func(ctx context.Context, c flow.PacketConn) {
		c.Begun()
		sources <- c
		<-ctx.Done()
	}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = u.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return u, device, sources
}

// packet gives u what the reader of a tun would give it.
func (u *udp) packet(off tun.Offload, pkt []byte) {
	if h, err := parseIP(pkt, len(pkt)); err == nil && h.proto == protoUDP && !h.fragment {
		u.deliver(off, h, pkt)
	}
}

var local = tun.Offload{NeedsCsum: true}

func readOne(t *testing.T, c flow.PacketConn) flow.Datagram {
	t.Helper()
	dgs := []flow.Datagram{{Data: make([]byte, 64<<10)}}
	n, err := c.ReadBatch(dgs)
	if n != 1 || err != nil {
		t.Fatalf("read %d datagrams: %v", n, err)
	}
	return dgs[0]
}

func TestOneSourceHasOneSessionForAllPeers(t *testing.T) {
	u, device, sources := startUDP(t, UDPOptions{})
	other := netip.MustParseAddrPort("198.51.100.9:9")
	u.packet(local, udpPacket(client4, server4, []byte("one")))
	u.packet(local, udpPacket(client4, other, []byte("two")))
	u.deliverReassembled(client4, server4, 64, []byte("three"))
	c := <-sources
	if f := c.Flow(); f.Src != client4 || f.Dst != (netip.AddrPort{}) || f.Proto != flow.UDP || f.Attachment != "home" {
		t.Errorf("flow %+v", f)
	}
	for _, want := range []struct {
		peer netip.AddrPort
		data string
	}{{server4, "one"}, {other, "two"}, {server4, "three"}} {
		if d := readOne(t, c); d.Peer != want.peer || string(d.Data) != want.data || d.Segment != 0 {
			t.Errorf("got %v %q, want %+v", d.Peer, d.Data, want)
		}
	}
	// From whoever it is, it goes to the client (RFC 4787 §5).
	stranger := netip.MustParseAddrPort("203.0.113.5:777")
	if n, err := c.WriteBatch([]flow.Datagram{{Peer: stranger, Data: []byte("hi")}}); n != 1 || err != nil {
		t.Fatalf("wrote %d: %v", n, err)
	}
	got := parseWritten(t, device.take())
	if want := []writtenDatagram{{stranger, client4, "hi"}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	// Another port of the same address is another source.
	u.packet(local, udpPacket(netip.AddrPortFrom(client4.Addr(), 4001), server4, nil))
	if c2 := <-sources; c2.Flow().Src.Port() != 4001 {
		t.Errorf("second source %v", c2.Flow().Src)
	}
	if got := u.counters(); got.Sessions != 2 || got.Opened != 2 {
		t.Errorf("counters %+v", got)
	}
}

type writtenDatagram struct {
	src, dst netip.AddrPort
	data     string
}

// parseWritten does what the kernel does with packets from a tun: finishes the
// sums and cuts joined ones up.
func parseWritten(t *testing.T, packets []writtenPacket) (all []writtenDatagram) {
	t.Helper()
	for _, p := range packets {
		h, err := parseIP(p.pkt, len(p.pkt))
		if err != nil || h.end != len(p.pkt) {
			t.Fatalf("written packet is wrong: %v (%d of %d bytes)", err, h.end, len(p.pkt))
		}
		seg := p.pkt[h.off:]
		if !p.off.NeedsCsum || int(p.off.CsumStart) != h.off || p.off.CsumOffset != 6 ||
			binary.BigEndian.Uint16(seg[6:]) != pseudoSum(protoUDP, h.src, h.dst, len(seg)) {
			t.Errorf("checksum is not left to the kernel: %+v", p.off)
		}
		if int(binary.BigEndian.Uint16(seg[4:])) != len(seg) {
			t.Errorf("UDP length %d of %d", binary.BigEndian.Uint16(seg[4:]), len(seg))
		}
		src := netip.AddrPortFrom(h.src, binary.BigEndian.Uint16(seg))
		dst := netip.AddrPortFrom(h.dst, binary.BigEndian.Uint16(seg[2:]))
		data := seg[8:]
		if p.off.GSOType == tun.GSOUDPL4 {
			if int(p.off.HdrLen) != h.off+8 || p.off.GSOSize == 0 || int(p.off.GSOSize) >= len(data) {
				t.Errorf("offload %+v of %d bytes", p.off, len(data))
			}
			for len(data) > int(p.off.GSOSize) {
				all = append(all, writtenDatagram{src, dst, string(data[:p.off.GSOSize])})
				data = data[p.off.GSOSize:]
			}
		}
		all = append(all, writtenDatagram{src, dst, string(data)})
	}
	return all
}

func TestDatagramsOfEverySizePass(t *testing.T) {
	u, device, sources := startUDP(t, UDPOptions{})
	for _, tt := range []struct {
		client, server netip.AddrPort
		largest        int
	}{{client4, server4, maxPayload4}, {client6, server6, maxPayload6}} {
		var c flow.PacketConn
		for _, size := range []int{0, 1, 1472, 2048, 2049, 8192, 16384, 16385, 65507, tt.largest} {
			want := bytes.Repeat([]byte{byte(size + 1)}, size)
			u.packet(local, udpPacket(tt.client, tt.server, want))
			if c == nil {
				c = <-sources
			}
			d := readOne(t, c)
			if !bytes.Equal(d.Data, want) {
				t.Errorf("%d bytes: got %d", size, len(d.Data))
			}
			if n, err := c.WriteBatch([]flow.Datagram{d}); n != 1 || err != nil {
				t.Fatalf("%d bytes: wrote %d: %v", size, n, err)
			}
			got := parseWritten(t, device.take())
			if len(got) != 1 || got[0].data != string(want) || got[0].src != tt.server || got[0].dst != tt.client {
				t.Errorf("%d bytes: %d datagrams came back", size, len(got))
			}
		}
		if n, err := c.WriteBatch([]flow.Datagram{{Peer: tt.server, Data: make([]byte, tt.largest+1)}}); n != 1 || err != nil {
			t.Errorf("too large: wrote %d: %v", n, err)
		}
	}
	if lost := u.counters().Unwritten; lost != 2 {
		t.Errorf("%d counted as lost, want the 2 that are too large", lost)
	}
}

func TestJoinedDatagramsStayJoined(t *testing.T) {
	u, _, sources := startUDP(t, UDPOptions{})
	payload := make([]byte, 40*1200+7)
	off := tun.Offload{NeedsCsum: true, GSOType: tun.GSOUDPL4, GSOSize: 1200}
	u.packet(off, udpPacket(client4, server4, payload))
	u.packet(off, udpPacket(client4, server4, payload[:1200])) // only one
	c := <-sources
	if d := readOne(t, c); d.Segment != 1200 || len(d.Data) != len(payload) {
		t.Errorf("got %d bytes in segments of %d", len(d.Data), d.Segment)
	}
	if d := readOne(t, c); d.Segment != 0 || len(d.Data) != 1200 {
		t.Errorf("got %d bytes in segments of %d", len(d.Data), d.Segment)
	}
	off.GSOSize = 0
	u.packet(off, udpPacket(client4, server4, payload))
	off = tun.Offload{NeedsCsum: true, GSOType: tun.GSOTCPv4, GSOSize: 1200}
	u.packet(off, udpPacket(client4, server4, payload))
	if bad := u.counters().Malformed; bad != 2 {
		t.Errorf("%d counted as malformed, want 2", bad)
	}
}

func TestWritesAreJoined(t *testing.T) {
	peer2 := netip.MustParseAddrPort("192.0.2.8:53")
	d := func(peer netip.AddrPort, size int) flow.Datagram {
		return flow.Datagram{Peer: peer, Data: bytes.Repeat([]byte{byte(size)}, size)}
	}
	joined := flow.Datagram{Peer: server4, Data: make([]byte, 1000), Segment: 300}
	tests := []struct {
		name    string
		dgs     []flow.Datagram
		packets int
	}{
		{"one", []flow.Datagram{d(server4, 100)}, 1},
		{"equal", []flow.Datagram{d(server4, 100), d(server4, 100), d(server4, 100)}, 1},
		{"last shorter", []flow.Datagram{d(server4, 100), d(server4, 100), d(server4, 99)}, 1},
		{"shorter ends it", []flow.Datagram{d(server4, 100), d(server4, 99), d(server4, 100)}, 2},
		{"longer begins one", []flow.Datagram{d(server4, 100), d(server4, 101)}, 2},
		{"empty ones alone", []flow.Datagram{d(server4, 0), d(server4, 0), d(server4, 100), d(server4, 0)}, 4},
		{"peers apart", []flow.Datagram{d(server4, 100), d(peer2, 100), d(server4, 100)}, 3},
		{"joined already", []flow.Datagram{joined, joined, d(server4, 300)}, 3},
		{"65,507 bytes at most", slices.Repeat([]flow.Datagram{d(server4, 30000)}, 5), 3},
		{"61 at most", slices.Repeat([]flow.Datagram{d(server4, 10)}, 62), 2},
	}
	for _, old := range []bool{false, true} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s, old kernel %v", tt.name, old), func(t *testing.T) {
				u, device, sources := startUDP(t, UDPOptions{})
				device.noUSO = old
				u.packet(local, udpPacket(client4, server4, nil))
				if n, err := (<-sources).WriteBatch(tt.dgs); n != len(tt.dgs) || err != nil {
					t.Fatalf("wrote %d: %v", n, err)
				}
				packets := device.take()
				if !old && len(packets) != tt.packets {
					t.Errorf("%d packets, want %d", len(packets), tt.packets)
				}
				var want []writtenDatagram
				for _, d := range tt.dgs {
					if d.Segment == 0 {
						want = append(want, writtenDatagram{d.Peer, client4, string(d.Data)})
						continue
					}
					for part := range slices.Chunk(d.Data, d.Segment) {
						want = append(want, writtenDatagram{d.Peer, client4, string(part)})
					}
				}
				if got := parseWritten(t, packets); !slices.Equal(got, want) {
					t.Errorf("%d datagrams, want %d, or they differ", len(got), len(want))
				}
			})
		}
	}
}

func TestWriteErrors(t *testing.T) {
	u, device, sources := startUDP(t, UDPOptions{})
	u.packet(local, udpPacket(client4, server4, nil))
	c := <-sources
	device.err = fmt.Errorf("write packet: %w", unix.ENOBUFS)
	if n, err := c.WriteBatch([]flow.Datagram{{Peer: server4}, {Peer: server6}}); n != 2 || err != nil {
		t.Errorf("full: %d, %v", n, err)
	}
	if lost := u.counters().Unwritten; lost != 2 {
		t.Errorf("%d counted", lost)
	}
	device.err = fmt.Errorf("write packet: %w", io.ErrClosedPipe)
	if n, err := c.WriteBatch([]flow.Datagram{{Peer: server4}}); n != 1 || err != nil {
		t.Errorf("odd error: %d, %v", n, err)
	}
	device.err = os.ErrClosed
	if n, err := c.WriteBatch([]flow.Datagram{{Peer: server4}}); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("gone: %d, %v", n, err)
	}
}

func TestBadDatagramsAreCounted(t *testing.T) {
	u, _, _ := startUDP(t, UDPOptions{})
	good := udpPacket(client4, server4, []byte("hello"))
	wrongSum := edit(good, func(b []byte) { b[len(b)-1]++ })
	for _, pkt := range [][]byte{
		edit(good, func(b []byte) { b[25] = 7 }),                                              // UDP length below its header
		edit(good, func(b []byte) { b[24] = 1 }),                                              // and beyond the packet
		edit(good, func(b []byte) { b[20], b[21] = 0, 0 }),                                    // from port 0
		edit(good, func(b []byte) { b[22], b[23] = 0, 0 }),                                    // to port 0
		udpPacket(client4, netip.MustParseAddrPort("224.0.0.251:5353"), nil),                  // multicast
		udpPacket(netip.MustParseAddrPort("0.0.0.0:68"), server4, nil),                        // from nobody
		resum(edit(good, func(b []byte) { binary.BigEndian.PutUint16(b[2:], uint16(20+7)) })), // no room
	} {
		u.packet(local, pkt)
	}
	u.packet(tun.Offload{}, wrongSum)
	if got, want := u.counters(), (UDPCounters{Malformed: 7, BadSum: 1}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	u.packet(tun.Offload{}, good)
	u.packet(tun.Offload{DataValid: true}, wrongSum)
	if got := u.counters(); got.Sessions != 1 || got.BadSum != 1 {
		t.Errorf("good ones: %+v", got)
	}
}

func TestQueueIsBounded(t *testing.T) {
	tests := []struct {
		name string
		o    UDPOptions
		size int
		fit  int
	}{
		{"packets", UDPOptions{QueuePackets: 5}, 10, 5},
		{"bytes", UDPOptions{QueueBytes: 8 << 10}, 10, 4},
		{"bytes of large ones", UDPOptions{QueueBytes: 130 << 10}, 60000, 2},
		{"bytes of all", UDPOptions{TotalBytes: 6 << 10}, 10, 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, _, sources := startUDP(t, tt.o)
			for range 10 {
				u.packet(local, udpPacket(client4, server4, make([]byte, tt.size)))
			}
			if full := u.counters().QueueFull; int(full) != 10-tt.fit {
				t.Errorf("%d dropped, want %d", full, 10-tt.fit)
			}
			c := <-sources
			for range tt.fit {
				readOne(t, c)
			}
			if q := u.queued.Load(); q != 0 {
				t.Errorf("%d bytes are counted in an empty queue", q)
			}
			// There is room again.
			u.packet(local, udpPacket(client4, server4, make([]byte, tt.size)))
			readOne(t, c)
		})
	}
}

// The lent data stays what it was until the next call.
func TestLentDataHolds(t *testing.T) {
	u, _, sources := startUDP(t, UDPOptions{})
	u.packet(local, udpPacket(client4, server4, []byte("first")))
	s := (<-sources).(*session)
	dgs := make([]flow.Datagram, 4)
	n, err := s.ReadLent(dgs)
	if n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for range 100 {
		u.packet(local, udpPacket(client4, server4, []byte("other")))
	}
	if string(dgs[0].Data) != "first" {
		t.Errorf("lent data became %q", dgs[0].Data)
	}
	total := 0
	for total < 100 {
		n, err := s.ReadLent(dgs)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range dgs[:n] {
			if string(d.Data) != "other" {
				t.Fatalf("got %q", d.Data)
			}
		}
		total += n
	}
}

// A handler that returns ends its session, and the next datagram gets a new one.
func TestSessionEndsWithItsHandler(t *testing.T) {
	calls := make(chan flow.PacketConn, 10)
	u := newUDP(udpConfig{Proto: flow.UDP, Write: new(fakeTun).write, Handler: packetsHandler{func(_ context.Context, c flow.PacketConn) {
		_, _ = c.ReadBatch([]flow.Datagram{{}})
		calls <- c
	}}})
	// Before run, too: nothing gets lost.
	u.packet(local, udpPacket(client4, server4, []byte("x")))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = u.run(ctx) }()
	first := <-calls
	for u.counters().Sessions != 0 {
		time.Sleep(time.Millisecond)
	}
	u.packet(local, udpPacket(client4, server4, []byte("y")))
	if second := <-calls; second == first {
		t.Error("the same session twice")
	}
	cancel()
	<-done
	u.packet(local, udpPacket(client4, server4, []byte("z")))
	if got := u.counters(); got.Opened != 2 || got.Sessions != 0 {
		t.Errorf("after the end: %+v", got)
	}
}

func TestClientIsToldByICMP(t *testing.T) {
	u, device, sources := startUDP(t, UDPOptions{ICMPRate: 10})
	u.packet(local, udpPacket(client6, server6, nil))
	c := (<-sources).(*session)
	if err := c.Unreachable(server6, flow.Refused, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Unreachable(server6, flow.TooBig, &flow.ICMPError{Type: 2, Info: 1300}); err != nil {
		t.Fatal(err)
	}
	packets := device.take()
	if len(packets) != 2 {
		t.Fatalf("%d packets", len(packets))
	}
	h, kind, code, _ := checkICMP(t, packets[0].pkt)
	if kind != 1 || code != 4 || h.dst != client6.Addr() || h.src != server6.Addr() {
		t.Errorf("type %d code %d to %v", kind, code, h.dst)
	}
	quoted, err := parseIP(packets[0].pkt[h.off+8:], len(packets[0].pkt[h.off+8:]))
	if err != nil || quoted.src != client6.Addr() || quoted.dst != server6.Addr() {
		t.Errorf("quotes %+v: %v", quoted, err)
	}
	if _, kind, _, mtu := checkICMP(t, packets[1].pkt); kind != 2 || mtu != 1300 {
		t.Errorf("type %d MTU %d", kind, mtu)
	}
	// Nothing for silence, another family, or beyond the rate.
	_ = c.Unreachable(server6, flow.Dropped, nil)
	_ = c.Unreachable(server4, flow.Refused, nil)
	if n := len(device.take()); n != 0 {
		t.Errorf("%d packets", n)
	}
	for range 100 {
		_ = c.Unreachable(server6, flow.Refused, nil)
	}
	if n := len(device.take()); n > 12 || u.counters().ICMPLimit < 88 {
		t.Errorf("%d of 100 sent, %d limited", n, u.counters().ICMPLimit)
	}
}

func FuzzDeliver(f *testing.F) {
	seedPackets(f)
	u, _, _ := startUDP(f, UDPOptions{Sessions: 4, TotalBytes: 1 << 20})
	f.Fuzz(func(t *testing.T, pkt []byte) {
		u.packet(tun.Offload{}, pkt)
		u.packet(tun.Offload{NeedsCsum: true, GSOType: tun.GSOUDPL4, GSOSize: 3}, pkt)
		if n := u.counters().Sessions; n > 4 {
			t.Errorf("%d sessions", n)
		}
	})
}

func BenchmarkDeliver(b *testing.B) {
	for _, size := range []int{64, 1200, 48000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			device := new(fakeTun)
			u := newUDP(udpConfig{Proto: flow.UDP, Write: device.write, Handler: packetsHandler{func(_ context.Context, c flow.PacketConn) {
				dgs := make([]flow.Datagram, 32)
				for {
					if _, err := c.(*session).ReadLent(dgs); err != nil {
						return
					}
				}
			}}})
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan struct{})
			go func() { defer close(done); _ = u.run(ctx) }()
			pkt := udpPacket(client4, server4, make([]byte, size))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				u.packet(local, pkt)
			}
			cancel()
			<-done
		})
	}
}

func BenchmarkWriteBatch(b *testing.B) {
	u, _, sources := startUDP(b, UDPOptions{})
	u.cfg.Write = func(tun.Offload, [][]byte) error { return nil }
	u.packet(local, udpPacket(client4, server4, nil))
	c := <-sources
	dgs := slices.Repeat([]flow.Datagram{{Peer: server4, Data: make([]byte, 1200)}}, 32)
	b.SetBytes(32 * 1200)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.WriteBatch(dgs); err != nil {
			b.Fatal(err)
		}
	}
}
