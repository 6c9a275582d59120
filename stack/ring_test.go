package stack

import (
	"testing"

	gvbuffer "gvisor.dev/gvisor/pkg/buffer"
)

// fill writes b all over the next piece, as a read of the device does, and lends
// it.
func fill(r *ring, b byte) *gvbuffer.View {
	piece := r.take().AsSlice()
	for i := range piece {
		piece[i] = b
	}
	return r.lend()
}

// What was lent keeps its bytes until it is released, also when more is lent
// than the ring may hold.
func TestLentPiecesAreNotWritten(t *testing.T) {
	var r ring
	defer r.close()
	lent := make([]*gvbuffer.View, 2*maxRing)
	for i := range lent {
		lent[i] = fill(&r, byte(i))
	}
	if len(r.views) > maxRing {
		t.Errorf("%d pieces, at most %d were allowed", len(r.views), maxRing)
	}
	for i, v := range lent {
		for _, b := range v.AsSlice() {
			if b != byte(i) {
				t.Fatalf("piece %d has bytes of %d", i, b)
			}
		}
		v.Release()
	}
}

// A ring that has grown in a burst goes back to what is needed after it.
func TestRingShrinks(t *testing.T) {
	var r ring
	defer r.close()
	var lent []*gvbuffer.View
	for i := range maxRing {
		lent = append(lent, fill(&r, byte(i)))
	}
	if len(r.views) < maxRing/2 {
		t.Fatalf("%d pieces with %d lent", len(r.views), len(lent))
	}
	for _, v := range lent {
		v.Release()
	}
	for range 2 * maxRing * calmTakes {
		r.take()
		r.lend().Release()
	}
	if len(r.views) > 2 {
		t.Errorf("still %d pieces with one lent at a time", len(r.views))
	}
}
