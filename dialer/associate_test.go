package dialer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"cgtun/flow"
)

const associateRequest = "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"

// relayed is a proxy that makes one association, and the test's hold on it.
type relayed struct {
	t       *testing.T
	udp     *net.UDPConn // the relay
	from    netip.AddrPort
	control chan *net.TCPConn // when the association stands
	ended   chan struct{}     // its connection has ended
}

// newRelay returns an outbound to a proxy that answers a request for a relay
// with the reply that it is told, with the relay's port at its end.
func newRelay(t *testing.T, reply string) (*relayed, *Proxy) {
	t.Helper()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })
	_ = udp.SetReadBuffer(4 << 20)
	r := &relayed{t: t, udp: udp, control: make(chan *net.TCPConn, 1), ended: make(chan struct{})}
	port := udp.LocalAddr().(*net.UDPAddr).Port
	addr := proxyServer(t, func(c *net.TCPConn) {
		expect(t, c, hello)
		say(c, noAuth)
		expect(t, c, associateRequest)
		say(c, reply+string([]byte{byte(port >> 8), byte(port)}))
		r.control <- c
		_, _ = io.Copy(io.Discard, c)
		close(r.ended)
	})
	return r, proxyTo(t, Config{Type: TypeSOCKS5}, addr)
}

// got returns the next datagram that the relay gets.
func (r *relayed) got() string {
	r.t.Helper()
	_ = r.udp.SetReadDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 64<<10)
	n, from, err := r.udp.ReadFromUDPAddrPort(b)
	if err != nil {
		r.t.Fatal(err)
	}
	r.from = from
	return string(b[:n])
}

// send sends a datagram from the relay.
func (r *relayed) send(text string) {
	r.t.Helper()
	if _, err := r.udp.WriteToUDPAddrPort([]byte(text), r.from); err != nil {
		r.t.Fatal(err)
	}
}

var (
	peer4 = netip.MustParseAddrPort("192.0.2.7:53")
	peer6 = netip.MustParseAddrPort("[2001:db8::7]:53")
	// client is what a client's datagrams are asked for with.
	client = &flow.Flow{Proto: flow.UDP}
)

const (
	head4  = "\x00\x00\x00\x01\xc0\x00\x02\x07\x00\x35"
	mapped = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff" // before an IPv4 address
	head6  = "\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x00\x35"
)

// reads returns n datagrams, as "PEER/SEGMENT text".
func reads(t *testing.T, p Packets, n int) (list []string) {
	t.Helper()
	for len(list) < n {
		var dgs [4]flow.Datagram
		for i := range dgs {
			dgs[i].Data = make([]byte, 64<<10)
		}
		got, err := p.ReadBatch(dgs[:])
		if err != nil {
			t.Fatalf("after %q: %v", list, err)
		}
		for _, d := range dgs[:got] {
			// The parts of a joined one, one by one: the kernel joins as it likes.
			for data := d.Data; ; {
				part := data
				if d.Segment > 0 {
					part = data[:min(d.Segment, len(data))]
				}
				list = append(list, fmt.Sprintf("%v %.20s", d.Peer, part))
				if data = data[len(part):]; len(data) == 0 {
					break
				}
			}
		}
	}
	return list
}

// noContainer is a judge who knows of one.
func noContainer(a netip.AddrPort, _ []Leave) error {
	if a.Addr() == netip.MustParseAddr("198.51.100.9") {
		return &flow.Denied{Kind: "container"}
	}
	return nil
}

// Relays are found where the proxy says, or at the proxy; what comes from a third
// address has that as its source; nothing else gets through.
func TestAssociation(t *testing.T) {
	home := netip.MustParseAddr("127.0.0.3")
	if list, err := net.InterfaceAddrs(); err == nil {
		for _, a := range list {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
				home = p.Addr()
			}
		}
	}
	for name, reply := range map[string]string{
		"at home":         "\x05\x00\x00\x01" + string(home.AsSlice()),
		"own address":     "\x05\x00\x00\x01\x7f\x00\x00\x01",
		"none":            "\x05\x00\x00\x01\x00\x00\x00\x00",
		"none of v6":      "\x05\x00\x00\x04" + strings.Repeat("\x00", 16),
		"link-local":      "\x05\x00\x00\x04\xfe\x80" + strings.Repeat("\x00", 14),
		"name":            "\x05\x00\x00\x03\x05relay",
		"name with zone":  "\x05\x00\x00\x03\x0cfe80::1%eth0",
		"private":         "\x05\x00\x00\x01\x0a\x01\x02\x03",
		"back to us":      "\x05\x00\x00\x01\x7f\x00\x00\x02",
		"name of address": "\x05\x00\x00\x03\x09127.0.0.1",
		"a container":     "\x05\x00\x00\x01\xc6\x33\x64\x09",
	} {
		t.Run(name, func(t *testing.T) {
			r, p := newRelay(t, reply)
			p.judge = noContainer
			c, err := p.OpenPackets(t.Context(), Target{Addr: peer4, Flow: client})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.WriteBatch([]flow.Datagram{{Peer: peer4, Data: []byte("hello")}, {Peer: peer4}}); err != nil {
				t.Fatal(err)
			}
			if got := []string{r.got(), r.got()}; !slices.Equal(got, []string{head4 + "hello", head4}) {
				t.Errorf("the relay got %q", got)
			}
			if name != "own address" {
				return
			}
			stranger, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			defer stranger.Close()
			if _, err := stranger.WriteToUDPAddrPort([]byte(head4+"forged"), r.from); err != nil {
				t.Fatal(err)
			}
			for _, text := range []string{
				"", "\x00", "\x00\x00\x00", "\x00\x00\x00\x01\x7f", "\x00\x00\x01\x01\xc0\x00\x02\x07\x00\x35fragment",
				"\x00\x00\x00\x03\x04host\x00\x35name", "\x00\x00\x00\x03\x00\x00\x35no name", "\x00\x00\x00\x09\x00\x00\x00\x00\x00\x35",
				head6 + "other family", "\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x35loopback", "\x00\x00\x00\x01\xe0\x00\x00\x01\x00\x35multicast",
				"\x00\x00\x00\x01\xc0\x00\x02\x07\x00\x00no port", "\x00\x00\x00\x03\xff" + strings.Repeat("a", 255) + "\x00\x35long name",
				"\x00\x00\x00\x04" + mapped + "\x7f\x00\x00\x01\x00\x35loopback in v6", "\x00\x00\x00\x04" + mapped + "\xc0\x00\x02\x07\x00\x35mapped",
				head4 + "answer", "\x00\x00\x00\x01\xc6\x33\x64\x09\x04\xd2third", head4,
			} {
				r.send(text)
			}
			want := []string{"192.0.2.7:53 mapped", "192.0.2.7:53 answer", "198.51.100.9:1234 third", "192.0.2.7:53 "}
			if got := reads(t, c, len(want)); !slices.Equal(got, want) {
				t.Errorf("the client got %q, want %q", got, want)
			}
		})
	}
}

// The association lives and dies with its connection, whoever ends that.
func TestAssociationEndsWithItsConnection(t *testing.T) {
	open := func(t *testing.T) (*relayed, *PacketConn) {
		r, p := newRelay(t, "\x05\x00\x00\x01\x7f\x00\x00\x01")
		c, err := p.OpenPackets(t.Context(), Target{Addr: peer4, Flow: client})
		if err != nil {
			t.Fatal(err)
		}
		if c.Sockets != 2 || strings.Join(c.Path, " ") != "relay" {
			t.Errorf("%d sockets, path %q", c.Sockets, c.Path)
		}
		return r, c
	}
	ends := func(t *testing.T, c *PacketConn) {
		if n, err := c.ReadBatch(make([]flow.Datagram, 1)); err == nil {
			t.Errorf("read %d datagrams of a dead association", n)
		}
		c.Close()
	}
	t.Run("the proxy closes", func(t *testing.T) {
		r, c := open(t)
		_ = (<-r.control).Close()
		ends(t, c)
	})
	t.Run("the proxy says something", func(t *testing.T) {
		r, c := open(t)
		say(<-r.control, "x")
		ends(t, c)
	})
	t.Run("the relay is gone", func(t *testing.T) {
		r, c := open(t)
		r.udp.Close()
		_, _ = c.WriteBatch([]flow.Datagram{{Peer: peer4, Data: []byte("x")}})
		ends(t, c)
	})
	t.Run("we close", func(t *testing.T) {
		r, c := open(t)
		c.Close()
		<-r.ended
		if err := c.Close(); err != nil {
			t.Errorf("closed again: %v", err)
		}
	})
}

// What is joined goes out joined, with a header for each part; what is too long
// with its header is told, and the rest goes on.
func TestAssociationJoined(t *testing.T) {
	r, p := newRelay(t, "\x05\x00\x00\x01\x7f\x00\x00\x01")
	c, err := p.OpenPackets(t.Context(), Target{Addr: peer6, Flow: client})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	text := func(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }
	dgs := []flow.Datagram{
		{Peer: peer6, Data: text('a', 48_000), Segment: 1200},
		{Peer: peer6, Data: text('b', 1000), Segment: 300},
		{Peer: peer6, Data: text('c', 65_000), Segment: 40_000},
		{Peer: peer6, Data: text('d', 65_507)},
		{Peer: peer6, Data: text('e', 65_400)},
		{Peer: peer6, Data: text('f', 2000), Segment: 1},
		{Peer: peer6, Data: text('g', 10)},
	}
	var want []string
	for i, d := range dgs {
		for at := 0; at < len(d.Data) && i != 3; at += len(partAt(&d, at)) {
			want = append(want, head6+string(partAt(&d, at)))
		}
	}
	var got []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range want {
			got = append(got, r.got())
		}
	}()
	n, err := c.WriteBatch(dgs)
	var peer *flow.PeerError
	if n != 3 || !errors.As(err, &peer) || peer.Reason != flow.TooBig || peer.Peer != peer6 {
		t.Errorf("wrote %d, %v, want the fourth to be too long", n, err)
	}
	if n, err := c.WriteBatch(dgs[4:]); n != 3 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	<-done
	if !slices.Equal(got, want) {
		t.Errorf("the relay got %d datagrams, want %d, or others", len(got), len(want))
	}
}

// Parts that the kernel joined are cut apart, and stay joined where their far
// end is one.
func TestAssociationTakesJoined(t *testing.T) {
	other := strings.Replace(head4, "\x07", "\x08", 1)
	parts := []string{head4 + "aaaa", head4 + "bbbb", other + "cccc", "\x00\x00\x01" + head4[3:] + "dddd", head4 + "eeee", head4 + "ff"}
	a := &association{}
	a.take([]byte(strings.Join(parts, "")), len(parts[0]))
	a.take([]byte(head4+"gg"), 0)
	p8 := netip.MustParseAddrPort("192.0.2.8:53")
	want := []flow.Datagram{
		{Peer: peer4, Data: []byte("aaaabbbb"), Segment: 4}, {Peer: p8, Data: []byte("cccc")},
		{Peer: peer4, Data: []byte("eeeeff"), Segment: 4}, {Peer: peer4, Data: []byte("gg")},
	}
	if got := a.spare; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}

// A proxy without datagrams is asked once.
func TestAssociationIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name, reply string
		unsupported bool
		why         flow.Reason
	}{
		{"no such command", "\x05\x07\x00\x01", true, 0},
		{"not allowed", "\x05\x02\x00\x01", false, flow.Prohibited},
		{"no port", "\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00", false, flow.Unknown},
		{"hangs up", "", false, flow.HostUnreachable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := newFakeProxy(t, func(c *net.TCPConn) {
				expect(t, c, hello)
				say(c, noAuth)
				expect(t, c, associateRequest)
				say(c, tt.reply)
				_ = c.CloseWrite()
				_, _ = io.Copy(io.Discard, c)
			})
			p := proxyTo(t, Config{Type: TypeSOCKS5}, server.addr)
			_, err := p.OpenPackets(t.Context(), Target{Addr: peer4, Flow: client})
			if !tt.unsupported {
				checkError(t, err, "relay", "associate", tt.why, "")
				return
			}
			for range 2 {
				if !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("got %v, want that it is not supported", err)
				}
				_, err = p.OpenPackets(t.Context(), Target{Addr: peer4, Flow: client})
			}
			if asked := server.count(); asked != 1 {
				t.Errorf("asked %d times", asked)
			}
		})
	}
}

// What is known not to carry datagrams is not asked: no proxy by HTTP, and none
// that is reached through one.
func TestDatagramsByHTTPAreRefusedAtOnce(t *testing.T) {
	hops, err := New([]Config{
		{Name: "direct"}, {Name: "http", Type: TypeHTTP, Server: "192.0.2.1:3128"},
		{Name: "behind", Type: TypeSOCKS5, Server: "192.0.2.2:1080", Via: "http"},
		{Name: "socks5", Type: TypeSOCKS5, Server: "192.0.2.2:1080"},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, false, false, true} {
		if got := CanOpenPackets(hops[i]) == nil; got != want {
			t.Errorf("%s carries datagrams: %v, want %v", hops[i].Name(), got, want)
		}
		if want {
			continue
		}
		if _, err := hops[i].OpenPackets(t.Context(), Target{Addr: peer4, Flow: client}); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v, want that it is not supported", hops[i].Name(), err)
		}
	}
}

// FuzzSOCKS5Datagram: whatever a relay sends, what is handed out are addresses
// of hosts with the bytes that came with them, in their order.
func FuzzSOCKS5Datagram(f *testing.F) {
	f.Add([]byte(head4+"payload"), 0, false)
	f.Add([]byte(strings.Repeat(head4+"abcd", 5)+head4+"a"), 14, false)
	f.Add([]byte(strings.Repeat(head6+"abcd", 5)), 26, true)
	f.Add([]byte("\x00\x00\x00\x03\x04host\x00\x35name"), 0, false)
	f.Fuzz(func(t *testing.T, wire []byte, segment int, v6 bool) {
		if segment < 0 || segment >= len(wire) {
			segment = 0
		}
		var want, got []flow.Datagram
		for at := 0; at < len(wire); {
			part := partAt(&flow.Datagram{Data: wire, Segment: segment}, at)
			at += len(part)
			if peer, payload, ok := cutSocksHeader(part); ok && peer.Addr().Is6() == v6 && peer.Addr().IsGlobalUnicast() && peer.Port() != 0 {
				want = append(want, flow.Datagram{Peer: peer, Data: bytes.Clone(payload)})
			}
		}
		a := &association{v6: v6}
		a.take(wire, segment)
		for _, d := range a.spare {
			for at, more := 0, true; more; more = at < len(d.Data) {
				part := partAt(&d, at)
				at += len(part)
				got = append(got, flow.Datagram{Peer: d.Peer, Data: part})
			}
		}
		if !slices.EqualFunc(got, want, func(a, b flow.Datagram) bool { return a.Peer == b.Peer && bytes.Equal(a.Data, b.Data) }) {
			t.Fatalf("got %v\nwant %v", got, want)
		}
	})
}

// nowhere takes datagrams and drops them.
type nowhere struct{ Packets }

func (nowhere) WriteBatch(dgs []flow.Datagram) (int, error) { return len(dgs), nil }

// What the headers cost: a joined datagram of 40 parts, out and in.
func BenchmarkAssociation(b *testing.B) {
	data := make([]byte, 48_000)
	b.Run("write", func(b *testing.B) {
		a := &association{below: nowhere{}}
		dgs := []flow.Datagram{{Peer: peer4, Data: data, Segment: 1200}}
		b.SetBytes(int64(len(data)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := a.WriteBatch(dgs); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		a := &association{}
		part := append([]byte(head4), data[:1200]...)
		wire := bytes.Repeat(part, 40)
		joined := make([]byte, len(wire))
		b.SetBytes(int64(len(data)))
		b.ReportAllocs()
		for b.Loop() {
			copy(joined, wire) // it is cut in place
			a.spare = a.spare[:0]
			a.take(joined, len(part))
		}
	})
}
