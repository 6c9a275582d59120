package router_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/router"
	"cgtun/rules"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// memConn is a flow.Conn in memory: one pipe each way, so that one can end
// without the other.
type memConn struct {
	in, out net.Conn
	reset   *atomic.Bool // of both ends
}

func memPipe() (a, b *memConn) {
	aIn, bOut := net.Pipe()
	bIn, aOut := net.Pipe()
	reset := new(atomic.Bool)
	return &memConn{aIn, aOut, reset}, &memConn{bIn, bOut, reset}
}

func (c *memConn) Read(b []byte) (int, error) {
	n, err := c.in.Read(b)
	if err != nil && c.reset.Load() {
		return n, unix.ECONNRESET
	}
	return n, err
}

func (c *memConn) Write(b []byte) (int, error)        { return c.out.Write(b) }
func (c *memConn) CloseWrite() error                  { return c.out.Close() }
func (c *memConn) Close() error                       { return errors.Join(c.in.Close(), c.out.Close()) }
func (c *memConn) Reset() error                       { c.reset.Store(true); return c.Close() }
func (c *memConn) LocalAddr() net.Addr                { return c.in.LocalAddr() }
func (c *memConn) RemoteAddr() net.Addr               { return c.in.RemoteAddr() }
func (c *memConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *memConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
func (c *memConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// client is a flow.Stream, and the client behind it.
type client struct {
	flow *flow.Flow
	conn *memConn // the client's own end

	mu       sync.Mutex
	router   *memConn // the end that Accept gives
	accepted bool
	rejected []flow.Reason
	gone     bool // Accept fails
}

func newClient(dst string) *client {
	c := &client{flow: flow.New(flow.TCP, netip.MustParseAddrPort("192.0.2.9:4000"), netip.MustParseAddrPort(dst), "home")}
	c.conn, c.router = memPipe()
	return c
}

func (c *client) Flow() *flow.Flow { return c.flow }

func (c *client) Begun() {}

func (c *client) Accept() (flow.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return nil, errors.New("the client has gone")
	}
	c.accepted = true
	return c.router, nil
}

func (c *client) Reject(why flow.Reason, _ *flow.ICMPError) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rejected = append(c.rejected, why)
}

// told returns what the client learnt: whether it was accepted, and the one
// reason that it was rejected for, if any.
func (c *client) told(t *testing.T) (accepted bool, why flow.Reason) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.rejected); n > 1 || n == 1 && c.accepted {
		t.Errorf("accepted %v and rejected for %v: want one answer", c.accepted, c.rejected)
	}
	if len(c.rejected) == 0 {
		return c.accepted, flow.Closed
	}
	return c.accepted, c.rejected[0]
}

// outbound is a dialer.Outbound whose dials are what dial makes of them.
type outbound struct {
	name string
	dial func(context.Context, dialer.Target) (flow.Conn, error)
}

func (o *outbound) Name() string { return o.name }

func (o *outbound) DialStream(ctx context.Context, t dialer.Target) (*dialer.Conn, error) {
	c, err := o.dial(ctx, t)
	if err != nil {
		return nil, &dialer.Error{Hop: o.name, Op: "connect", Addr: t.Addr, Reason: flow.ReasonOf(err), Err: err}
	}
	return &dialer.Conn{Conn: c, Path: []string{o.name}}, nil
}

func (o *outbound) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	return nil, errors.New("no datagrams here")
}

// failing makes an outbound that fails each dial with err.
func failing(name string, err error) *outbound {
	return &outbound{name, func(context.Context, dialer.Target) (flow.Conn, error) { return nil, err }}
}

// serving makes an outbound whose other end each dial hands to serve, in a
// goroutine that the test waits for.
func serving(t *testing.T, name string, serve func(*memConn)) *outbound {
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	return &outbound{name, func(context.Context, dialer.Target) (flow.Conn, error) {
		ours, theirs := memPipe()
		wg.Go(func() {
			defer theirs.Close()
			serve(theirs)
		})
		return ours, nil
	}}
}

// route makes a router in which everything uses the one outbound.
func route(t *testing.T, o router.Options, out dialer.Outbound) *router.Router {
	t.Helper()
	r := router.New(o)
	reload(t, r, []rules.Config{{Use: out.Name(), Line: 7}}, out)
	return r
}

func reload(t *testing.T, r *router.Router, list []rules.Config, outs ...dialer.Outbound) {
	t.Helper()
	set, err := rules.Compile(list)
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]dialer.Outbound)
	for _, o := range outs {
		byName[o.Name()] = o
	}
	r.Reload(set, byName)
}

// serve runs a flow in the background; the test waits for its end.
func serve(t *testing.T, r *router.Router, c *client) (ended <-chan struct{}) {
	t.Helper()
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		r.ServeStream(ctx, c)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		_ = c.conn.Close()
	})
	return done
}

func wait(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s: not within 10 s", what)
	}
}
