package stack

import (
	"container/list"
	"net/netip"
	"runtime"
	"runtime/metrics"
	"sync"
	"time"
)

const (
	// beginAtOnce is how many flows of one kind begin at a time: as many owners of
	// one attachment are looked up.
	beginAtOnce = 8
	// maxWaiting is how many others wait for their turn. Beyond it the oldest goes:
	// who is there asks again.
	maxWaiting = 1024
	// crowd is how many goroutines may wait for each processor before those that
	// wait for their turn wait on: what the processor does in a pause, after which
	// that is looked at again. One begins each atLeast all the same.
	crowd, pause, atLeast = 8, 250 * time.Microsecond, 2 * time.Millisecond
	// endAtOnce is how many flows are ended in a millisecond.
	endAtOnce = 8
)

// beginner is a flow that waits for its turn.
type beginner interface {
	source() netip.Addr
	begin() // does not block
}

// turns has flows begin a few at a time. Whose is it, what do the rules say, its
// socket, its end: a flow takes tenths of a millisecond of a processor. If all flows of
// a flood began at once, every other flow of the process would have thousands of
// goroutines before it at each of its steps. So a flow waits for its turn without
// one, and what goes before it began has cost next to nothing. Where goroutines wait
// all the same, for what has begun before, few begin. Who finds a free turn does not
// wait for anything.
//
// The next turn is another source address's, and of one address that of the newest
// flow: its client is still there. One that says so again is as good as new.
type turns struct {
	mu      sync.Mutex
	free    int
	sources map[netip.Addr]*waiters
	order   *list.List  // of *waiters, the next one first
	age     *list.List  // of *turn, all that wait, the oldest first
	began   time.Time   // that one that had waited began last
	later   *time.Timer // to nextLocked
	busy    func() bool // crowded
}

// waiters are the flows of one source that wait; there is one at least.
type waiters struct {
	flows *list.List // of *turn, the newest first
	place *list.Element
}

// turn is that of one flow. Its fields are guarded by turns.mu.
type turn struct {
	of           *turns
	flow         beginner
	place, inAge *list.Element // while it waits
	taken        bool          // and not given back
}

func newTurns() *turns {
	return &turns{free: beginAtOnce, sources: make(map[netip.Addr]*waiters), order: list.New(), age: list.New(), busy: crowded}
}

// ask has b begin, now or later; w is b's, and asks once. Who had to go for it is
// returned.
func (t *turns) ask(w *turn, b beginner) (gone beginner) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w.of, w.flow = t, b
	if t.free > 0 && t.age.Len() == 0 {
		t.beginLocked(w)
		return nil
	}
	if t.age.Len() >= maxWaiting {
		oldest := t.age.Front().Value.(*turn)
		t.removeLocked(oldest)
		gone = oldest.flow
	}
	src := b.source()
	s := t.sources[src]
	if s == nil {
		s = &waiters{flows: list.New()}
		s.place = t.order.PushBack(s)
		t.sources[src] = s
	}
	w.place, w.inAge = s.flows.PushFront(w), t.age.PushBack(w)
	return gone
}

// again says that the client has asked once more.
func (w *turn) again() {
	t := w.of
	t.mu.Lock()
	defer t.mu.Unlock()
	if w.place != nil {
		t.sources[w.flow.source()].flows.MoveToFront(w.place)
		t.age.MoveToBack(w.inAge)
	}
}

// leave says that the flow has ended: if it waits, it does not begin.
func (w *turn) leave() {
	if w.of == nil {
		return // it has not asked
	}
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	if w.place != nil {
		w.of.removeLocked(w)
	}
}

func (t *turns) removeLocked(w *turn) {
	src := w.flow.source()
	s := t.sources[src]
	s.flows.Remove(w.place)
	t.age.Remove(w.inAge)
	w.place, w.inAge = nil, nil
	if s.flows.Len() == 0 {
		t.order.Remove(s.place)
		delete(t.sources, src)
	}
}

// end gives the turn of a flow that has begun back. It may be called again.
func (w *turn) end() {
	t := w.of
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !w.taken {
		return
	}
	w.taken = false
	t.free++
	t.nextLocked()
}

// nextLocked has others begin, or some of them later.
func (t *turns) nextLocked() {
	for t.free > 0 && t.age.Len() > 0 {
		now := time.Now()
		if now.Sub(t.began) < atLeast && t.busy() {
			if t.later == nil {
				t.later = time.AfterFunc(pause, t.afterPause)
			}
			return
		}
		t.began = now
		front := t.order.Front()
		t.order.MoveToBack(front)
		w := front.Value.(*waiters).flows.Front().Value.(*turn)
		t.removeLocked(w)
		t.beginLocked(w)
	}
}

func (t *turns) afterPause() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.later = nil
	t.nextLocked()
}

func (t *turns) beginLocked(w *turn) {
	t.free--
	w.taken = true
	w.flow.begin()
}

// crowded says whether many goroutines of the process wait for a processor.
func crowded() bool {
	s := []metrics.Sample{{Name: "/sched/goroutines/runnable:goroutines"}}
	metrics.Read(s)
	return s[0].Value.Uint64() > uint64(crowd*runtime.GOMAXPROCS(0))
}

// endAll ends flows, whose goroutines then have work to do, a few at a time: others
// are not to wait for those of all.
func endAll[T any](flows []T, end func(T)) {
	for i, f := range flows {
		if end(f); i%endAtOnce == endAtOnce-1 {
			time.Sleep(time.Millisecond)
		}
	}
}
