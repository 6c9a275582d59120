package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"cgtun/flow"

	"golang.org/x/sys/unix"
)

// # Theory of operation
//
// A Direct client beside a kernel socket. While nothing happens there is one
// goroutine, that of the caller, which waits for the socket, and no buffer.
//
// Down (server to client): the caller's goroutine sleeps in the runtime's poller
// until the socket is readable. SIOCINQ says how many bytes there are, and the
// client reads exactly those from the socket into memory of its own. No room:
// it sleeps until the client says so.
//
// Up (client to server): an event of the client starts the pump, a flow.Burst
// that writes what Peek shows with one writev and discards it, until nothing is
// left; then it ends. The bytes wait in the client's receive buffer until
// the socket has taken them, so the client's window is the back-pressure.
//
// Ends. Each direction ends by itself: end of stream is passed on with
// CloseWrite. When down has ended, the caller goes on waiting on the socket for
// a reset, which is the only thing that can still come there. When up has
// ended, events of the client still start the pump, for the same reason. A
// reset of one side, with all bytes before it passed on, ends both. An error of
// a write says only that the server is gone; what it sent before may still be
// in the socket, so down is let run to its end first. A client that broke is
// given drainTime until the server has taken what came before; a server that
// does not read must not hold the flow for ever.
//
// As long as the server has said nothing a Watcher is asked before anything is done that
// could not be undone: before bytes or an end of the client are passed on, and before
// an end or a silence of the server is. If it wants the flow, all stops as after an end,
// but for that neither side is told.
//
// Waking the caller is done by a read deadline in the past, waking the pump by a
// write deadline; `over` is closed before that. The pump has ended when
// run returns, because the client may recycle what Peek has shown.

const (
	// maxRounds bounds how long one wait of the poller is used before the
	// goroutine is seen by the scheduler again.
	maxRounds = 32
	// maxVec bounds the slices of one writev: 64 reads of a tun or so.
	maxVec = 256
)

type direct struct {
	client Direct
	server *net.TCPConn
	raw    syscall.RawConn
	o      *Options

	up0, down0 int64       // what the counts began with
	unwatch    func() bool // ends the watch on the context

	pump flow.Burst
	room chan struct{} // the client may be writable

	// State of one raw.Read, kept here so that it allocates nothing.
	downFn func(fd uintptr) bool
	readFn func([]byte) (int, error)
	fd     int
	full   bool
	eof    bool
	gone   bool // the client takes nothing any more
	err    error

	unheard bool  // by a Watcher; of the caller's goroutine, and so is
	lostBy  error // how the server has ended that a Watcher wants the flow for

	over chan struct{}

	breakOnce sync.Once
	broken    *time.Timer // set once the client has broken; read after Notify(nil)

	mu      sync.Mutex
	ended   bool
	until   time.Time // when a server that has said nothing has been silent for too long
	by      Side
	why     error
	upDone  bool
	upError error // of a write to the server
}

// newDirect prepares a relay. What run and those that it calls need lies in the
// struct and not on the stack: a goroutine that waits with less than 2 KiB of
// stack, all callers and the runtime's own part included, is given one of 4 KiB
// by the next collection, and one of 8 KiB otherwise.
func newDirect(client Direct, server *net.TCPConn, o *Options) *direct {
	d := &direct{
		client: client, server: server, o: o,
		up0: o.Up.Load(), down0: o.Down.Load(),
		room: make(chan struct{}, 1), over: make(chan struct{}),
		upError: o.Broken, unheard: o.Watcher != nil,
	}
	d.pump.Init(o.Workers, d.up)
	d.downFn, d.readFn = d.fillClient, d.readServer
	d.raw, d.err = server.SyscallConn()
	return d
}

func (d *direct) result() Result {
	if d.why == errLeft {
		return Result{Left: true, Err: d.lostBy}
	}
	return d.o.outcome(d.by, d.why, d.up0, d.down0)
}

// errLeft is why a relay ends that somebody else goes on with.
var errLeft = errors.New("left to who watches")

func (d *direct) run(ctx context.Context) {
	if d.err != nil {
		d.end(Server, d.err)
		d.settle(ctx)
		return
	}
	d.begin(ctx)
	d.down()
	d.finish()
	d.settle(ctx)
}

func (d *direct) begin(ctx context.Context) {
	d.takeUrgent()
	d.unwatch = context.AfterFunc(ctx, func() { d.end(Neither, context.Cause(ctx)) })
	d.client.Notify(d.event)
	d.pump.Look(d.nothingUp) // what came before Notify
}

// takeUrgent leaves the server's urgent byte where it was sent, as RFC 6093 §6
// asks for, and as the client's is passed on. A socket that sets it apart skips
// it, and SIOCINQ, which counts up to it, says for ever that nothing is there.
func (d *direct) takeUrgent() {
	// A kind of socket that refuses has no urgent bytes (MPTCP).
	_ = d.raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
}

// finish returns when nothing of the relay runs any more.
func (d *direct) finish() {
	// No event starts a pump after this, so none is missed by the wait.
	d.client.Notify(nil)
	d.pump.Wait()
	d.unwatch()
	if d.broken != nil {
		d.broken.Stop()
	}
	_ = d.server.SetDeadline(time.Time{})
}

// settle passes a reset on. Nothing else runs any more.
func (d *direct) settle(ctx context.Context) {
	switch {
	case d.why == nil || d.why == errLeft:
	case d.by == Client:
		resetAfterDelivery(ctx, flow.NewTCPConn(d.server))
	case d.by == Server:
		_ = d.client.Reset()
	default:
		_ = d.client.Reset()
		_ = flow.NewTCPConn(d.server).Reset()
	}
}

// end notes the first cause, nil for an end in order, and wakes everybody.
func (d *direct) end(by Side, why error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return
	}
	d.ended, d.by, d.why = true, by, why
	close(d.over)
	_ = d.server.SetDeadline(flow.Past)
}

func (d *direct) isOver() bool {
	select {
	case <-d.over:
		return true
	default:
		return false
	}
}

// event is called by the client with locks held.
func (d *direct) event(readable, writable, ended bool) {
	if ended {
		d.breakOnce.Do(func() {
			d.broken = time.AfterFunc(drainTime, func() { d.end(Client, syscall.ECONNRESET) })
		})
	}
	if writable {
		select {
		case d.room <- struct{}{}:
		default:
		}
	}
	if readable {
		d.pump.Event()
	}
}

// vectors is what a pump works with. Pooled: pumps come and go with each burst.
type vectors struct {
	slices [][]byte
	iov    []unix.Iovec
	n      int // bytes written
	errno  syscall.Errno
	fn     func(fd uintptr) bool
}

var vectorPool = sync.Pool{New: func() any {
	v := &vectors{slices: make([][]byte, 0, maxVec), iov: make([]unix.Iovec, 0, maxVec)}
	v.fn = v.write
	return v
}}

// nothingUp says that the pump would find nothing.
func (d *direct) nothingUp() bool {
	if len(d.o.First) > 0 || d.o.Gone != nil || d.upError != nil {
		return false
	}
	v := vectorPool.Get().(*vectors)
	defer vectorPool.Put(v)
	slices, n, err := d.client.Peek(v.slices[:0])
	clear(slices)
	return n == 0 && err == nil
}

// up moves what the client has sent until there is nothing more now.
func (d *direct) up() {
	v := vectorPool.Get().(*vectors)
	defer vectorPool.Put(v)
	if !d.first(v) {
		return
	}
	for !d.isOver() {
		slices, n, err := d.client.Peek(v.slices[:0])
		if err == io.EOF {
			if w := d.o.Watcher; w != nil && !w.ClientEnds() {
				d.end(Neither, errLeft)
				return
			}
			d.upEnded(d.server.CloseWrite)
			return
		}
		if err != nil {
			d.end(Client, err)
			return
		}
		if n == 0 {
			return
		}
		d.mu.Lock()
		gone := d.upError != nil
		d.mu.Unlock()
		if gone {
			return // kept, unread: the client's window closes
		}
		if d.o.Watcher != nil && !d.o.Watcher.Next(slices, n) {
			clear(slices)
			return
		}
		err = v.writeAll(d.raw, slices)
		clear(slices)
		d.client.Discard(v.n)
		d.o.Up.Add(int64(v.n))
		if d.o.Watcher != nil {
			d.mayBeSilent(d.o.Watcher.Sent(v.n))
		}
		if err != nil && !flow.IsDeadline(err) {
			d.writeFailed(err)
			return
		}
	}
}

// first moves what somebody else has read of the client, and says whether to go on.
func (d *direct) first(v *vectors) bool {
	if _, failed := d.upState(); failed != nil {
		return false
	}
	if len(d.o.First) > 0 {
		err := v.writeAll(d.raw, append(v.slices[:0], d.o.First))
		d.o.First = d.o.First[v.n:]
		d.o.Up.Add(int64(v.n))
		if err != nil && !flow.IsDeadline(err) {
			d.o.First = nil
			d.writeFailed(err)
			return false
		}
	}
	if len(d.o.First) == 0 && d.o.Gone != nil {
		d.end(Client, d.o.Gone)
	}
	return len(d.o.First) == 0
}

// upEnded notes that the client has ended its direction, once.
func (d *direct) upEnded(closeWrite func() error) {
	d.mu.Lock()
	first := !d.upDone
	d.upDone = true
	d.mu.Unlock()
	if !first {
		return
	}
	// An error means that the server has gone; down will say how.
	_ = closeWrite()
	d.o.Half()
	_ = d.server.SetReadDeadline(flow.Past) // down may have ended before
}

// writeFailed notes that the server takes nothing any more.
func (d *direct) writeFailed(err error) {
	d.mu.Lock()
	d.upError = err
	d.mu.Unlock()
	_ = d.server.SetReadDeadline(flow.Past)
}

func (d *direct) upState() (done bool, failed error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.upDone, d.upError
}

// writeAll writes the slices and waits where the socket is full.
func (v *vectors) writeAll(raw syscall.RawConn, slices [][]byte) error {
	v.iov, v.n, v.errno = v.iov[:0], 0, 0
	for _, b := range slices {
		e := unix.Iovec{Base: unsafe.SliceData(b)}
		e.SetLen(len(b))
		v.iov = append(v.iov, e)
	}
	err := raw.Write(v.fn)
	clear(v.iov[:cap(v.iov)])
	if err == nil && v.errno != 0 {
		err = v.errno
	}
	return err
}

func (v *vectors) write(fd uintptr) bool {
	for len(v.iov) > 0 {
		n, _, errno := syscall.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&v.iov[0])), uintptr(len(v.iov)))
		switch errno {
		case 0:
			v.n += int(n)
			v.iov = advance(v.iov, int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			v.errno = errno
			return true
		}
	}
	return true
}

// advance drops the first n bytes.
func advance(iov []unix.Iovec, n int) []unix.Iovec {
	for len(iov) > 0 && n >= int(iov[0].Len) {
		n -= int(iov[0].Len)
		iov = iov[1:]
	}
	if n > 0 {
		iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
		iov[0].SetLen(int(iov[0].Len) - n)
	}
	return iov
}
