package stack

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"cgtun/flow"
)

// conn is the client end of an accepted flow. Beside flow.Conn it has the
// methods of direct.go. Those read from and write to the same endpoint: use one
// or the other.
type conn struct {
	s             *Stack
	ep            tcpip.Endpoint
	wq            waiter.Queue
	local, remote netip.AddrPort

	entry    waiter.Entry // of Notify and Reset
	notify   func(readable, writable, ended bool)
	filling  payload
	peeked   peeker
	writeEnd atomic.Bool // we have sent a FIN
	closed   atomic.Bool // Close or Reset was called

	whole int64     // receive buffer before it was cut; under Buffers.mu
	once  sync.Once // counts the end

	read, write deadline
}

var _ flow.Conn = (*conn)(nil)

// open takes the endpoint over once the handshake is done.
func (c *conn) open(ep tcpip.Endpoint) {
	c.ep = ep
	o := &c.s.o.TCP
	idle := tcpip.KeepaliveIdleOption(o.KeepAlive)
	interval := tcpip.KeepaliveIntervalOption(keepAliveInterval)
	// Only a wrong value or type could be refused.
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	ep.SocketOptions().SetKeepAlive(true)
	c.s.count.conns.Add(1)
	c.s.o.TCP.Buffers.add(c)
}

// released is called before the endpoint is brought to its end.
func (c *conn) released() {
	c.once.Do(func() {
		c.s.o.TCP.Buffers.remove(c)
		c.s.count.conns.Add(-1)
	})
}

// errorOf gives an error of netstack the name that the rest of the world has
// for it. Nil for "nothing now".
func (c *conn) errorOf(e tcpip.Error) error {
	switch e.(type) {
	case *tcpip.ErrWouldBlock:
		return nil
	case *tcpip.ErrClosedForReceive:
		if c.wasReset() {
			return unix.ECONNRESET
		}
		return io.EOF
	case *tcpip.ErrConnectionReset, *tcpip.ErrAborted, *tcpip.ErrConnectionAborted:
		return unix.ECONNRESET
	case *tcpip.ErrTimeout:
		return unix.ETIMEDOUT
	case *tcpip.ErrClosedForSend, *tcpip.ErrNotConnected:
		return unix.EPIPE
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return unix.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return unix.ENETUNREACH
	}
	return errors.New(e.String())
}

// wasReset tells a reset from an end of the stream. After the client's FIN a
// reset is seen only by the state: reading says "closed" in both cases.
func (c *conn) wasReset() bool {
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateError:
		return true
	case tcp.StateClose:
		return !c.writeEnd.Load()
	}
	return false
}

func (c *conn) opError(op string, err error) error {
	if err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	w := tcpip.SliceWriter(b)
	n := 0
	err := c.wait(&c.read, waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr|waiter.EventRdHUp, func() (bool, error) {
		res, terr := c.ep.Read(&w, tcpip.ReadOptions{})
		if terr != nil {
			err := c.errorOf(terr)
			return err != nil, err
		}
		n = res.Count
		c.moderate(n)
		return true, nil
	})
	if err != nil {
		return 0, c.opError("read", err)
	}
	return n, nil
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	r := bytes.NewReader(b)
	n := 0
	err := c.wait(&c.write, waiter.WritableEvents|waiter.EventHUp|waiter.EventErr, func() (bool, error) {
		for r.Len() > 0 {
			c.clamp()
			m, terr := c.ep.Write(r, tcpip.WriteOptions{})
			n += int(m)
			if terr != nil {
				// What was read and not sent is read again.
				_, _ = r.Seek(int64(n), io.SeekStart)
				err := c.errorOf(terr)
				return err != nil, err
			}
			_, _ = r.Seek(int64(n), io.SeekStart)
		}
		return true, nil
	})
	if err != nil {
		return n, c.opError("write", err)
	}
	return n, nil
}

// wait tries until try is done, each time something may have changed.
func (c *conn) wait(d *deadline, events waiter.EventMask, try func() (done bool, err error)) error {
	var ch chan struct{}
	for {
		if c.closed.Load() {
			return net.ErrClosed
		}
		late := d.passed()
		if isClosed(late) {
			return os.ErrDeadlineExceeded
		}
		if done, err := try(); done {
			return err
		}
		if ch == nil {
			var e waiter.Entry
			e, ch = waiter.NewChannelEntry(events)
			c.wq.EventRegister(&e)
			defer c.wq.EventUnregister(&e)
			continue // something may have come before the registration
		}
		select {
		case <-ch:
		case <-late:
		}
	}
}

// CloseWrite implements flow.Conn.
func (c *conn) CloseWrite() error {
	c.writeEnd.Store(true)
	if terr := c.ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
		return c.opError("close", c.errorOf(terr))
	}
	return nil
}

// Close implements net.Conn. What was written is still delivered, within the
// linger time.
func (c *conn) Close() error {
	if !c.closed.CompareAndSwap(false, true) {
		return nil
	}
	c.read.stop()
	c.write.stop()
	c.writeEnd.Store(true)
	// Zero windows of a client that is alive and does not read would keep the
	// endpoint for ever. The time counts from the last progress.
	linger := tcpip.TCPUserTimeoutOption(c.s.o.TCP.Linger)
	_ = c.ep.SetSockOpt(&linger)
	c.released()
	c.ep.Close()
	return nil
}

// Reset implements flow.Conn. The RST goes when the client has acknowledged all
// that was written, or when it has not for the linger time.
func (c *conn) Reset() error {
	if !c.closed.CompareAndSwap(false, true) {
		return nil
	}
	c.read.stop()
	c.write.stop()
	linger := tcpip.TCPUserTimeoutOption(c.s.o.TCP.Linger)
	_ = c.ep.SetSockOpt(&linger)
	c.released()
	(&resetting{ep: c.ep, pause: minResetPause}).begin(&c.wq)
	return nil
}

const (
	// oneByte is a send buffer that is writable exactly when it is empty.
	oneByte                      = 2
	minResetPause, maxResetPause = 5 * time.Millisecond, 500 * time.Millisecond
)

// resetting aborts an endpoint when its send queue is empty. Abort alone would
// throw the queue away, and no option tells how much is in it; but an endpoint
// whose send buffer holds one byte is writable exactly when nothing is left.
// Netstack may set the size that it has just computed for an ACK after ours, so
// ours is set again until it stays, and since that size decides too whether an
// event is sent, a timer asks as well.
type resetting struct {
	ep    tcpip.Endpoint
	entry waiter.Entry

	mu    sync.Mutex
	done  bool
	pause time.Duration
	timer *time.Timer
}

func (r *resetting) begin(wq *waiter.Queue) {
	// Called with the endpoint locked: the goroutine ends when it got that
	// lock.
	r.entry = waiter.NewFunctionEntry(waiter.WritableEvents|waiter.EventHUp|waiter.EventErr, func(waiter.EventMask) { go r.check() })
	wq.EventRegister(&r.entry)
	r.mu.Lock()
	r.timer = time.AfterFunc(r.pause, r.later)
	r.mu.Unlock()
	r.check()
}

// check aborts if the time has come.
func (r *resetting) check() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done || !r.empty() {
		return
	}
	r.done = true
	r.timer.Stop()
	r.ep.Abort()
}

// later is check by the timer.
func (r *resetting) later() {
	r.check()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.done {
		r.pause = min(2*r.pause, maxResetPause)
		r.timer.Reset(r.pause)
	}
}

// empty says whether nothing is left to be delivered, or never will be.
func (r *resetting) empty() bool {
	o := r.ep.SocketOptions()
	if o.GetSendBufferSize() != oneByte {
		o.SetSendBufferSize(oneByte, true)
	}
	switch tcp.EndpointState(r.ep.State()) {
	case tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
		// Our FIN is behind the data, and not acknowledged: to netstack an
		// endpoint that is closed for sending is always writable.
		return false
	}
	// Closed for receiving is reported whatever was asked.
	return r.ep.Readiness(waiter.WritableEvents)&waiter.WritableEvents != 0 && o.GetSendBufferSize() == oneByte
}

// LocalAddr implements net.Conn: where the client wanted to go.
func (c *conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr implements net.Conn: the client.
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	c.read.set(t)
	c.write.set(t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { c.read.set(t); return nil }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { c.write.set(t); return nil }

// String is for logs.
func (c *conn) String() string { return fmt.Sprintf("%s -> %s", c.remote, c.local) }

// deadline is a channel that is closed when a time has passed. The zero value
// has none.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	late  chan struct{}
}

// passed returns the channel; nil without a deadline ever set.
func (d *deadline) passed() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.late == nil {
		d.late = make(chan struct{})
	}
	return d.late
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		d.late = nil // it fired, or is about to close the old channel
	}
	d.timer = nil
	if d.late == nil || isClosed(d.late) {
		d.late = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	late := d.late
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { close(late) })
		return
	}
	close(late)
}

func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
