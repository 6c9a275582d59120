package router

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/bag"
)

// Flows of groups that fall silent in the midst of something are asked for a sign
// of life (dialer.Pulse). One that gives none is told to its group, while it
// lasts: new flows take another path seconds before the kernel gives this one
// up. Nothing is done to the flow itself, but where the kernel says that there is no
// way out by its path for a while, and there is by another one: then it is over, and
// its client is told, so that it can try again. Where there is no other path it would
// try in vain, and the kernel's own time-outs are waited for.

const (
	quietEvery = 500 * time.Millisecond
	// quietAfter is how many looks without a byte are silence: with the time before the
	// first of them more than the second after which a kernel asks at once.
	quietAfter = 1
	// lookTimes is how many looks are taken before a peer is believed to live.
	lookTimes = 4
	// maxPulsing bounds the flows that are asked at a time.
	maxPulsing = 1024
	// lostAfter is how long a path may be down before its flows end: a cable or a radio
	// that comes back in time costs nothing.
	lostAfter = 5 * time.Second
)

// errPathDown ends a flow whose path has been down for that long.
var errPathDown = fmt.Errorf("the path of the flow is down: %w", unix.ENETDOWN)

// watched are the flows of groups that are under way.
type watched struct {
	mu    sync.Mutex
	flows bag.Bag[*quiet]
}

// quiet is what is known of one of them. Under watched.mu.
type quiet struct {
	bag.Place
	of    *entry
	conn  *dialer.Conn
	by    rescuer // that has made conn
	bytes int64
	looks int // without a byte; -1: it has not moved yet
	pulse dialer.Pulse
}

// watch begins to look after a flow by conn; who calls it calls unwatch, before conn is
// closed.
func (w *watched) watch(e *entry, c *dialer.Conn, by rescuer) *quiet {
	q := &quiet{of: e, conn: c, by: by, looks: -1}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flows.Add(q)
	return q
}

// unwatch ends that; nil is nobody.
func (w *watched) unwatch(q *quiet) {
	if q == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flows.Remove(q)
}

// run looks at all of them, again and again, until ctx ends.
func (w *watched) run(ctx context.Context) {
	tick := time.NewTicker(quietEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.look()
		}
	}
}

func (w *watched) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	pulsing := 0
	all := w.flows.All()
	for i, first := 0, rand.IntN(max(len(all), 1)); i < len(all); i++ {
		q := all[(first+i)%len(all)] // not always the same ones are above the bound
		e := q.of
		if q.look(e.up.Load()+e.down.Load(), pulsing < maxPulsing) {
			pulsing++
		}
		if q.looks > quietAfter && q.by.Down(q.conn.Path[len(q.conn.Path)-1]) >= lostAfter {
			e.stop(errPathDown)
		}
	}
}

// look takes the bytes that a flow has moved, and says whether it is being asked.
func (q *quiet) look(bytes int64, mayAsk bool) bool {
	socket := flow.Socket(q.conn.Conn)
	if bytes != q.bytes {
		if q.looks > quietAfter && socket != nil {
			q.pulse.Rest(socket)
		}
		q.bytes, q.looks = bytes, 0
		return false
	}
	if q.looks < 0 {
		return false
	}
	q.looks++
	switch {
	case q.looks <= quietAfter || socket == nil:
	case q.looks == quietAfter+1:
		if !mayAsk {
			q.looks--
			return false
		}
		return q.pulse.Ask(socket) == nil
	case q.pulse.Dead(socket):
		q.conn.Tell(dialer.Outcome{News: dialer.Quiet})
		return true
	case q.looks > quietAfter+lookTimes:
		// It is there, and has nothing to say.
		q.pulse.Rest(socket)
		q.looks = -1
	default:
		return true
	}
	return false
}
