package router_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/internal/labtest"
	"cgtun/router"
)

// twoWays is a group as the router sees one.
type twoWays struct {
	name   string
	paths  []string
	serve  func(path string, c *memConn)
	down   atomic.Int64 // since when, ns; 0: it is up
	hidden atomic.Pointer[string]
	ended  atomic.Int32
}

func (o *twoWays) Name() string               { return o.name }
func (o *twoWays) Outbounds() []string        { return o.paths }
func (o *twoWays) Replay() bool               { return true }
func (o *twoWays) Usual(string) time.Duration { return 0 }

func (o *twoWays) Down(string) time.Duration {
	if since := o.down.Load(); since != 0 {
		return time.Since(time.Unix(0, since))
	}
	return 0
}

func (o *twoWays) Hide(outbound string, kind dialer.Hidden) {
	text := outbound + " " + kind.String()
	o.hidden.Store(&text)
}

func (o *twoWays) DialStreamUntil(ctx context.Context, t dialer.Target, _ time.Time, _ *dialer.Ending) (*dialer.Conn, error) {
	return o.DialStream(ctx, t)
}

func (o *twoWays) DialStream(_ context.Context, t dialer.Target) (*dialer.Conn, error) {
	for _, p := range o.paths {
		if slices.Contains(t.Avoid, p) {
			continue
		}
		ours, theirs := memPipe()
		go o.serve(p, theirs)
		return &dialer.Conn{Conn: ours, Path: []string{p}, Report: func(out dialer.Outcome) {
			if out.News == dialer.Ended {
				o.ended.Add(1)
			}
		}}, nil
	}
	return nil, errors.New("no other path")
}

func (o *twoWays) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	return nil, errors.ErrUnsupported
}

// A path that resets the first request is replaced; the flow is known by the one
// that serves it, and the places of both sockets are given back.
func TestResetBeforeTheAnswerIsHidden(t *testing.T) {
	const request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	o := &twoWays{name: "up", paths: []string{"a", "b"}}
	o.serve = func(path string, c *memConn) {
		buf := make([]byte, len(request))
		_, _ = io.ReadFull(c, buf)
		if path == "a" {
			_ = c.Reset()
			return
		}
		_, _ = c.Write(append([]byte("answer to "), buf...))
		_ = c.CloseWrite()
	}
	r := route(t, router.Options{MaxSockets: 2}, o)
	for range 5 { // each needs both places
		c := newClient("198.51.100.1:80")
		serve(t, r, c)
		far := c.conn
		_, _ = io.WriteString(far, request)
		got, err := io.ReadAll(far)
		if string(got) != "answer to "+request || err != nil {
			t.Fatalf("%q, %v", got, err)
		}
		_ = far.Close()
		labtest.Eventually(t, 5*time.Second, func() bool { return r.Counters().FlowsLive == 0 })
	}
	flows := r.Flows()
	last := flows[len(flows)-1]
	if last.Replays != 1 || !slices.Equal(last.Path, []string{"b"}) || last.DownBytes != int64(len("answer to "+request)) || last.UpBytes != int64(len(request)) {
		t.Errorf("%+v", last)
	}
	if h := o.hidden.Load(); h == nil || *h != "a reset" || o.ended.Load() != 10 {
		t.Errorf("hidden %v, %d conns ended", h, o.ended.Load())
	}
}

// A flow that stands still on a path that is down is over after a while, and its
// client hears it; one that had nothing to say, or a short loss, costs nothing.
func TestFlowOfAPathThatIsDownEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		next := make(chan bool)
		o := &twoWays{name: "up", paths: []string{"a", "b"}, serve: func(_ string, c *memConn) {
			for range next {
				if _, err := c.Write([]byte("x")); err != nil {
					return
				}
			}
		}}
		ctx, cancel := context.WithCancel(t.Context())
		r := route(t, router.Options{}, o)
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		c := newClient("198.51.100.1:80")
		ended := make(chan bool)
		go func() { defer close(ended); r.ServeStream(ctx, c) }()
		say := func() {
			t.Helper()
			next <- true
			if n, err := c.conn.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Fatalf("%d bytes, %v", n, err)
			}
		}
		say()
		time.Sleep(time.Minute)
		say()
		o.down.Store(time.Now().UnixNano())
		time.Sleep(4 * time.Second)
		o.down.Store(0)
		time.Sleep(time.Second)
		say()
		o.down.Store(time.Now().UnixNano())
		began := time.Now()
		if _, err := c.conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the client hears %v", err)
		}
		if took := time.Since(began); took < 5*time.Second || took > 7*time.Second {
			t.Errorf("after %v", took)
		}
		<-ended
		if f := r.Flows()[0]; f.Reason == nil || *f.Reason != "network unreachable" {
			t.Errorf("%+v", f)
		}
		close(next)
		_ = c.conn.Close()
		cancel()
		<-done
	})
}
