package dialer

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cgtun/flow"
)

// relayingServer is a proxy that serves CONNECT and associations, and counts
// them. It is told by its label where it is in a chain.
type relayingServer struct {
	addr              netip.AddrPort
	mu                sync.Mutex
	streams, packages int
}

func newRelayingServer(t *testing.T) *relayingServer {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &relayingServer{addr: netip.MustParseAddrPort(l.Addr().String())}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				s.serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); running.Wait() })
	return s
}

func (s *relayingServer) serve(c *net.TCPConn) {
	var b [3]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return
	}
	say(c, noAuth)
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return
	}
	// The rest of a request is as that of a reply: only v4 comes here.
	var rest [7]byte
	if _, err := io.ReadFull(c, rest[:]); err != nil {
		return
	}
	to, _, _ := cutSocksAddr(rest[:])
	if b[1] == socksConnect {
		s.mu.Lock()
		s.streams++
		s.mu.Unlock()
		far, err := net.Dial("tcp4", to.addr.String())
		if err != nil {
			say(c, "\x05\x05\x00\x01")
			return
		}
		defer far.Close()
		say(c, success)
		go func() { _, _ = io.Copy(far, c); _ = far.(*net.TCPConn).CloseWrite() }()
		_, _ = io.Copy(c, far)
		return
	}
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return
	}
	done := make(chan struct{})
	go func() { defer close(done); s.relay(udp) }()
	_, _ = c.Write(appendSocksAddr([]byte{5, 0, 0}, socksAddr{addr: netip.MustParseAddrPort(udp.LocalAddr().String())}))
	_, _ = io.Copy(io.Discard, c)
	udp.Close()
	<-done
}

// relay takes the first address that sends for the client.
func (s *relayingServer) relay(udp *net.UDPConn) {
	var client netip.AddrPort
	b := make([]byte, 64<<10)
	for {
		n, from, err := udp.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if !client.IsValid() {
			client = from
		}
		if from != client {
			_, _ = udp.WriteToUDPAddrPort(append(appendSocksAddr([]byte{0, 0, 0}, socksAddr{addr: from}), b[:n]...), client)
			continue
		}
		s.mu.Lock()
		s.packages++
		s.mu.Unlock()
		if to, payload, ok := cutSocksHeader(b[:n]); ok {
			_, _ = udp.WriteToUDPAddrPort(payload, to)
		}
	}
}

// A chain is a way like any other, for streams and for datagrams.
func TestChainOfSOCKS5(t *testing.T) {
	near, far := newRelayingServer(t), newRelayingServer(t)
	config := func(name string, s *relayingServer, via string) Config {
		return Config{Name: name, Type: TypeSOCKS5, Server: s.addr.String(), Via: via}
	}
	// In the order that is least like the one in which they are made.
	hops, err := New([]Config{{Name: "direct"}, config("far", far, "near"), config("near", near, "first"), {Name: "first", Type: TypeDirect}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	chain := hops[1]
	if got := strings.Join(PathOf(chain), " "); got != "first near far" {
		t.Errorf("path %q beforehand", got)
	}
	echo, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	target := netip.MustParseAddrPort(echo.LocalAddr().String())
	c, err := chain.OpenPackets(t.Context(), Target{Addr: target})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.Path, " "); got != "first near far" || c.Sockets != 3 {
		t.Errorf("path %q, %d sockets", got, c.Sockets)
	}
	if _, err := c.WriteBatch([]flow.Datagram{{Peer: target, Data: []byte("onetwo"), Segment: 3}}); err != nil {
		t.Fatal(err)
	}
	want := []string{target.String() + " one", target.String() + " two"}
	if got := reads(t, c, 2); !slices.Equal(got, want) {
		t.Errorf("the echo is %q, want %q", got, want)
	}
	c.Close()
	for _, s := range []*relayingServer{near, far} {
		s.mu.Lock()
		if s.packages != 2 {
			t.Errorf("%d datagrams went by one of the two", s.packages)
		}
		s.mu.Unlock()
	}

	server := proxyServer(t, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
	s, err := chain.DialStream(t.Context(), Target{Addr: server})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	say(s, "through both")
	_ = s.CloseWrite()
	if got, err := io.ReadAll(s); string(got) != "through both" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if got := strings.Join(s.Path, " "); got != "first near far" {
		t.Errorf("path %q", got)
	}
}

// An error names the hop that failed, and not the ones that worked.
func TestChainErrorNamesTheHop(t *testing.T) {
	near := newRelayingServer(t)
	gone := proxyServer(t, func(c *net.TCPConn) {})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	l.Close()
	dial := func(nearServer, farServer string) error {
		hops, err := New([]Config{{Name: "direct"}, {Name: "near", Type: TypeSOCKS5, Server: nearServer}, {Name: "far", Type: TypeSOCKS5, Server: farServer, Via: "near"}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = hops[2].DialStream(ctx, Target{Addr: netip.MustParseAddrPort(nobody)})
		return err
	}
	checkError(t, dial(nobody, "192.0.2.1:1080"), "near", "connect", flow.HostUnreachable, "connection refused")
	checkError(t, dial(near.addr.String(), nobody), "far", "connect", flow.HostUnreachable, `through "near": the proxy says: connection refused`)
	checkError(t, dial(near.addr.String(), gone.String()), "far", "greet", flow.HostUnreachable, "")
	checkError(t, dial(near.addr.String(), newRelayingServer(t).addr.String()), "far", "connect", flow.Refused, "connection refused")
}
