package stack

import (
	"sync"
	"sync/atomic"
)

// # Theory of operation
//
// A buffer is a limit and holds nothing by itself; what one side sends and the
// other does not take fills it. So a connection may have buffers of some MiB,
// and a thousand of them must not fill theirs.
//
// How full the memory is decides, in thirty-seconds of its limit, both without
// what the connections would take if they were idle:
//
//	below 4    buffers are as large as they grow by need
//	4 to 9     with each, the largest send buffer is half of what it was: 64 KiB
//	           at last, which is one packet of the device; receive buffers do
//	           not grow; new ones begin smaller, with 64 KiB at least
//	from 12    with every second again, down to 16 KiB
//	24         receive buffers are cut, until it is below 20
//
// A send buffer can shrink at any time: it takes nothing until it is below its
// size. But netstack drops bytes of a write that has asked for the size before,
// so who writes makes it smaller, before it writes (clamp). It grows again by
// itself.
//
// A receive buffer cannot shrink. Its window was promised to the client, and what
// comes within it and finds no room is lost, and sent again after longer and
// longer pauses; a client whose bytes are lost for a quarter of an hour gives up.
// So receive buffers begin small, grow only while there is much room, and are
// cut only where the process would go under otherwise: that is counted.
const (
	parts    = 32
	freely   = 4 // below: no bound but TCPOptions.Buffer
	slowly   = 12
	cutAt    = 24
	uncutAt  = 20
	leastOut = 16 << 10
	// leastIn is the least that a receive buffer begins with: half of it is
	// window, and netstack has promised 10 segments with the SYN-ACK.
	leastIn = 64 << 10
	// idleConn is what a connection takes with nothing in its buffers, here
	// and in router.
	idleConn = 12 << 10
)

// Buffers bounds together what the connections of all stacks that have it in
// their TCPOptions hold. Safe for concurrent use.
type Buffers struct {
	halved atomic.Int32 // how often the largest send buffer is
	tight  atomic.Bool  // cut, for who does not look after connections

	mu    sync.Mutex
	cut   bool           // receive buffers are
	conns map[*conn]bool // accepted and not closed by us
}

// NewBuffers returns Buffers that bound nothing before Fit is called.
func NewBuffers() *Buffers { return &Buffers{conns: make(map[*conn]bool)} }

// Fit says that used of limit bytes are in use. It is to be called again and
// again, the faster the flows can fill the rest.
func (b *Buffers) Fit(used, limit int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	idle := int64(len(b.conns)) * idleConn
	share := int32(min(max(used-idle, 0)*parts/max(limit-idle, 1), parts))
	b.halved.Store(halvings(share))
	cut := share >= cutAt || b.cut && share >= uncutAt
	if cut == b.cut {
		return
	}
	b.cut = cut
	b.tight.Store(cut)
	for c := range b.conns {
		b.fit(c)
	}
}

// halvings is how often the largest send buffer is halved at a share of the limit.
func halvings(share int32) int32 {
	const packet = 6 // 4 MiB to 64 KiB
	switch {
	case share < freely:
		return 0
	case share < slowly:
		return min(share-freely+1, packet)
	}
	return min(packet+1+(share-slowly)/2, parts)
}

// largest is how large the send buffers of a stack may be now.
func (b *Buffers) largest(s *Stack) int {
	return max(s.o.TCP.Buffer>>b.halved.Load(), min(leastOut, s.o.TCP.Buffer))
}

// add takes a connection in, with a receive buffer that is right at this time.
func (b *Buffers) add(c *conn) {
	first := int64(max(b.largest(c.s), leastIn))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns[c] = true
	if o := c.ep.SocketOptions(); first < o.GetReceiveBufferSize() {
		o.SetReceiveBufferSize(first, false)
	}
	b.fit(c)
}

func (b *Buffers) remove(c *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.conns, c)
}

// fit cuts the receive buffer of a connection, or makes it what it was. b.mu is
// held.
func (b *Buffers) fit(c *conn) {
	o := c.ep.SocketOptions()
	size := o.GetReceiveBufferSize()
	switch {
	case b.cut && size > minBuffer:
		c.whole = size
		o.SetReceiveBufferSize(minBuffer, false)
		c.s.count.cut.Add(1)
	case !b.cut && c.whole > size:
		// With the notice that tells the client of the new window. It is
		// as large as it gets, then.
		o.SetReceiveBufferSize(c.whole, true)
		c.whole = 0
	}
}

// clamp makes the send buffer what it may be now. Who writes calls it.
func (c *conn) clamp() {
	if c.s.o.TCP.Buffers.halved.Load() == 0 {
		return
	}
	o, most := c.ep.SocketOptions(), int64(c.s.o.TCP.Buffers.largest(c.s))
	if o.GetSendBufferSize() > most {
		o.SetSendBufferSize(most, false)
	}
}

// moderate lets the receive buffer grow with what is read, while memory allows.
func (c *conn) moderate(n int) {
	if c.s.o.TCP.Buffers.halved.Load() == 0 {
		c.ep.ModerateRecvBuf(n)
	}
}
