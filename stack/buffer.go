package stack

import "sync"

// bufferSizes are what datagrams wait in: one of an ordinary path, one of a
// jumbo frame, and the largest, which joined ones fill too.
var bufferSizes = [...]int{2 << 10, 16 << 10, 64 << 10}

// A buffer holds one datagram, or several joined ones, from the tun until who
// read it asks for the next. Pooled: BenchmarkDeliver shows 0 allocations.
type buffer struct {
	data  []byte // of its class's size
	class int
}

var bufferPools [len(bufferSizes)]sync.Pool

// getBuffer returns a buffer for n bytes, at most the largest size.
func getBuffer(n int) *buffer {
	class := 0
	for n > bufferSizes[class] {
		class++
	}
	if b, ok := bufferPools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{data: make([]byte, bufferSizes[class]), class: class}
}

// free gives the buffer back. Nobody may hold its data any more.
func (b *buffer) free() { bufferPools[b.class].Put(b) }
