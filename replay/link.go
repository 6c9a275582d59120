package replay

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
)

// kept is what the client has sent. Bytes are appended by the goroutine of do,
// and by the client's reader after that has ended.
type kept struct {
	mu    sync.Mutex
	cond  sync.Cond
	b     []byte // only appended to
	ended bool   // the client has ended, after b
	given bool   // nobody is to write any more
}

func (k *kept) len() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.b)
}

// with returns what there would be with more behind it.
func (k *kept) with(more []byte) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append(k.b[:len(k.b):len(k.b)], more...)
}

func (k *kept) add(more []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.b = append(k.b, more...)
	k.cond.Broadcast()
}

func (k *kept) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ended = true
	k.cond.Broadcast()
}

// leave stops who writes to one server: somebody else may be asked in its place.
func (k *kept) leave(l *link) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l.left = true
	k.cond.Broadcast()
}

// give stops those who write.
func (k *kept) give() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.given = true
	k.cond.Broadcast()
}

// after waits for something that a server has not got: more bytes, which its
// writing tells, the end, or the order to stop.
func (k *kept) after(l *link) (part []byte, ended, stop bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for !k.given && !l.left && !k.ended && len(k.b) == l.sent {
		k.cond.Wait()
	}
	stop = k.given || l.left
	l.writing.Store(!stop && len(k.b) > l.sent)
	return k.b[l.sent:], k.ended, stop
}

// kernel is an end that is a plain socket.
type kernel interface{ TCP() *net.TCPConn }

// link is one server.
type link struct {
	*dialer.Conn
	socket *net.TCPConn // nil: it is more than a plain socket
	below  *net.TCPConn // the socket below it; nil: not known
	began  time.Time

	sent     int                   // bytes; of pump until that has ended
	shut     bool                  // it was told that nothing more comes; of pump until that has ended
	writeErr atomic.Pointer[error] // why that has ended; nil: it was told to

	left    bool        // under kept.mu: nothing more is to be written
	writing atomic.Bool // pump is in a Write, or about to be
	waiting atomic.Bool // await has not ended

	first   []byte // what it said first, if that could not be left in its socket
	readErr error  // how it has ended; both of await until that has ended
}

func (l *link) name() string { return l.Path[len(l.Path)-1] }

// link puts a server beside the others.
func (r *run) link(c *dialer.Conn) *link {
	l := &link{Conn: c, began: time.Now(), below: flow.Socket(c.Conn)}
	if k, ok := c.Conn.(kernel); ok {
		l.socket = k.TCP()
	}
	r.links = append(r.links, l)
	r.avoid = append(r.avoid, l.name())
	return l
}

// start sends a server what there is, and waits for its word.
func (r *run) start(l *link) {
	r.work.Go(func() { r.pump(l) })
	l.waiting.Store(true)
	r.work.Go(func() { r.await(l) })
}

const readSize = 4 << 10

var readBuffers = sync.Pool{New: func() any { return new([readSize]byte) }}

// readClient reads until the client has ended, somebody sets a deadline, or
// nobody takes it any more.
func (r *run) readClient() {
	buf := readBuffers.Get().(*[readSize]byte)
	defer readBuffers.Put(buf)
	for {
		n, err := r.client.Read(buf[:])
		if n > 0 && !r.send(event{chunk: append([]byte(nil), buf[:n]...)}) {
			r.kept.add(buf[:n]) // for who goes on
			return
		}
		if err != nil {
			if !flow.IsDeadline(err) && !r.send(event{err: err}) && err != io.EOF {
				r.clientErr = err // seen when this has ended
			}
			return
		}
	}
}

// pump writes what is kept to one server until it is closed or stopped.
func (r *run) pump(l *link) {
	for {
		part, ended, stop := r.kept.after(l)
		switch {
		case stop:
			return
		case len(part) == 0 && ended:
			_ = l.CloseWrite() // await sees a failure
			l.shut = true
			return
		}
		n, err := l.Write(part)
		l.writing.Store(false)
		l.sent += n
		if err != nil {
			if !flow.IsDeadline(err) {
				l.writeErr.Store(&err)
			}
			return
		}
	}
}

// await tells of the first byte of a server, or of its end.
func (r *run) await(l *link) {
	var err error
	if l.socket != nil {
		err = peek(l.socket)
	} else {
		buf := make([]byte, 16<<10)
		var n int
		if n, err = l.Read(buf); n > 0 {
			l.first, err = buf[:n], nil
		}
	}
	if flow.IsDeadline(err) {
		return
	}
	l.waiting.Store(false)
	if !r.send(event{link: l, err: err}) {
		l.readErr = err // for who goes on
	}
}

// peek waits for a byte, and leaves it where it is.
func peek(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	n := 0
	err = raw.Read(func(fd uintptr) bool {
		n, failed = flow.Waiting(fd)
		return failed != unix.EAGAIN && failed != unix.EINTR
	})
	switch {
	case err != nil:
		return err
	case failed != nil:
		return failed
	case n == 0:
		return io.EOF
	}
	return nil
}

// unacked says whether the peer's kernel has not got all that was written.
func unacked(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	left := 0
	err = raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return err == nil && left > 0
}

// remove takes a server out of those that live.
func (r *run) remove(l *link) {
	for i, other := range r.links {
		if other == l {
			r.links = append(r.links[:i:i], r.links[i+1:]...)
			return
		}
	}
}

// drop closes all servers but one. For the others that is no failure.
func (r *run) drop(but *link) {
	for _, l := range append([]*link(nil), r.links...) {
		if l != but {
			r.remove(l)
			r.close(l)
		}
	}
	if r.last != nil && r.last != but {
		r.close(r.last)
		r.last = nil
	}
}

// close ends a server that nobody needs.
func (r *run) close(l *link) {
	_ = l.Reset()
	l.Tell(dialer.Outcome{News: dialer.Ended})
	r.o.Closed()
}

// answered gives the flow to the server that has answered first.
func (r *run) answered(ctx context.Context, l *link) Result {
	l.Tell(dialer.Outcome{News: dialer.Answered, After: r.firstByte(l)})
	for _, other := range r.links {
		if other == l {
			break
		}
		// It was silent for so long that another one was asked.
		other.Tell(dialer.Outcome{News: dialer.Failed, Reason: flow.TimedOut, ByServer: true})
		r.hidden = append(r.hidden, failure{other.name(), dialer.HiddenStall})
	}
	return r.giveOn(ctx, l)
}

// firstByte is how long a server has taken to answer; 0: it was not asked.
func (r *run) firstByte(l *link) time.Duration {
	if r.sentAt.IsZero() {
		return 0
	}
	return time.Since(later(r.sentAt, l.began))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// giveOn ends all that is done here, and leaves the flow to one server.
func (r *run) giveOn(ctx context.Context, l *link) Result {
	r.drop(l)
	r.halt(ctx, l)
	if err := l.readErr; err != nil && err != io.EOF {
		r.last = l
		return r.finish(Result{Server: l.Conn, Over: true, Reason: flow.ReasonOf(err), ByServer: true}, l)
	}
	for _, f := range r.hidden {
		if f.outbound != l.name() {
			r.o.Hide(f.outbound, f.kind)
		}
	}
	res := Result{Server: l.Conn, Replays: r.replays, Shut: l.shut}
	if w := l.writeErr.Load(); w != nil {
		res.Broken = *w
	}
	res.Rest = r.kept.b[l.sent:]
	if r.clientErr != io.EOF { // that is seen again
		res.Gone = r.clientErr
	}
	r.count(l)
	if len(l.first) > 0 {
		r.tellClient(ctx, l.first)
	}
	r.release()
	return res
}

// tellClient hands on what could not be left in the server's socket.
func (r *run) tellClient(ctx context.Context, b []byte) {
	stop := context.AfterFunc(ctx, func() { _ = r.client.SetWriteDeadline(flow.Past) })
	n, _ := r.client.Write(b) // who goes on sees why it failed
	if stop() {
		_ = r.client.SetWriteDeadline(time.Time{})
	}
	r.o.Down.Add(int64(n))
}

// halt ends all goroutines. The ends stay usable.
func (r *run) halt(ctx context.Context, l *link) {
	close(r.stop)
	if r.dialing != nil {
		r.dialing()
	}
	r.kept.give()
	_ = r.client.SetReadDeadline(flow.Past)
	// After the order to stop no Write begins: one that is seen here may have
	// ended, one that is not has.
	waiting, writing := l.waiting.Load(), l.writing.Load()
	if waiting {
		_ = l.SetReadDeadline(flow.Past)
	}
	if writing {
		if l.socket != nil {
			_ = l.SetWriteDeadline(flow.Past)
		} else {
			// TLS would not survive that: it is waited for, but not for ever.
			cut := time.AfterFunc(maxHalt, func() { _ = l.Reset() })
			defer cut.Stop()
		}
		cut := context.AfterFunc(ctx, func() { _ = l.Reset() })
		defer cut()
	}
	r.work.Wait()
	_ = r.client.SetReadDeadline(time.Time{})
	if waiting || writing {
		_ = l.SetDeadline(time.Time{})
	}
}

// end is the end of the flow: of ctx, or of the last server, which is told to the
// client.
func (r *run) end(ctx context.Context, why error, byServer bool) Result {
	l := r.last
	if len(r.links) > 0 {
		l = r.links[0]
	}
	r.drop(l)
	if !byServer {
		_ = l.Reset()
	}
	r.halt(ctx, l)
	return r.finish(Result{Server: l.Conn, Over: true, Reason: flow.ReasonOf(why), ByServer: byServer}, l)
}

// finish resets the client.
func (r *run) finish(res Result, l *link) Result {
	_ = r.client.Reset()
	r.count(l)
	res.Replays = r.replays
	r.release()
	return res
}

// count adds what a server has got to what the flow has sent, which was counted already
// as far as it was relay that sent it.
func (r *run) count(l *link) { r.o.Up.Add(int64(max(0, l.sent-r.counted))) }

func (r *run) release() {
	if r.spent {
		r.o.Budget.give()
	}
}
