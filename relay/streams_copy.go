package relay

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/flow"

	"golang.org/x/sys/unix"
)

const (
	// copyBuffer is what one direction of the plain path holds while open.
	copyBuffer = 32 << 10
	// lastWords is how long a side that takes nothing any more may be silent.
	lastWords = 30 * time.Second
	// spliceStep bounds one splice, so that the counts are live.
	spliceStep = 1 << 20
)

// copier is the plain path: a goroutine and a buffer a direction. Between two
// kernel sockets the kernel moves the bytes (splice(2)) and there is no buffer.
type copier struct {
	client, server flow.Conn
	o              *Options

	once sync.Once
	by   Side
	why  error
	over chan struct{}

	mu    sync.Mutex
	sides [Server + 1]struct {
		broken error // of a write to it
		shut   bool  // it was told that nothing more comes
		said   bool  // nothing more comes from it
	}
}

func relayCopy(ctx context.Context, client, server flow.Conn, o *Options) Result {
	up, down := o.Up.Load(), o.Down.Load()
	c := &copier{client: client, server: server, o: o, over: make(chan struct{})}
	c.sides[Server].broken, c.sides[Server].shut = o.Broken, o.Shut
	ended := make(chan struct{})
	var watch, halves sync.WaitGroup
	watch.Go(func() { c.watch(ctx, ended) })
	halves.Go(func() { c.up() })
	halves.Go(func() { c.half(client, server, Server, o.Down) })
	halves.Wait()
	close(ended)
	watch.Wait()
	_ = client.SetDeadline(time.Time{})
	_ = server.SetDeadline(time.Time{})
	switch {
	case c.why == nil:
	case c.by == Client:
		resetAfterDelivery(ctx, server)
	case c.by == Server:
		resetAfterDelivery(ctx, client)
	default:
		_ = client.Reset()
		_ = server.Reset()
	}
	return o.outcome(c.by, c.why, up, down)
}

// end notes the first failure.
func (c *copier) end(by Side, why error) {
	c.once.Do(func() {
		c.by, c.why = by, why
		close(c.over)
	})
}

// wake ends both directions. Deadlines leave the ends usable: what a peer sent
// before its reset is still to be delivered by Reset.
func (c *copier) wake() {
	_ = c.client.SetDeadline(flow.Past)
	_ = c.server.SetDeadline(flow.Past)
}

// watch wakes both directions when the flow has failed or ctx has ended.
func (c *copier) watch(ctx context.Context, ended <-chan struct{}) {
	select {
	case <-ended:
		return
	case <-ctx.Done():
		c.end(Neither, context.Cause(ctx))
	case <-c.over:
	}
	c.wake()
	<-ended
}

// up moves what the client has sent already, and then what it sends.
func (c *copier) up() {
	var err error
	if len(c.o.First) > 0 { // TLS sends nothing, too
		var n int
		n, err = c.server.Write(c.o.First)
		c.o.Up.Add(int64(n))
	}
	switch {
	case err != nil:
		c.halfEnded(c.server, Client, err, true)
	case c.o.Gone != nil:
		c.end(Client, c.o.Gone)
	default:
		c.half(c.server, c.client, Client, c.o.Up)
	}
}

// half moves one direction to its end and passes that on.
func (c *copier) half(dst, src flow.Conn, from Side, count *atomic.Int64) {
	err, writing := move(dst, src, count)
	c.halfEnded(dst, from, err, writing)
}

// halfEnded passes on how a direction has ended: writing with an error of dst.
func (c *copier) halfEnded(dst flow.Conn, from Side, err error, writing bool) {
	to := Client + Server - from
	switch {
	case writing && !flow.IsDeadline(err):
		c.writeFailed(to, err)
	case c.saidAll(from, err):
	case err == nil:
		c.mu.Lock()
		c.sides[to].shut = true
		c.mu.Unlock()
		// An error means that dst has gone, or has ended already; who reads
		// there sees how.
		_ = dst.CloseWrite()
		c.o.Half()
	case flow.IsDeadline(err):
	default:
		c.end(from, err)
	}
}

func (c *copier) conn(s Side) flow.Conn {
	if s == Client {
		return c.client
	}
	return c.server
}

// writeFailed notes that a side takes nothing any more. What it has said before
// is still to be delivered: the flow ends when that has. A server that does not
// take the last of a client that is gone does not hold the flow for ever.
func (c *copier) writeFailed(to Side, err error) {
	c.mu.Lock()
	c.sides[to].broken = err
	over := c.sides[to].said
	c.mu.Unlock()
	if over {
		c.end(to, err)
		return
	}
	_ = c.conn(to).SetReadDeadline(time.Now().Add(lastWords))
	if to == Client {
		_ = c.server.SetWriteDeadline(time.Now().Add(drainTime))
	}
	select {
	case <-c.over: // and has woken before
		c.wake()
	default:
	}
}

// saidAll notes that nothing comes from a side any more, or can be passed on, and
// says whether that has ended the flow.
func (c *copier) saidAll(from Side, err error) bool {
	reset := err == nil && wasReset(c.conn(from))
	c.mu.Lock()
	s := &c.sides[from]
	s.said = true
	broken := s.broken
	if broken == nil && reset && !s.shut {
		broken = unix.ECONNRESET
	}
	c.mu.Unlock()
	if broken == nil || err != nil && !flow.IsDeadline(err) {
		return false
	}
	c.end(from, broken)
	return true
}

// wasReset says whether the end that was read of a socket may be a reset: a write
// that hears of one takes the error with it.
func wasReset(c flow.Conn) bool {
	k, ok := c.(Kernel)
	return ok && state(k.TCP()) == unix.BPF_TCP_CLOSE
}

// move copies until the end of src. An error is one of writing or of reading.
func move(dst, src flow.Conn, count *atomic.Int64) (err error, writing bool) {
	kd, ok := dst.(Kernel)
	ks, ok2 := src.(Kernel)
	if ok && ok2 {
		return spliceAll(kd.TCP(), ks.TCP(), count)
	}
	buf := make([]byte, copyBuffer)
	for {
		n, rerr := src.Read(buf)
		if n > 0 {
			m, werr := dst.Write(buf[:n])
			count.Add(int64(m))
			if werr != nil {
				return werr, true
			}
		}
		if rerr == io.EOF {
			return nil, false
		}
		if rerr != nil {
			return rerr, false
		}
	}
}

func spliceAll(dst, src *net.TCPConn, count *atomic.Int64) (err error, writing bool) {
	for {
		n, err := dst.ReadFrom(&io.LimitedReader{R: src, N: spliceStep})
		count.Add(n)
		if err != nil {
			return err, !closed(src) && closed(dst)
		}
		if n < spliceStep {
			return nil, false
		}
	}
}

// closed says whether a socket was reset, or has ended in both directions.
func closed(c *net.TCPConn) bool {
	s := state(c)
	return s == unix.BPF_TCP_CLOSE || s == 0
}

// state returns the state of a socket, 0 if it has none.
func state(c *net.TCPConn) uint8 {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); cerr != nil || err != nil {
		return 0
	}
	return info.State
}
