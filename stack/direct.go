package stack

import (
	"errors"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/waiter"
)

// The methods that relay finds by type assertion (relay.Direct): events instead
// of waiting, bytes where they lie instead of copies. An idle connection then
// costs neither a goroutine nor a buffer here.

// errEnough ends a Read of netstack's that has given all that was wanted.
var errEnough = errors.New("enough")

// Notify implements relay.Direct.
func (c *conn) Notify(f func(readable, writable, ended bool)) {
	if c.notify != nil {
		c.wq.EventUnregister(&c.entry)
	}
	c.notify = f
	if f == nil {
		return
	}
	const read = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr | waiter.EventRdHUp
	const broken = waiter.EventHUp | waiter.EventErr
	c.entry = waiter.NewFunctionEntry(read|waiter.WritableEvents, func(m waiter.EventMask) {
		// Netstack says the same when both sides have ended in order.
		f(m&read != 0, m&(waiter.WritableEvents|broken) != 0, m&broken != 0 && c.wasReset())
	})
	c.wq.EventRegister(&c.entry)
}

// peeker collects the slices of a Read instead of copying them. With drop it
// counts bytes down instead.
type peeker struct {
	slices [][]byte
	drop   int
}

// Write implements io.Writer. Netstack calls it for each view.
func (p *peeker) Write(b []byte) (int, error) {
	if p.drop > 0 {
		n := min(p.drop, len(b))
		p.drop -= n
		if p.drop == 0 {
			return n, errEnough
		}
		return n, nil
	}
	if len(p.slices) == cap(p.slices) {
		return 0, errEnough
	}
	p.slices = append(p.slices, b)
	return len(b), nil
}

// Peek implements relay.Direct. The slices lie in the receive queue, from which
// only Discard, Close and Reset take anything.
func (c *conn) Peek(dst [][]byte) ([][]byte, int, error) {
	c.peeked = peeker{slices: dst}
	res, terr := c.ep.Read(&c.peeked, tcpip.ReadOptions{Peek: true})
	slices := c.peeked.slices
	c.peeked.slices = nil
	if terr != nil {
		return dst, 0, c.errorOf(terr)
	}
	return slices, res.Count, nil
}

// Discard implements relay.Direct.
func (c *conn) Discard(n int) {
	if n <= 0 {
		return
	}
	c.peeked = peeker{drop: n}
	// It reads what Peek has seen: there is nothing to fail.
	_, _ = c.ep.Read(&c.peeked, tcpip.ReadOptions{})
	c.moderate(n)
}

// payload lets netstack read from a function.
type payload struct {
	n    int
	read func([]byte) (int, error)
}

// Len implements tcpip.Payloader.
func (p *payload) Len() int { return p.n }

// Read implements tcpip.Payloader.
func (p *payload) Read(b []byte) (int, error) {
	n, err := p.read(b)
	p.n -= n
	return n, err
}

const (
	// fillPacket is what netstack sends in one piece. A bit more would be a
	// packet of its own, with an acknowledgement of its own.
	fillPacket = maxSegment - header.TCPTotalHeaderMaximumSize - 1
	// maxFill bounds one Fill: reading, segmenting and writing take turns, and
	// each is cheaper the longer its turn.
	maxFill = 8 * fillPacket
)

// Fill implements relay.Direct. Netstack loops for ever on an early end of read
// and loses all on an error, so read must have what was promised.
func (c *conn) Fill(n int, read func([]byte) (int, error)) (int, error) {
	n = min(n, maxFill)
	if n > fillPacket {
		n -= n % fillPacket
	}
	c.filling = payload{n: n, read: read}
	c.clamp()
	sent, terr := c.ep.Write(&c.filling, tcpip.WriteOptions{})
	if terr != nil {
		return 0, c.errorOf(terr)
	}
	return int(sent), nil
}
