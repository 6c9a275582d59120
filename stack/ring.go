package stack

import (
	"slices"

	gvbuffer "gvisor.dev/gvisor/pkg/buffer"
)

// ring recycles the pieces that large segments are read into. Netstack clears
// each piece that it allocates, which costs more than the copy into it; these
// are cleared once and used again.
//
// The ring keeps a view of its own on each piece and lends out clones. By the
// time it comes round, whoever had the clone has released it, and the piece is
// the ring's alone again; if not, netstack's copy on write gives the ring a
// fresh one, and nothing is ever written that somebody else can see. That is
// dear, so the ring grows when it happens, up to 8 MiB a queue, and shrinks when
// it has not for long: what comes round sooner is still in the cache.
type ring struct {
	views []*gvbuffer.View
	next  int
	calm  int // takes since it last grew or shrank
}

const (
	maxRing   = 128
	calmTakes = 256
)

// take returns the piece that is next, all of it writable. It stays the ring's.
func (r *ring) take() *gvbuffer.View {
	if len(r.views) == 0 {
		r.views = append(r.views, gvbuffer.NewViewSize(bodySize))
	}
	r.shrink()
	v := r.views[r.next]
	before := v.BasePtr()
	// Writing nothing is enough to be given an unshared piece.
	_, _ = v.Write(nil)
	if v.BasePtr() != before {
		r.grow()
	}
	return v
}

// grow puts a fresh piece where it is used last, behind the one that is next.
func (r *ring) grow() {
	r.calm = 0
	if len(r.views) < maxRing {
		r.views = slices.Insert(r.views, r.next, gvbuffer.NewViewSize(bodySize))
		r.next++
	}
}

// shrink drops a piece that is not next, if it is time for that.
func (r *ring) shrink() {
	last := len(r.views) - 1
	if r.calm++; r.calm < calmTakes || r.next == last {
		return
	}
	r.calm = 0
	r.views[last].Release()
	r.views = r.views[:last]
}

// lend returns a clone of the piece that take returned last, and goes on.
func (r *ring) lend() *gvbuffer.View {
	v := r.views[r.next].Clone()
	r.next = (r.next + 1) % len(r.views)
	return v
}

func (r *ring) close() {
	for _, v := range r.views {
		v.Release()
	}
}
