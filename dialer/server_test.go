package dialer

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/flow"
)

// scripted is an outbound whose dials end as it is told.
type scripted struct {
	name  string
	dials atomic.Int32
	dial  func(context.Context, netip.AddrPort) (*Conn, error)
}

func (s *scripted) Name() string { return s.name }
func (s *scripted) DialStream(ctx context.Context, t Target) (*Conn, error) {
	s.dials.Add(1)
	return s.dial(ctx, t.Addr)
}
func (s *scripted) OpenPackets(context.Context, Target) (*PacketConn, error) {
	return nil, errors.ErrUnsupported
}

// noConn is a conn that nobody uses.
type noConn struct{ flow.Conn }

func (noConn) Close() error { return nil }

func addrs(list ...string) (found []netip.Addr) {
	for _, a := range list {
		found = append(found, netip.MustParseAddr(a))
	}
	return found
}

// A server's name leads to its addresses by turns of their families, the one
// that answered last first; what the resolver said last holds while it is silent.
func TestServerOfSeveralAddresses(t *testing.T) {
	s, err := newServer("proxy.test:1080")
	if err != nil {
		t.Fatal(err)
	}
	answer, answerErr := addrs("192.0.2.1", "192.0.2.2", "2001:db8::1"), error(nil)
	s.lookup = func(context.Context, string, string) ([]netip.Addr, error) { return answer, answerErr }
	refused := errors.New("refused")
	good := netip.MustParseAddrPort("[2001:db8::1]:1080")
	next := &scripted{name: "direct", dial: func(_ context.Context, a netip.AddrPort) (*Conn, error) {
		if a != good {
			return nil, refused
		}
		return &Conn{Conn: noConn{}}, nil
	}}
	for i, want := range []int{2, 1} {
		next.dials.Store(0)
		if _, addr, err := s.dial(t.Context(), next); err != nil || addr != good {
			t.Fatalf("dial gave %v, %v", addr, err)
		}
		if n := next.dials.Load(); int(n) != want {
			t.Errorf("dial %d tried %d addresses, want %d", i, n, want)
		}
	}
	s.looked, answerErr = time.Time{}, errors.New("no answer")
	if list, err := s.resolve(t.Context()); err != nil || len(list) != 3 {
		t.Errorf("with a silent resolver: %v, %v, want the old addresses", list, err)
	}
	s.addrs = nil
	if _, err := s.resolve(t.Context()); !errors.Is(err, answerErr) {
		t.Errorf("without addresses: %v, want the resolver's error", err)
	}
}

// An address that does not answer costs a stagger, and not the attempt.
func TestServerSilentAddressIsPassed(t *testing.T) {
	s, err := newServer("proxy.test:1080")
	if err != nil {
		t.Fatal(err)
	}
	s.lookup = func(context.Context, string, string) ([]netip.Addr, error) {
		return addrs("192.0.2.1", "192.0.2.2"), nil
	}
	ended := make(chan struct{})
	next := &scripted{name: "direct", dial: func(ctx context.Context, a netip.AddrPort) (*Conn, error) {
		if a.Addr() == netip.MustParseAddr("192.0.2.2") {
			return &Conn{Conn: noConn{}}, nil
		}
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}}
	if _, addr, err := s.dial(t.Context(), next); err != nil || addr.Addr() != netip.MustParseAddr("192.0.2.2") {
		t.Fatalf("dial gave %v, %v", addr, err)
	}
	<-ended
}

func TestNewFollowsVia(t *testing.T) {
	direct := Config{Name: "direct", Type: TypeDirect}
	t.Run("circle", func(t *testing.T) {
		_, err := New([]Config{direct, {Name: "a", Type: TypeSOCKS5, Server: "192.0.2.1:1", Via: "b"}, {Name: "b", Type: TypeSOCKS5, Server: "192.0.2.1:1", Via: "a"}}, Options{})
		if err == nil {
			t.Error("New made a circle")
		}
	})
	t.Run("group", func(t *testing.T) {
		hops, err := New([]Config{direct, {Name: "a", Type: TypeSOCKS5, Server: "192.0.2.1:1", Via: "b"}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := Link(hops, nil); err == nil {
			t.Error("linked to nobody")
		}
		group := &scripted{name: "b", dial: func(context.Context, netip.AddrPort) (*Conn, error) { return nil, errors.New("asked") }}
		if err := Link(hops, map[string]Outbound{"b": group}); err != nil {
			t.Fatal(err)
		}
		if _, err := hops[1].DialStream(t.Context(), Target{}); err == nil || group.dials.Load() != 1 {
			t.Errorf("got %v after %d dials of the group", err, group.dials.Load())
		}
	})
	t.Run("order", func(t *testing.T) {
		hops, err := New([]Config{direct, {Name: "eth", Type: TypeDirect, Interface: "eth0"}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got := []string{hops[0].Name(), hops[1].Name()}; !slices.Equal(got, []string{"direct", "eth"}) {
			t.Errorf("outbounds %q", got)
		}
	})
}

// The address of a server is known by its name too, as soon as that was looked up.
func TestServerIsKnown(t *testing.T) {
	s, err := newServer("proxy.test:1080")
	if err != nil {
		t.Fatal(err)
	}
	looked := make(chan struct{})
	s.lookup = func(context.Context, string, string) ([]netip.Addr, error) {
		defer close(looked)
		return addrs("192.0.2.1", "2001:db8::1"), nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.run(ctx) }()
	<-looked
	cancel()
	<-done
	for addr, want := range map[string]bool{
		"192.0.2.1:1080": true, "[::ffff:192.0.2.1]:1080": true, "[2001:db8::1]:1080": true,
		"192.0.2.1:80": false, "192.0.2.2:1080": false,
	} {
		if got := s.is(netip.MustParseAddrPort(addr)); got != want {
			t.Errorf("%s is the server: %v", addr, got)
		}
	}
}
