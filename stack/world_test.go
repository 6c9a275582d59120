package stack_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/relay"
	"cgtun/stack"
	"cgtun/tun"
)

// world is a client behind a stack and a server on the other side:
//
//	client ── tun0 ── stack | relay ── router ──── server
//	10.9.0.1                           10.7.0.1    10.7.0.2
//	fd09::1                            fd07::1     fd07::2
//
// The client has no other way out.
type world struct {
	t                      *testing.T
	client, router, server *labtest.Host
	stack                  *stack.Stack
	device                 *tun.Device

	halves  atomic.Int32 // directions that have ended in order
	mu      sync.Mutex
	results []relay.Result
	streams int // flows that began
}

const (
	server4 = "10.7.0.2"
	server6 = "fd07::2"
)

// newWorld builds it. Nil dial: connect from router.
func newWorld(t *testing.T, o stack.Options, dial func(context.Context, *flow.Flow) (flow.Conn, error)) *world {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	lab := labtest.New(t)
	w := &world{t: t, client: lab.Host("client"), router: lab.Host("router"), server: lab.Host("server")}
	lab.Link(w.router, w.server, "10.7.0.1/24", "10.7.0.2/24", "fd07::1/64", "fd07::2/64")
	ref, err := netns.Named(w.client.Path)
	if err != nil {
		t.Fatal(err)
	}
	w.device, err = tun.Open(ref, tun.Options{Name: "tun0", Table: 101, Addresses: []netip.Prefix{
		netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")}})
	if err != nil {
		t.Fatal(err)
	}
	w.client.DefaultDevice("tun0")
	if dial == nil {
		dial = w.dial
	}
	var queues []stack.Queue
	for _, q := range w.device.Queues() {
		queues = append(queues, q)
	}
	w.stack, err = stack.New(queues, &relaying{w: w, dial: dial}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.device.Close(); err != nil {
			t.Error(err)
		}
	})
	labtest.Background(t, "the stack", w.stack.Run)
	return w
}

// dial connects from router, as an outbound would.
func (w *world) dial(ctx context.Context, f *flow.Flow) (c flow.Conn, err error) {
	err = w.router.Do(func() error {
		var d net.Dialer
		nc, err := d.DialContext(ctx, "tcp", f.Dst.String())
		if err == nil {
			c = flow.NewTCPConn(nc.(*net.TCPConn))
		}
		return err
	})
	return c, err
}

// relaying is the smallest router.
type relaying struct {
	w    *world
	dial func(context.Context, *flow.Flow) (flow.Conn, error)
}

func (r *relaying) ServeStream(ctx context.Context, s flow.Stream) {
	r.w.mu.Lock()
	r.w.streams++
	r.w.mu.Unlock()
	s.Begun()
	out, err := r.dial(ctx, s.Flow())
	if err != nil {
		s.Reject(flow.ReasonOf(err), flow.Said(err))
		return
	}
	defer out.Close()
	in, err := s.Accept()
	if err != nil {
		// The client was gone before it was accepted.
		out.Reset()
		r.note(relay.Result{Reason: flow.Reset, By: relay.Client, Err: err})
		return
	}
	defer in.Close()
	r.note(relay.Streams(ctx, in, out, &relay.Options{Half: func() { r.w.halves.Add(1) }}))
}

func (r *relaying) note(res relay.Result) {
	r.w.mu.Lock()
	if testing.Verbose() {
		r.w.t.Logf("result %+v", res)
	}
	r.w.results = append(r.w.results, res)
	r.w.mu.Unlock()
}

func (r *relaying) ServePackets(ctx context.Context, c flow.PacketConn) {
	defer c.Close()
	c.Begun()
	<-ctx.Done()
}

func (w *world) lastResult() relay.Result {
	w.t.Helper()
	var r relay.Result
	labtest.Eventually(w.t, 10*time.Second, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.results) == 0 {
			return false
		}
		r = w.results[len(w.results)-1]
		return true
	}, "the flow has not ended")
	return r
}

// pair connects the client to a server and returns both ends.
func (w *world) pair(addr string) (client, server *net.TCPConn) {
	w.t.Helper()
	ln := w.server.Listen("tcp", net.JoinHostPort(addr, "0"))
	defer ln.Close()
	type accepted struct {
		c   net.Conn
		err error
	}
	got := make(chan accepted, 1)
	go func() {
		c, err := ln.Accept()
		got <- accepted{c, err}
	}()
	c, err := w.client.Dial("tcp", ln.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	a := <-got
	if a.err != nil {
		w.t.Fatal(a.err)
	}
	client, server = c.(*net.TCPConn), a.c.(*net.TCPConn)
	w.t.Cleanup(func() { client.Close(); server.Close() })
	limit := time.Now().Add(60 * time.Second)
	client.SetDeadline(limit)
	server.SetDeadline(limit)
	return client, server
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
