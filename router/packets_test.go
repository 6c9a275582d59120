package router_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// packetClient is a source whose datagrams the test sends by hand.
type packetClient struct {
	f    *flow.Flow
	sent chan flow.Datagram
	done chan struct{}
	once sync.Once
	got  chan flow.Datagram
	told chan told
}

type told struct {
	peer netip.AddrPort
	why  flow.Reason
	mtu  int
}

func newPacketClient() *packetClient {
	return &packetClient{
		f:    flow.New(flow.UDP, netip.MustParseAddrPort("10.9.0.1:4000"), netip.AddrPort{}, "home"),
		sent: make(chan flow.Datagram), done: make(chan struct{}),
		got: make(chan flow.Datagram, 100), told: make(chan told, 100),
	}
}

func (c *packetClient) Flow() *flow.Flow { return c.f }

func (c *packetClient) Begun() {}

func (c *packetClient) ReadBatch(dgs []flow.Datagram) (int, error) {
	select {
	case d := <-c.sent:
		d.Data = dgs[0].Data[:copy(dgs[0].Data, d.Data)]
		dgs[0] = d
		return 1, nil
	case <-c.done:
		return 0, io.EOF
	}
}

func (c *packetClient) WriteBatch(dgs []flow.Datagram) (int, error) {
	for _, d := range dgs {
		d.Data = append([]byte(nil), d.Data...)
		c.got <- d
	}
	return len(dgs), nil
}

func (c *packetClient) Unreachable(peer netip.AddrPort, why flow.Reason, said *flow.ICMPError) error {
	mtu := 0
	if said != nil {
		mtu = int(said.Info)
	}
	c.told <- told{peer, why, mtu}
	return nil
}

func (c *packetClient) Close() error {
	c.once.Do(func() { close(c.done) })
	return nil
}

// packetOutbound is an outbound whose sockets the test holds the other end of.
type packetOutbound struct {
	name  string
	fail  error
	open  chan *packetSocket
	local netip.Addr // that its sockets are bound to
}

func newPacketOutbound(name string) *packetOutbound {
	return &packetOutbound{name: name, open: make(chan *packetSocket, 100)}
}

func (o *packetOutbound) Name() string { return o.name }

func (o *packetOutbound) DialStream(context.Context, dialer.Target) (*dialer.Conn, error) {
	return nil, errors.ErrUnsupported
}

func (o *packetOutbound) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	if o.fail != nil {
		return nil, o.fail
	}
	s := &packetSocket{out: make(chan flow.Datagram, 100), in: make(chan any, 100), done: make(chan struct{})}
	o.open <- s
	return &dialer.PacketConn{Packets: s, Path: []string{o.name}, Local: o.local}, nil
}

type packetSocket struct {
	out  chan flow.Datagram // what the client sent
	in   chan any           // datagrams and errors to be read
	done chan struct{}
	once sync.Once
	err  atomic.Pointer[flow.PeerError] // of each write
}

// fail has writes fail.
func (s *packetSocket) fail(err *flow.PeerError) { s.err.Store(err) }

func (s *packetSocket) ReadBatch(dgs []flow.Datagram) (int, error) {
	select {
	case v := <-s.in:
		if err, ok := v.(error); ok {
			return 0, err
		}
		dgs[0] = v.(flow.Datagram)
		return 1, nil
	case <-s.done:
		return 0, io.ErrClosedPipe
	}
}

func (s *packetSocket) WriteBatch(dgs []flow.Datagram) (int, error) {
	if err := s.err.Load(); err != nil {
		return 0, err
	}
	for _, d := range dgs {
		d.Data = append([]byte(nil), d.Data...)
		s.out <- d
	}
	return len(dgs), nil
}

func (s *packetSocket) Close() error {
	s.once.Do(func() { close(s.done) })
	return nil
}

// servePackets routes a client in a bubble of its own time.
func servePackets(t *testing.T, o router.Options, list []rules.Config, outs map[string]dialer.Outbound, test func(*router.Router, *packetClient, context.CancelFunc)) {
	synctest.Test(t, func(t *testing.T) {
		set, err := rules.Compile(list)
		if err != nil {
			t.Fatal(err)
		}
		r := router.New(o)
		r.Reload(set, outs)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := newPacketClient()
		ended := make(chan struct{})
		go func() { defer close(ended); r.ServePackets(ctx, c) }()
		test(r, c, cancel)
		cancel()
		<-ended
		if n := r.Counters().FlowsLive; n != 0 {
			t.Errorf("%d flows live after the end", n)
		}
	})
}

func peerN(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 5000)
}

func reasons(r *router.Router) (all []string) {
	for _, i := range r.Flows() {
		what := i.State
		if i.Reason != nil {
			what += " " + *i.Reason
		}
		all = append(all, fmt.Sprintf("%v %s", i.Dst.Addr(), what))
	}
	return all
}

func TestDatagramsGoBothWaysThroughOneSocket(t *testing.T) {
	out := newPacketOutbound("up")
	servePackets(t, router.Options{}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, cancel context.CancelFunc) {
			c.sent <- flow.Datagram{Peer: peerN(1), Data: make([]byte, 3000), Segment: 1000}
			c.sent <- flow.Datagram{Peer: peerN(2), Data: nil}
			c.sent <- flow.Datagram{Peer: netip.MustParseAddrPort("[2001:db8::1]:1"), Data: []byte("six")}
			s, s6 := <-out.open, <-out.open
			if d := <-s.out; d.Peer != peerN(1) || len(d.Data) != 3000 || d.Segment != 1000 {
				t.Errorf("joined: got %d bytes in %d for %v", len(d.Data), d.Segment, d.Peer)
			}
			if d := <-s.out; d.Peer != peerN(2) || len(d.Data) != 0 {
				t.Errorf("empty: got %d bytes for %v", len(d.Data), d.Peer)
			}
			if d := <-s6.out; string(d.Data) != "six" {
				t.Errorf("v6: got %q", d.Data)
			}
			// From the peer, and from one that nothing was sent to.
			s.in <- flow.Datagram{Peer: peerN(1), Data: make([]byte, 77)}
			s.in <- flow.Datagram{Peer: peerN(9), Data: []byte("stranger")}
			if d := <-c.got; len(d.Data) != 77 || d.Peer != peerN(1) {
				t.Errorf("got %d bytes from %v", len(d.Data), d.Peer)
			}
			if d := <-c.got; string(d.Data) != "stranger" || d.Peer != peerN(9) {
				t.Errorf("got %q from %v", d.Data, d.Peer)
			}
			flows := r.Flows()
			if len(flows) != 3 {
				t.Fatalf("%d flows, want 3: %v", len(flows), reasons(r))
			}
			if f := flows[0]; f.UpBytes != 3000 || f.DownBytes != 77 || f.State != "open" || *f.Use != "up" || f.Path[0] != "up" {
				t.Errorf("flow %+v", f)
			}
			if n := r.Outbounds()["up"].DialsTotal; n != 2 {
				t.Errorf("%d sockets counted, want one a family", n)
			}
			cancel()
			synctest.Wait()
			for _, got := range r.Flows() {
				if *got.Reason != "canceled" {
					t.Errorf("%v ended with %s", got.Dst, *got.Reason)
				}
			}
		})
}

func TestRefusalsAreToldAndRememberedForAMoment(t *testing.T) {
	up := newPacketOutbound("up")
	broken := &packetOutbound{name: "broken", fail: &dialer.Error{Hop: "broken", Op: "open", Reason: flow.NetUnreachable, Err: unix.ENETUNREACH}}
	streams := &packetOutbound{name: "streams", fail: errors.ErrUnsupported}
	cidr := func(n int) []netip.Prefix { return []netip.Prefix{netip.PrefixFrom(peerN(n).Addr(), 32)} }
	list := []rules.Config{
		{CIDR: cidr(1), Use: "reject"}, {CIDR: cidr(2), Use: "drop"}, {CIDR: cidr(3), Use: "broken"},
		{CIDR: cidr(4), Use: "streams"}, {CIDR: cidr(5), Use: "nobody"}, {Use: "up"},
	}
	outs := map[string]dialer.Outbound{"up": up, "broken": broken, "streams": streams}
	tests := []struct {
		peer       int
		tell       flow.Reason
		flow       string
		remembered time.Duration
	}{
		{1, flow.Prohibited, "prohibited", 10 * time.Second},
		{2, flow.Dropped, "dropped", 10 * time.Second},
		{3, flow.Refused, "network unreachable", time.Second},
		{4, flow.Refused, "refused", 10 * time.Second},
		{5, flow.NetUnreachable, "network unreachable", 10 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.flow, func(t *testing.T) {
			servePackets(t, router.Options{}, list, outs, func(r *router.Router, c *packetClient, _ context.CancelFunc) {
				for range 3 {
					c.sent <- flow.Datagram{Peer: peerN(tt.peer)}
					if got := <-c.told; got != (told{peerN(tt.peer), tt.tell, 0}) {
						t.Errorf("told %+v, want %v", got, tt.tell)
					}
				}
				flows := r.Flows()
				if len(flows) != 1 || flows[0].State != "closed" || *flows[0].Reason != tt.flow {
					t.Errorf("flows %v, want one closed as %s", reasons(r), tt.flow)
				}
				time.Sleep(tt.remembered)
				c.sent <- flow.Datagram{Peer: peerN(tt.peer)}
				<-c.told
				if n := len(r.Flows()); n != 2 {
					t.Errorf("%d flows after %v, want another one", n, tt.remembered)
				}
				// The others of the source are not touched.
				c.sent <- flow.Datagram{Peer: peerN(20), Data: []byte("x")}
				s := <-up.open
				<-s.out
			})
		})
	}
}

func TestFailureOfOnePeerIsTold(t *testing.T) {
	out := newPacketOutbound("up")
	servePackets(t, router.Options{}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, _ context.CancelFunc) {
			c.sent <- flow.Datagram{Peer: peerN(1)}
			c.sent <- flow.Datagram{Peer: peerN(2)}
			s := <-out.open
			synctest.Wait()
			// One that nothing was sent to: made up, not passed on.
			s.in <- &flow.PeerError{Peer: peerN(9), Reason: flow.Refused, Err: unix.ECONNREFUSED}
			s.in <- &flow.PeerError{Peer: peerN(1), Reason: flow.TooBig, ICMP: &flow.ICMPError{Info: 1300}, Err: unix.EMSGSIZE}
			if got := <-c.told; got != (told{peerN(1), flow.TooBig, 1300}) {
				t.Errorf("told %+v", got)
			}
			s.in <- &flow.PeerError{Peer: peerN(2), Reason: flow.Refused, Err: unix.ECONNREFUSED}
			if got := <-c.told; got != (told{peerN(2), flow.Refused, 0}) {
				t.Errorf("told %+v", got)
			}
			// The conn goes on, and what comes after a failure forgives it.
			s.in <- flow.Datagram{Peer: peerN(1), Data: []byte("x")}
			<-c.got
			c.Close() // the source was idle
			synctest.Wait()
			want := map[netip.AddrPort]string{peerN(1): "closed", peerN(2): "refused"}
			for _, f := range r.Flows() {
				if *f.Reason != want[f.Dst] {
					t.Errorf("%v ended with %q, want %q", f.Dst, *f.Reason, want[f.Dst])
				}
			}
		})
}

func TestBrokenSocketIsOpenedAgain(t *testing.T) {
	out := newPacketOutbound("up")
	servePackets(t, router.Options{}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, _ context.CancelFunc) {
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("a")}
			s := <-out.open
			<-s.out
			time.Sleep(2 * time.Second)
			s.in <- fmt.Errorf("read: %w", unix.ENODEV)
			<-s.done // it was closed
			synctest.Wait()
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("b")}
			s = <-out.open
			if d := <-s.out; string(d.Data) != "b" {
				t.Errorf("got %q", d.Data)
			}
			if n := r.Counters().FlowsTotal; n != 2 {
				t.Errorf("%d flows, want a new one on the new socket", n)
			}
			// One that ends as soon as it is open is not opened by every datagram.
			s.in <- io.EOF
			<-s.done
			for range 3 {
				synctest.Wait()
				c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("c")}
				if got := <-c.told; got.why != flow.Refused {
					t.Errorf("told %+v", got)
				}
			}
			time.Sleep(time.Second)
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("d")}
			s = <-out.open
			if d := <-s.out; string(d.Data) != "d" {
				t.Errorf("got %q", d.Data)
			}
		})
}

func TestPeersAreBounded(t *testing.T) {
	tests := []struct {
		name string
		o    router.PacketOptions
		live uint64
	}{
		{"of one source", router.PacketOptions{PeersPerSource: 3}, 3},
		{"of all", router.PacketOptions{Peers: 5}, 5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out := newPacketOutbound("up")
			servePackets(t, router.Options{Packets: tt.o}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
				func(r *router.Router, c *packetClient, _ context.CancelFunc) {
					for n := range 20 {
						c.sent <- flow.Datagram{Peer: peerN(0)} // never the longest silent
						c.sent <- flow.Datagram{Peer: peerN(n)}
					}
					synctest.Wait()
					got := r.Counters()
					if got.FlowsLive != tt.live || got.PeersEvicted != 20-tt.live {
						t.Errorf("%d live, %d evicted", got.FlowsLive, got.PeersEvicted)
					}
					for _, f := range r.Flows() {
						if f.Dst == peerN(0) && f.State != "open" {
							t.Error("the busy one was evicted")
						}
					}
				})
		})
	}
}

func TestSilentPeerOfABusySourceEnds(t *testing.T) {
	out := newPacketOutbound("up")
	servePackets(t, router.Options{}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, _ context.CancelFunc) {
			c.sent <- flow.Datagram{Peer: peerN(1)}
			for range 33 {
				time.Sleep(10 * time.Second)
				c.sent <- flow.Datagram{Peer: peerN(2)}
			}
			synctest.Wait()
			if n := r.Counters().FlowsLive; n != 1 {
				t.Errorf("%d flows live: %v", n, reasons(r))
			}
		})
}

// countingOwners counts how often it is asked.
type countingOwners struct {
	mu sync.Mutex
	n  int
}

func (o *countingOwners) Owner(_ context.Context, f *flow.Flow) (*flow.Owner, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n++
	return &flow.Owner{Cgroup: "/a", PID: 7}, nil
}

func TestOwnerOfAScanIsLookedUpOnceASecond(t *testing.T) {
	owners := new(countingOwners)
	out := newPacketOutbound("up")
	servePackets(t, router.Options{Owners: owners}, []rules.Config{{Cgroup: []string{"/a"}, Use: "up"}, {Use: "drop"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, _ context.CancelFunc) {
			for n := range 50 {
				c.sent <- flow.Datagram{Peer: peerN(n)}
			}
			time.Sleep(2 * time.Second)
			c.sent <- flow.Datagram{Peer: peerN(99)}
			synctest.Wait()
			if owners.n != 2 {
				t.Errorf("asked %d times, want 2", owners.n)
			}
			for _, f := range r.Flows() {
				if f.Cgroup == nil || *f.Cgroup != "/a" || *f.Use != "up" {
					t.Errorf("flow %+v", f)
				}
			}
		})
}

// A fault in an outbound ends the flow, not its source and not the process.
func TestPanicEndsTheFlowAlone(t *testing.T) {
	out := &panickingOutbound{}
	synctest.Test(t, func(t *testing.T) {
		r := router.New(router.Options{})
		set, err := rules.Compile([]rules.Config{{Use: "up"}})
		if err != nil {
			t.Fatal(err)
		}
		r.Reload(set, map[string]dialer.Outbound{"up": out})
		c := newPacketClient()
		ended := make(chan struct{})
		go func() { defer close(ended); r.ServePackets(t.Context(), c) }()
		c.sent <- flow.Datagram{Peer: peerN(1)}
		c.sent <- flow.Datagram{Peer: peerN(2)}
		synctest.Wait()
		if got := r.Counters(); got.PanicsTotal != 2 || got.FlowsLive != 0 {
			t.Errorf("counters %+v", got)
		}
		c.Close()
		<-ended
	})
}

type panickingOutbound struct{}

func (panickingOutbound) Name() string { return "up" }
func (panickingOutbound) DialStream(context.Context, dialer.Target) (*dialer.Conn, error) {
	panic("stream")
}
func (panickingOutbound) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	panic("packets")
}

// initials are the first two datagrams of a client of QUIC 2 to quic.example, with
// X25519MLKEM768: the name is in neither of them alone.
func initials(t *testing.T) (all [2][]byte) {
	t.Helper()
	for i := range all {
		b, err := os.ReadFile(fmt.Sprintf("../testdata/quic/initial%d", i+1))
		if err != nil {
			t.Fatal(err)
		}
		all[i] = b
	}
	return all
}

// A rule by name holds for a client of QUIC whose first message is in two
// datagrams: both go the way that it says, in their order. What the client does
// not say in time goes by the rules for no name.
func TestNameInTwoDatagrams(t *testing.T) {
	both := initials(t)
	list := []rules.Config{{Domain: []string{"quic.example"}, Use: "named"}, {Use: "others"}}
	for _, tt := range []struct {
		name string
		sent [][]byte
		late time.Duration // between them
		want string
	}{
		{"two", both[:], 0, "named"},
		{"the second first", [][]byte{both[1], both[0]}, 10 * time.Millisecond, "named"},
		{"the first again and again", [][]byte{both[0], both[0]}, time.Second, "others"},
		{"no QUIC", [][]byte{[]byte("x")}, 0, "others"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			named, others := newPacketOutbound("named"), newPacketOutbound("others")
			outs := map[string]dialer.Outbound{"named": named, "others": others}
			servePackets(t, router.Options{}, list, outs, func(r *router.Router, c *packetClient, _ context.CancelFunc) {
				size := 0
				for _, b := range tt.sent {
					c.sent <- flow.Datagram{Peer: peerN(1), Data: b}
					size += len(b)
					time.Sleep(tt.late)
				}
				synctest.Wait()
				out := map[string]*packetOutbound{"named": named, "others": others}[tt.want]
				if len(named.open)+len(others.open) != 1 || len(out.open) != 1 {
					t.Fatalf("%d sockets of named, %d of others", len(named.open), len(others.open))
				}
				s := <-out.open
				for i, b := range tt.sent {
					if d := <-s.out; !bytes.Equal(d.Data, b) || d.Peer != peerN(1) {
						t.Errorf("datagram %d: got %d bytes for %v", i, len(d.Data), d.Peer)
					}
				}
				f := r.Flows()[0]
				if tt.want == "named" && (f.Name == nil || *f.Name != "quic.example" || *f.NameFrom != "quic") || f.UpBytes != int64(size) {
					t.Errorf("flow %+v", f)
				}
			})
		})
	}
}

// A source that finds no room takes none: it ends, and asks again with its next
// datagram.
func TestSourceWithoutRoomEnds(t *testing.T) {
	out := newPacketOutbound("up")
	servePackets(t, router.Options{MaxSockets: 1}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, cancel context.CancelFunc) {
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("first")}
			<-(<-out.open).out
			other := newPacketClient()
			go func() { other.sent <- flow.Datagram{Peer: peerN(2), Data: []byte("second")} }()
			began := time.Now()
			ctx, cancelOther := context.WithTimeout(context.Background(), time.Minute)
			defer cancelOther()
			r.ServePackets(ctx, other)
			if took := time.Since(began); took > 0 {
				t.Errorf("it stayed for %v", took)
			}
			if got := <-other.told; got.peer != peerN(2) || got.why != flow.Refused {
				t.Errorf("told %+v", got)
			}
			if n := r.Counters().FlowsLive; n != 1 {
				t.Errorf("%d flows live, want the first one's", n)
			}
		})
}
