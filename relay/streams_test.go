package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/relay"
)

// plainConn hides that it is a kernel socket: the path with buffers.
type plainConn struct{ flow.Conn }

func (c plainConn) Carrier() flow.Conn { return c.Conn }

// ends is a flow that is relayed, seen from outside.
type ends struct {
	client, server *net.TCPConn
	up, down, half atomic.Int64
	result         chan relay.Result
}

// relayed starts a relay between two pairs of sockets on loopback.
func relayed(t *testing.T, ctx context.Context, hide func(flow.Conn) flow.Conn) *ends {
	t.Helper()
	client, in := tcpPair(t)
	out, server := tcpPair(t)
	e := &ends{client: client, server: server, result: make(chan relay.Result, 1)}
	go func() {
		a, b := flow.NewTCPConn(in), flow.NewTCPConn(out)
		r := relay.Streams(ctx, hide(a), hide(b), &relay.Options{Up: &e.up, Down: &e.down, Half: func() { e.half.Add(1) }})
		a.Close()
		b.Close()
		e.result <- r
	}()
	return e
}

func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	limit := time.Now().Add(20 * time.Second)
	c.SetDeadline(limit)
	s.SetDeadline(limit)
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func (e *ends) await(t *testing.T) relay.Result {
	t.Helper()
	select {
	case r := <-e.result:
		return r
	case <-time.After(20 * time.Second):
		t.Fatal("the relay does not end")
		return relay.Result{}
	}
}

var paths = []struct {
	name string
	hide func(flow.Conn) flow.Conn
}{
	{"splice", func(c flow.Conn) flow.Conn { return c }},
	{"copy", func(c flow.Conn) flow.Conn { return plainConn{c} }},
}

func TestStreamsHalfClose(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			e := relayed(t, context.Background(), p.hide)
			up, down := bytes.Repeat([]byte("up"), 1<<20), bytes.Repeat([]byte("down"), 1<<20)
			go func() { e.client.Write(up); e.client.CloseWrite() }()
			if got, err := io.ReadAll(e.server); err != nil || !bytes.Equal(got, up) {
				t.Fatalf("server read %d bytes, %v", len(got), err)
			}
			labtest.Eventually(t, 10*time.Second, func() bool { return e.half.Load() == 1 }, "one half is said to have ended")
			go func() { e.server.Write(down); e.server.CloseWrite() }()
			if got, err := io.ReadAll(e.client); err != nil || !bytes.Equal(got, down) {
				t.Fatalf("client read %d bytes, %v", len(got), err)
			}
			r := e.await(t)
			if r.Reason != flow.Closed || r.Up != int64(len(up)) || r.Down != int64(len(down)) || e.up.Load() != r.Up {
				t.Errorf("ended %+v", r)
			}
		})
	}
}

func TestStreamsPassAReset(t *testing.T) {
	for _, p := range paths {
		for _, by := range []relay.Side{relay.Client, relay.Server} {
			t.Run(p.name+" by "+by.String(), func(t *testing.T) {
				e := relayed(t, context.Background(), p.hide)
				from, to := e.client, e.server
				if by == relay.Server {
					from, to = to, from
				}
				from.Write([]byte("last words"))
				got := make([]byte, 10)
				if _, err := io.ReadFull(to, got); err != nil {
					t.Fatal(err)
				}
				from.SetLinger(0)
				from.Close()
				if _, err := to.Read(got); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("other side got %v, want a reset", err)
				}
				if r := e.await(t); r.Reason != flow.Reset || r.By != by {
					t.Errorf("ended %+v", r)
				}
			})
		}
	}
}

// What one side has said before it resets in the middle of what the other says is
// delivered, and then the reset.
func TestStreamsDeliverWhatWasSaidBeforeAReset(t *testing.T) {
	const size = 200_000 // no more than the sockets hold
	for _, p := range paths {
		for _, by := range []relay.Side{relay.Client, relay.Server} {
			t.Run(p.name+" by "+by.String(), func(t *testing.T) {
				sides := []relay.Side{relay.Client, relay.Server}
				e := relayed(t, context.Background(), func(c flow.Conn) flow.Conn {
					side := sides[0]
					sides = sides[1:]
					if side == by { // whose state tells a reset from an end
						return c
					}
					return p.hide(c)
				})
				from, to := e.client, e.server
				if by == relay.Server {
					from, to = to, from
				}
				refused := make(chan error, 1)
				go func() {
					buf := make([]byte, 64<<10)
					for {
						if _, err := to.Write(buf); err != nil {
							refused <- err
							return
						}
					}
				}()
				if _, err := io.CopyN(io.Discard, from, 1<<20); err != nil {
					t.Fatal(err)
				}
				if _, err := from.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				raw, _ := from.SyscallConn()
				labtest.Eventually(t, 10*time.Second, func() bool {
					left := 1
					_ = raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
					return left == 0
				}, "what was said is acknowledged")
				from.SetLinger(0)
				from.Close()
				time.Sleep(100 * time.Millisecond) // the relay hears of it while to reads nothing
				got, err := io.ReadAll(to)
				if len(got) != size {
					t.Errorf("the other side got %d bytes of %d", len(got), size)
				}
				// Of its read and its write, one hears of the reset.
				if writing := <-refused; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(writing, syscall.ECONNRESET) {
					t.Errorf("ended with %v, and %v when writing", err, writing)
				}
				if r := e.await(t); r.Reason != flow.Reset || r.By != by {
					t.Errorf("ended %+v", r)
				}
			})
		}
	}
}

// refusing is a server that takes nothing, and has something to say of that.
type refusing struct {
	flow.Conn
	said chan string
}

func (r refusing) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func (r refusing) Read(b []byte) (int, error) {
	text, ok := <-r.said
	if !ok {
		return 0, syscall.ECONNRESET
	}
	return copy(b, text), nil
}

// What a server said before it refused the rest is delivered to its end.
func TestStreamsDeliverWhatARefusingServerSaid(t *testing.T) {
	client, in := tcpPair(t)
	out, _ := tcpPair(t)
	server := refusing{flow.NewTCPConn(out), make(chan string, 2)}
	result := make(chan relay.Result, 1)
	go func() {
		result <- relay.Streams(context.Background(), plainConn{flow.NewTCPConn(in)}, server, &relay.Options{})
	}()
	if _, err := client.Write([]byte("a request")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // that is refused
	server.said <- "too "
	server.said <- "large"
	close(server.said)
	got, err := io.ReadAll(client)
	if string(got) != "too large" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client got %q, %v", got, err)
	}
	if r := <-result; r.Reason != flow.Reset || r.By != relay.Server {
		t.Errorf("ended %+v", r)
	}
}

func TestStreamsEndWithTheirContext(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			e := relayed(t, ctx, p.hide)
			e.client.Write([]byte("x"))
			io.ReadFull(e.server, make([]byte, 1))
			cancel()
			for _, c := range []*net.TCPConn{e.client, e.server} {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("got %v, want a reset", err)
				}
			}
			if r := e.await(t); r.Reason != flow.Canceled {
				t.Errorf("ended %+v", r)
			}
		})
	}
}
