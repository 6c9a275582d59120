package stack

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeFlow notes when it begins.
type fakeFlow struct {
	turn
	name  string
	src   netip.Addr
	begun *[]string
}

func (f *fakeFlow) source() netip.Addr { return f.src }
func (f *fakeFlow) begin()             { *f.begun = append(*f.begun, f.name) }

// A flood begins no more than a few flows at once; the next turn is another source's,
// and the newest flow's.
func TestFlowsBeginInTurn(t *testing.T) {
	var begun []string
	ts := newTurns()
	ts.busy = func() bool { return false }
	ask := func(name, src string) (*fakeFlow, beginner) {
		f := &fakeFlow{name: name, src: netip.MustParseAddr(src), begun: &begun}
		return f, ts.ask(&f.turn, f)
	}
	var first []*fakeFlow
	for range beginAtOnce {
		f, _ := ask("first", "10.0.0.1")
		first = append(first, f)
	}
	if len(begun) != beginAtOnce {
		t.Fatalf("%d began at once, want %d", len(begun), beginAtOnce)
	}
	begun = nil
	old, _ := ask("old", "10.0.0.1")
	given, _ := ask("given up", "10.0.0.1")
	ask("new", "10.0.0.1")
	ask("newest", "10.0.0.1")
	ask("other", "10.0.0.2")
	given.leave()
	if len(begun) != 0 {
		t.Errorf("%v began without a turn", begun)
	}
	for i := range 2 {
		first[i].end()
		first[i].end() // says nothing new
	}
	old.again()
	for i := range 3 {
		first[2+i].end()
	}
	if want := []string{"newest", "other", "old", "new"}; !slices.Equal(begun, want) {
		t.Errorf("began as %v, want %v", begun, want)
	}
	if ts.free != 1 || len(ts.sources) != 0 || ts.order.Len() != 0 || ts.age.Len() != 0 {
		t.Errorf("left: %+v", ts)
	}

	// Of too many that wait the oldest goes.
	ask("last turn", "10.0.0.1")
	oldest, gone := ask("oldest", "10.0.0.1")
	for range maxWaiting {
		if gone != nil {
			t.Fatal("somebody had to go while there was room")
		}
		_, gone = ask("flood", "10.0.0.2")
	}
	if gone != beginner(oldest) || ts.age.Len() != maxWaiting {
		t.Errorf("%v had to go, %d wait", gone, ts.age.Len())
	}
}

// While many goroutines wait for a processor, those that wait for their turn begin one
// by one.
func TestFewFlowsBeginInACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var begun []string
		ts := newTurns()
		var busy atomic.Bool
		busy.Store(true)
		ts.busy = busy.Load
		count := func() int {
			synctest.Wait()
			ts.mu.Lock()
			defer ts.mu.Unlock()
			return len(begun)
		}
		var first []*fakeFlow
		for range 2 * beginAtOnce {
			f := &fakeFlow{src: netip.MustParseAddr("10.0.0.1"), begun: &begun}
			ts.ask(&f.turn, f)
			first = append(first, f)
		}
		for _, f := range first[:beginAtOnce] {
			f.end()
		}
		time.Sleep(3*atLeast - pause)
		if n := count(); n != beginAtOnce+3 { // one at once
			t.Errorf("%d began, want %d and 3 more", n, beginAtOnce)
		}
		busy.Store(false)
		time.Sleep(pause)
		if n := count(); n != 2*beginAtOnce {
			t.Errorf("%d began, want all %d", n, 2*beginAtOnce)
		}
		for _, f := range first {
			f.leave()
		}
	})
}
