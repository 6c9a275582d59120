package relay

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"cgtun/flow"

	"golang.org/x/sys/unix"
)

// Kernel is an end that is a plain TCP socket and nothing more: bytes may be
// moved on its descriptor. flow.TCPConn is one.
type Kernel interface{ TCP() *net.TCPConn }

// Direct is an end that tells of events instead of being waited for and that
// shows and takes bytes where they lie: no goroutine and no buffer while
// nothing happens, no copy of ours when something does. The client end of a
// netstack is one. Peek and Discard are called by one goroutine, Fill by one
// other.
type Direct interface {
	flow.Conn
	// Notify has f called after something may have become readable (also an
	// end or a reset) or writable, or when the conn has broken (ended). f is
	// called with locks of the conn held: it only wakes somebody. When Notify
	// returns, an earlier f is not and will not be running. A nil f ends it.
	Notify(f func(readable, writable, ended bool))
	// Peek appends to dst slices of what has been received, at most cap(dst)
	// of them, and returns them with their sum. They are valid until Discard
	// or until the conn is closed or reset by us. 0 and no error: nothing
	// now. io.EOF: nothing will come; an error: reset. Both only after all
	// bytes were discarded.
	Peek(dst [][]byte) ([][]byte, int, error)
	// Discard drops the first n bytes.
	Discard(n int)
	// Fill sends at most n bytes, which it gets by calls of read: n bytes in
	// all must be ready there. 0 and no error: no room now.
	Fill(n int, read func([]byte) (int, error)) (int, error)
}

// Watcher sees a flow until its server has said something, and can have the relay end
// before that with both ends as they are, for somebody else to go on (Result.Left). The
// first three methods are called by one goroutine, the others by another one.
type Watcher interface {
	// Next is shown the next n bytes of the client before any of them is sent. False:
	// they stay where they are, somebody else goes on.
	Next(slices [][]byte, n int) bool
	// Sent is told how many of them the server has got, and says until when it may be
	// silent; zero: for as long as it likes.
	Sent(n int) (until time.Time)
	// ClientEnds is told that the client has said all. False: somebody else goes on.
	ClientEnds() bool
	// ServerSpeaks is told of the server's first byte, which nobody has got yet;
	// ServerEnds that it has ended without one, or, by nil, that it was silent for that
	// long. False: somebody else goes on.
	ServerSpeaks() bool
	ServerEnds(err error) bool
}

// Options of one relay.
type Options struct {
	// Up and Down count the bytes that were handed on from the client and
	// from the server, as they go. Both may be nil.
	Up, Down *atomic.Int64
	// Half is called when one direction has ended in order, and perhaps again
	// for the other. It returns soon. It may be nil.
	Half func()
	// First is what the client has sent and somebody else has read. If Gone is not
	// nil, the client has ended with that error after it.
	First []byte
	Gone  error
	// Broken, if not nil, is the error of a write to the server that somebody
	// else has done: it takes nothing any more, and when it has said what it has
	// to say that was a reset.
	Broken error
	// Shut says that somebody else has told the server already that nothing more
	// comes. The client ends in order, too, after it.
	Shut bool
	// Watcher sees the beginning of the flow. Nil: nobody does. Ends of which not both
	// can be watched, and First, are left to who goes on at once.
	Watcher Watcher
	// Workers run what moves bytes for a moment. Nil: goroutines that begin then.
	Workers *flow.Workers
}

// Side is an end of a flow.
type Side uint8

// The sides.
const (
	Neither Side = iota
	Client
	Server
)

// String returns "client", "server" or "neither".
func (s Side) String() string {
	switch s {
	case Client:
		return "client"
	case Server:
		return "server"
	}
	return "neither"
}

// Result is how a flow ended.
type Result struct {
	Up, Down int64
	Reason   flow.Reason // Closed, Reset, TimedOut, Canceled, …
	By       Side        // who ended it, if not both in order
	Err      error       // nil if Closed
	// Left says that the Watcher wanted the flow. Err is then how the server has ended;
	// nil: it has not.
	Left bool
}

// Reset after a reset waits at most drainTime until a kernel socket's peer has
// acknowledged what was written before.
const drainTime = 10 * time.Second

// Streams moves bytes between client and server until both have closed, one has
// reset (the other is then reset, after it has got all bytes before), ctx ends
// (both are reset at once). It ends no flow for its silence: keepalive finds the
// dead, and the living may have nothing to say for days. It closes
// neither end; all goroutines of its own are gone when it returns, and o is its own
// until then: on the stack it would be in the way of an idle flow (newDirect).
func Streams(ctx context.Context, client, server flow.Conn, o *Options) Result {
	if o.Up == nil {
		o.Up = new(atomic.Int64)
	}
	if o.Down == nil {
		o.Down = new(atomic.Int64)
	}
	if o.Half == nil {
		o.Half = func() {}
	}
	d, ok := client.(Direct)
	k, ok2 := server.(Kernel)
	switch {
	case o.Watcher != nil && (!ok || !ok2 || len(o.First) > 0):
		return Result{Left: true}
	case !ok || !ok2:
		return relayCopy(ctx, client, server, o)
	}
	r := newDirect(d, k.TCP(), o)
	// This is where the goroutine of an idle flow waits: see newDirect.
	r.run(ctx)
	return r.result()
}

// outcome completes a Result.
func (o *Options) outcome(by Side, why error, up, down int64) Result {
	return Result{Up: o.Up.Load() - up, Down: o.Down.Load() - down, Reason: flow.ReasonOf(why), By: by, Err: why}
}

// resetAfterDelivery resets c once its peer has all that was written before. A
// kernel socket throws away what is not acknowledged and has no event for it,
// so it is asked again and again; others do it by themselves.
func resetAfterDelivery(ctx context.Context, c flow.Conn) {
	if k := flow.Socket(c); k != nil {
		drain(ctx, k)
	}
	_ = c.Reset()
}

func drain(ctx context.Context, c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	deadline := time.Now().Add(drainTime)
	for pause := time.Millisecond; time.Now().Before(deadline); pause = min(2*pause, 50*time.Millisecond) {
		left := 0
		if err := raw.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil || left == 0 {
			return
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}
