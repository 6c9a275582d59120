package relay

import (
	"errors"
	"fmt"
	"sync"

	"cgtun/flow"
)

// PacketReader is the reading half of a flow.PacketConn or of an outbound.
type PacketReader interface {
	ReadBatch([]flow.Datagram) (int, error)
}

// PacketWriter is the writing half. With a *flow.PeerError the datagram behind
// those that it counts was not sent.
type PacketWriter interface {
	WriteBatch([]flow.Datagram) (int, error)
}

// lender is a PacketReader that can give out buffers of its own, which are valid
// until the next call: nothing is copied, and while it waits nobody holds any.
// What dgs had before does not matter.
type lender interface {
	ReadLent(dgs []flow.Datagram) (int, error)
}

const (
	// batchSize is how many reads one Batch.Read returns at most; firstBatch until
	// it has returned as many: most sources never do, and there are thousands.
	batchSize  = 32
	firstBatch = 4
	// plainSize is the same for a reader that does not lend: each place then
	// is 64 KiB that is held while it waits.
	plainSize    = 8
	datagramSize = 64 << 10
)

type plainBuffers [plainSize][datagramSize]byte

var plainPool = sync.Pool{New: func() any { return new(plainBuffers) }}

// Batch reads datagrams, by loan where the reader can lend. Use it from one
// goroutine; Release it when done.
type Batch struct {
	reader PacketReader
	lender lender
	plain  *plainBuffers
	dgs    []flow.Datagram
	full   bool // dgs is too small
}

// NewBatch returns a Batch that reads from r.
func NewBatch(r PacketReader) *Batch {
	b := &Batch{reader: r}
	if l, ok := r.(lender); ok {
		b.lender, b.dgs = l, make([]flow.Datagram, firstBatch)
		return b
	}
	b.plain, b.dgs = plainPool.Get().(*plainBuffers), make([]flow.Datagram, plainSize)
	return b
}

// Read waits for datagrams. They are valid until the next call.
func (b *Batch) Read() ([]flow.Datagram, error) {
	if b.lender != nil {
		if b.full {
			b.dgs, b.full = make([]flow.Datagram, batchSize), false
		}
		n, err := b.lender.ReadLent(b.dgs)
		b.full = n == firstBatch && len(b.dgs) == firstBatch
		return b.dgs[:n], err
	}
	for i := range b.plain {
		b.dgs[i] = flow.Datagram{Data: b.plain[i][:]}
	}
	n, err := b.reader.ReadBatch(b.dgs)
	return b.dgs[:n], err
}

// Release gives the buffers back.
func (b *Batch) Release() {
	if b.plain != nil {
		plainPool.Put(b.plain)
		b.plain = nil
	}
}

// Send writes all of dgs to w. What concerns one peer is told to failed, and the
// others are sent; any other error ends it.
func Send(w PacketWriter, dgs []flow.Datagram, failed func(*flow.PeerError)) error {
	for len(dgs) > 0 {
		n, err := w.WriteBatch(dgs)
		if err == nil {
			return nil
		}
		var peer *flow.PeerError
		if !errors.As(err, &peer) {
			return err
		}
		failed(peer)
		dgs = dgs[min(n+1, len(dgs)):]
	}
	return nil
}

// PacketOptions say who is told what Packets sees. Both functions are needed
// and called in Packets's goroutine.
type PacketOptions struct {
	// Seen gets every batch before it is written. It keeps nothing.
	Seen func([]flow.Datagram)
	// Failed gets the failures of single peers.
	Failed func(*flow.PeerError)
}

// Packets moves datagrams from src to dst, joined ones as they are, until one of
// them ends, which its error tells. It closes neither.
func Packets(dst PacketWriter, src PacketReader, o PacketOptions) error {
	b := NewBatch(src)
	defer b.Release()
	for {
		dgs, err := b.Read()
		if len(dgs) > 0 {
			o.Seen(dgs)
			if err := Send(dst, dgs, o.Failed); err != nil {
				return fmt.Errorf("write datagrams: %w", err)
			}
		}
		var peer *flow.PeerError
		switch {
		case err == nil:
		case errors.As(err, &peer):
			o.Failed(peer)
		default:
			return fmt.Errorf("read datagrams: %w", err)
		}
	}
}
