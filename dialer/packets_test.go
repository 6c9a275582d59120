package dialer_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// openPackets opens the socket of a direct outbound; on a host of a lab if one
// is given.
func openPackets(t testing.TB, h *labtest.Host, c dialer.Config, dst netip.AddrPort) *dialer.PacketConn {
	t.Helper()
	c.Name = "up"
	d, err := dialer.NewDirect(c)
	if err != nil {
		t.Fatal(err)
	}
	var conn *dialer.PacketConn
	open := func() error {
		conn, err = d.OpenPackets(context.Background(), dialer.Target{Addr: dst})
		return err
	}
	if h != nil {
		err = h.Do(open)
	} else {
		err = open()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// sink is a server on loopback with room for everything.
func sink(t testing.TB, addr string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	c := pc.(*net.UDPConn)
	_ = c.SetReadBuffer(4 << 20)
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func readAll(t testing.TB, c *net.UDPConn, n int) (all [][]byte, from netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 70000)
	for range n {
		size, peer, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatalf("%d of %d datagrams: %v", len(all), n, err)
		}
		all, from = append(all, bytes.Clone(buf[:size])), peer
	}
	return all, from
}

// split is what a batch is on the wire.
func split(dgs []flow.Datagram) (all [][]byte) {
	for _, d := range dgs {
		if d.Segment == 0 {
			all = append(all, d.Data)
			continue
		}
		all = slices.AppendSeq(all, slices.Chunk(d.Data, d.Segment))
	}
	return all
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i/251)
	}
	return b
}

func TestBatchesArriveAsSent(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		srv, to := sink(t, addr)
		conn := openPackets(t, nil, dialer.Config{}, to)
		d := func(size, segment int) flow.Datagram {
			return flow.Datagram{Peer: to, Data: pattern(size, byte(size)), Segment: segment}
		}
		batches := map[string][]flow.Datagram{
			"single":             {d(100, 0)},
			"empty":              {d(0, 0), d(0, 0), d(5, 0), d(0, 0)},
			"equal":              slices.Repeat([]flow.Datagram{d(1200, 0)}, 40),
			"more than segments": slices.Repeat([]flow.Datagram{d(100, 0)}, 200),
			"shorter last":       {d(900, 0), d(900, 0), d(1, 0), d(900, 0)},
			"joined":             {d(40*1200+3, 1200), d(7, 0), d(2400, 1200)},
			"joined, tiny":       {d(500, 2)},
			"joined, one only":   {d(1200, 1200), d(10, 1200)},
			"large":              {d(65507, 0), d(30000, 0), d(30000, 0), d(30000, 0)},
		}
		for name, dgs := range batches {
			if n, err := conn.WriteBatch(dgs); n != len(dgs) || err != nil {
				t.Fatalf("%s %s: wrote %d of %d: %v", addr, name, n, len(dgs), err)
			}
			want := split(dgs)
			got, _ := readAll(t, srv, len(want))
			if !slices.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("%s %s: what arrives differs", addr, name)
			}
		}
	}
}

func TestReadsBothWaysOfBuffers(t *testing.T) {
	srv, to := sink(t, "127.0.0.1:0")
	conn := openPackets(t, nil, dialer.Config{}, to)
	if _, err := conn.WriteBatch([]flow.Datagram{{Peer: to, Data: []byte("hello")}}); err != nil {
		t.Fatal(err)
	}
	_, back := readAll(t, srv, 1)
	want := [][]byte{nil, []byte("one"), pattern(65507, 3), []byte("three")}
	lender := conn.Packets.(interface {
		ReadLent([]flow.Datagram) (int, error)
	})
	reads := map[string]func([]flow.Datagram) (int, error){"lent": lender.ReadLent, "own": conn.ReadBatch}
	for name, read := range reads {
		for _, data := range want {
			if _, err := srv.WriteToUDPAddrPort(data, back); err != nil {
				t.Fatal(err)
			}
		}
		var got [][]byte
		for len(got) < len(want) {
			dgs := make([]flow.Datagram, 3)
			for i := range dgs {
				dgs[i].Data = make([]byte, 70000)
			}
			n, err := read(dgs)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range dgs[:n] {
				if d.Peer != to {
					t.Errorf("%s: from %v, want %v", name, d.Peer, to)
				}
				got = append(got, bytes.Clone(d.Data))
			}
		}
		if !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%s: what is read differs", name)
		}
	}
	// Joined by the sender, it may come joined, and is the same.
	joined := flow.Datagram{Peer: back, Data: pattern(10*1000+1, 9), Segment: 1000}
	sender := openPackets(t, nil, dialer.Config{}, back)
	if _, err := sender.WriteBatch([]flow.Datagram{joined}); err != nil {
		t.Fatal(err)
	}
	var got [][]byte
	reads2 := 0
	for len(got) < 11 {
		dgs := make([]flow.Datagram, 16)
		n, err := lender.ReadLent(dgs)
		if err != nil {
			t.Fatal(err)
		}
		reads2 += n
		for _, d := range split(dgs[:n]) {
			got = append(got, bytes.Clone(d))
		}
	}
	if !slices.EqualFunc(got, split([]flow.Datagram{joined}), bytes.Equal) {
		t.Error("joined: what is read differs")
	}
	t.Logf("11 datagrams came in %d", reads2)
}

func TestTooLargeDatagramIsItsPeersError(t *testing.T) {
	srv, to := sink(t, "127.0.0.1:0")
	conn := openPackets(t, nil, dialer.Config{}, to)
	good := flow.Datagram{Peer: to, Data: []byte("x")}
	n, err := conn.WriteBatch([]flow.Datagram{good, {Peer: to, Data: make([]byte, 65508)}, good})
	var peer *flow.PeerError
	if n != 1 || !errors.As(err, &peer) || peer.Reason != flow.TooBig || peer.Peer != to {
		t.Fatalf("got %d, %v", n, err)
	}
	readAll(t, srv, 1)
}

func TestCloseEndsReadsAndWrites(t *testing.T) {
	_, to := sink(t, "127.0.0.1:0")
	conn := openPackets(t, nil, dialer.Config{}, to)
	done := make(chan error, 1)
	go func() {
		_, err := conn.ReadBatch([]flow.Datagram{{Data: make([]byte, 10)}})
		done <- err
	}()
	conn.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := conn.WriteBatch([]flow.Datagram{{Peer: to}}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
}

// Two peers refuse all the time, a third one gets every datagram.
func TestErrorsOfOthersLoseNothing(t *testing.T) {
	srv, to := sink(t, "127.0.0.1:0")
	gone, refusing := sink(t, "127.0.0.1:0")
	gone.Close()
	conn := openPackets(t, nil, dialer.Config{}, to)
	const rounds = 300
	refused := make(chan int, 1)
	go func() {
		count := 0
		for {
			_, err := conn.ReadBatch([]flow.Datagram{{Data: make([]byte, 10)}})
			var peer *flow.PeerError
			if !errors.As(err, &peer) {
				refused <- count
				return
			}
			if peer.Peer != refusing || peer.Reason != flow.Refused {
				t.Errorf("error %+v", peer)
			}
			count++
		}
	}()
	for i := range rounds {
		dgs := []flow.Datagram{{Peer: refusing, Data: []byte("no")}, {Peer: to, Data: []byte{byte(i)}}}
		for len(dgs) > 0 {
			n, err := conn.WriteBatch(dgs)
			var peer *flow.PeerError
			if err != nil && (!errors.As(err, &peer) || peer.Peer != refusing) {
				t.Fatal(err)
			}
			if err == nil {
				break
			}
			dgs = dgs[n+1:]
		}
		if got, _ := readAll(t, srv, 1); got[0][0] != byte(i) {
			t.Fatalf("round %d: got %d", i, got[0][0])
		}
	}
	conn.Close()
	if count := <-refused; count == 0 {
		t.Error("nobody was told of a refusal")
	}
}

// Whatever is told of others while it is sent, a datagram goes out: each error that is
// read makes the socket tell of the next one to who sends.
func TestManyErrorsOfOthersLoseNothing(t *testing.T) {
	srv, to := sink(t, "127.0.0.1:0")
	gone, refusing := sink(t, "127.0.0.1:0")
	gone.Close()
	bad := make([]flow.Datagram, 50)
	for i := range bad {
		bad[i] = flow.Datagram{Peer: refusing, Data: []byte("no")}
	}
	for round := range 100 {
		conn := openPackets(t, nil, dialer.Config{}, to)
		for range len(bad) {
			_, _ = conn.WriteBatch(bad)
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			for {
				_, err := conn.ReadBatch([]flow.Datagram{{Data: make([]byte, 10)}})
				var peer *flow.PeerError
				if !errors.As(err, &peer) {
					return // closed
				}
			}
		}()
		for i := range 50 {
			if _, err := conn.WriteBatch([]flow.Datagram{{Peer: to, Data: []byte{byte(i)}}}); err != nil {
				t.Fatalf("round %d, datagram %d: %v", round, i, err)
			}
			if got, _ := readAll(t, srv, 1); got[0][0] != byte(i) {
				t.Fatalf("round %d: got %d, want %d", round, got[0][0], i)
			}
		}
		conn.Close()
		<-read
	}
}

// client (10.9.0.1) ──── router ──── server (10.8.0.2), the far link with a
// smaller MTU than the near one.
func TestJoinedDatagramsLargerThanThePathArriveSingly(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	lab := labtest.New(t)
	client, path, server := lab.Host("client"), lab.Host("path"), lab.Host("server")
	lab.Link(client, path, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	far := lab.Link(path, server, "10.8.0.1/24", "10.8.0.2/24", "fd08::1/64", "fd08::2/64")
	path.Forward()
	path.Run("ip", "link", "set", far.A, "mtu", "1300")
	server.Run("ip", "link", "set", far.B, "mtu", "1300")
	for _, r := range [][2]string{{"10.8.0.0/24", "10.9.0.2"}, {"fd08::/64", "fd09::2"}} {
		client.Run("ip", "route", "add", r[0], "via", r[1])
	}
	for _, addr := range []string{"10.8.0.2:7", "[fd08::2]:7"} {
		srv := server.ListenPacket("udp", addr).(*net.UDPConn)
		to := netip.MustParseAddrPort(addr)
		conn := openPackets(t, client, dialer.Config{}, to)
		joined := flow.Datagram{Peer: to, Data: pattern(5*1400, 1), Segment: 1400}
		told := make(chan *flow.PeerError, 100)
		go func() {
			for {
				_, err := conn.ReadBatch([]flow.Datagram{{Data: make([]byte, 10)}})
				var peer *flow.PeerError
				if !errors.As(err, &peer) {
					return
				}
				told <- peer
			}
		}()
		// A single one finds the path. (The others may be cut up.)
		if _, err := conn.WriteBatch([]flow.Datagram{{Peer: to, Data: make([]byte, 1400), DontFragment: true}}); err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-told:
			if e.Reason != flow.TooBig || e.ICMP == nil || e.ICMP.Info != 1300 || e.Peer != to {
				t.Errorf("%s: told %+v", addr, e)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: no error names the path's MTU", addr)
		}
		// Now the kernel refuses to join.
		batch := []flow.Datagram{joined, {Peer: to, Data: make([]byte, 1400)}, {Peer: to, Data: make([]byte, 1400)}, {Peer: to, Data: []byte("end")}}
		if n, err := conn.WriteBatch(batch); n != len(batch) || err != nil {
			t.Fatalf("%s: wrote %d: %v", addr, n, err)
		}
		_ = srv.SetReadDeadline(time.Now().Add(10 * time.Second))
		want := split(batch)
		if got, _ := readAll(t, srv, len(want)); !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%s: what arrives differs", addr)
		}
	}
}

// An uplink without a route to a peer does not ask for it by ARP.
func TestUplinkSendsOnlyWhereItHasARoute(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	lab := labtest.New(t)
	client, server := lab.Host("client"), lab.Host("server")
	link := lab.Link(client, server, "10.9.0.1/24", "10.9.0.2/24")
	srv := server.ListenPacket("udp", "10.9.0.2:7").(*net.UDPConn)
	_ = srv.SetDeadline(time.Now().Add(10 * time.Second))
	near, far := netip.MustParseAddrPort("10.9.0.2:7"), netip.MustParseAddrPort("192.0.2.1:7")
	conn := openPackets(t, client, dialer.Config{Interface: link.A}, near)
	var n int
	var err error
	// The look-ups are made in the thread's namespace.
	_ = client.Do(func() error {
		n, err = conn.WriteBatch([]flow.Datagram{{Peer: near, Data: []byte("a")}, {Peer: far, Data: []byte("b")}})
		return nil
	})
	var peer *flow.PeerError
	if n != 1 || !errors.As(err, &peer) || peer.Peer != far || peer.Reason != flow.NetUnreachable {
		t.Errorf("got %d, %v", n, err)
	}
	if got, _ := readAll(t, srv, 1); string(got[0]) != "a" {
		t.Errorf("got %q", got[0])
	}
	if out := client.Run("ip", "neigh", "show", "192.0.2.1"); out != "" {
		t.Errorf("it was asked for: %s", out)
	}
}

func BenchmarkSend(b *testing.B) {
	srv, to := sink(b, "127.0.0.1:0")
	raw, err := srv.SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	// A small buffer: what nobody reads is dropped early.
	_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) })
	conn := openPackets(b, nil, dialer.Config{}, to)
	dgs := slices.Repeat([]flow.Datagram{{Peer: to, Data: make([]byte, 1200)}}, 32)
	b.SetBytes(32 * 1200)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := conn.WriteBatch(dgs); err != nil {
			b.Fatal(err)
		}
	}
}
