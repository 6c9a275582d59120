package router

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
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

// quiet is what is known of one of them, from the first look on. Who looks has it; its
// flow may have ended meanwhile, or have another server.
type quiet struct {
	conn  *dialer.Conn
	by    rescuer // that has made conn
	bytes int64
	looks int // without a byte; -1: it has not moved yet
	pulse dialer.Pulse
}

// watchQuiet begins to look after a flow, whose server is by a rescuer, until its end.
func (e *entry) watchQuiet(ends *streamEnds) {
	if !e.r.quiets.Load() { // nearly never: all processors read it
		e.r.quiets.Store(true)
	}
	e.mu.Lock()
	e.watched, ends.quiet = ends, nil
	e.mu.Unlock()
}

// unwatchQuiet ends that before.
func (e *entry) unwatchQuiet() {
	e.mu.Lock()
	e.watched = nil
	e.mu.Unlock()
}

// lookForQuiet looks at all of them, again and again, until ctx ends.
func (r *Router) lookForQuiet(ctx context.Context) {
	tick := time.NewTicker(quietEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if r.quiets.Load() {
				r.lookAtQuiet(now)
			}
		}
	}
}

func (r *Router) lookAtQuiet(now time.Time) {
	live := r.table.alive(now)
	pulsing := 0
	for i, first := 0, rand.IntN(max(len(live), 1)); i < len(live); i++ {
		e := live[(first+i)%len(live)] // not always the same ones are above the bound
		q := e.quiet()
		if q == nil {
			continue
		}
		if q.look(e.up.Load()+e.down.Load(), pulsing < maxPulsing) {
			pulsing++
		}
		if q.looks > quietAfter && q.by.Down(q.conn.Path[len(q.conn.Path)-1]) >= lostAfter {
			e.stopQuiet(q)
		}
	}
}

// quiet returns what is known of the flow, if it is watched.
func (e *entry) quiet() *quiet {
	e.mu.Lock()
	defer e.mu.Unlock()
	ends := e.watched
	if ends == nil {
		return nil
	}
	if ends.quiet == nil { // most flows end before
		ends.quiet = &quiet{conn: ends.server, by: ends.by.(rescuer), looks: -1}
	}
	return ends.quiet
}

// stopQuiet ends the flow, if it still goes by the path that is lost.
func (e *entry) stopQuiet(q *quiet) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.watched != nil && e.watched.quiet == q && e.cancel != nil {
		e.cancel(errPathDown)
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
