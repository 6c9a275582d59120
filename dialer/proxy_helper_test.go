package dialer

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"cgtun/flow"
)

// fakeProxy is a server on loopback that does with each connection what it is
// told.
type fakeProxy struct {
	addr netip.AddrPort
	l    net.Listener

	mu    sync.Mutex
	dials int
}

func newFakeProxy(t *testing.T, serve func(*net.TCPConn)) *fakeProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeProxy{addr: l.Addr().(*net.TCPAddr).AddrPort(), l: l}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.dials++
			f.mu.Unlock()
			all.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return f
}

func (f *fakeProxy) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

// outbound returns one through the server.
func (f *fakeProxy) outbound(t *testing.T, c Config) *Proxy {
	t.Helper()
	direct, err := NewDirect(Config{Name: "direct"})
	if err != nil {
		t.Fatal(err)
	}
	if c.Name == "" {
		c.Name = "relay"
	}
	if c.Server == "" {
		c.Server = f.addr.String()
	}
	p, err := NewProxy(c, direct, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var somewhere = Target{Addr: netip.MustParseAddrPort("192.0.2.1:443")}

// dialWithin dials a target, for two seconds at most. The conn is closed when
// the test ends.
func dialWithin(t *testing.T, o Outbound, target Target) (*Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	c, err := o.DialStream(ctx, target)
	if err == nil {
		t.Cleanup(func() { c.Close() })
		return c, nil
	}
	var failed *Error
	if !errors.As(err, &failed) || failed.Hop != o.Name() {
		t.Errorf("the error is not one of the outbound's: %v", err)
	}
	return nil, err
}

func mustDial(t *testing.T, o Outbound, target Target) *Conn {
	t.Helper()
	c, err := dialWithin(t, o, target)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func wantReason(t *testing.T, err error, want flow.Reason) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if got := flow.ReasonOf(err); got != want {
		t.Errorf("reason %v of %q, want %v", got, err, want)
	}
}
