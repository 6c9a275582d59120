package router

import (
	"context"
	"slices"
	"time"

	"cgtun/flow"
)

// Hundreds of connections on which next to nothing moves can fill the room of all
// others. No connection is ended for its silence as long as there is room; but when
// new flows were refused since the last look, the source that has most of them gives up
// those that are idle for longest. That there is no room is not enough: nobody may want
// any, and what was stalled fills the memory when it begins to move.

const (
	// shedFrom is how many connections a source has before any of them are ended
	// to make room for others.
	shedFrom = 512
	// shedIdle is for how long nothing has moved on those.
	shedIdle = 30 * time.Second
	// shedPart of them ends at each look.
	shedPart = 8
)

// moves notes whether anything has moved since the last look. Run alone calls it.
func (e *entry) moves(now time.Time) {
	if sum := e.up.Load() + e.down.Load() + 1; sum != e.moved {
		e.moved, e.movedAt = sum, now
	}
}

// shed makes room, if new flows find none. Run alone calls it, after moves of all.
func (r *Router) shed(live []*entry, now time.Time) {
	if !r.turnedAway.Swap(false) || !r.full.Load() && !r.scarce.Load() {
		return
	}
	sources := map[dialSource][]*entry{}
	var most []*entry
	for _, e := range live {
		if e.flow.Proto != flow.TCP || !e.open() {
			continue
		}
		of := sourceOf(e.flow)
		sources[of] = append(sources[of], e)
		if len(sources[of]) > len(most) {
			most = sources[of]
		}
	}
	if len(most) < shedFrom {
		return
	}
	part := len(most) / shedPart
	most = slices.DeleteFunc(most, func(e *entry) bool { return now.Sub(e.movedAt) < shedIdle })
	slices.SortFunc(most, func(a, b *entry) int { return a.movedAt.Compare(b.movedAt) })
	for _, e := range most[:min(part, len(most))] {
		e.stop(context.Canceled)
	}
	if n := min(part, len(most)); n > 0 {
		r.counts.shed.Add(uint64(n))
		r.log.Info("idle connections of one source made room", "flows", n, "attachment", most[0].flow.Attachment, "src", most[0].flow.Src.Addr().String())
	}
}

// open says whether the flow has been connected, and not ended.
func (e *entry) open() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cancel != nil && (e.state == flow.StateOpen || e.state == flow.StateClosing)
}

// stoppedBy says how the flow is ended.
func (e *entry) stoppedBy(cancel context.CancelCauseFunc) {
	e.mu.Lock()
	e.cancel = cancel
	e.mu.Unlock()
}

// stop ends the flow: both ends are reset.
func (e *entry) stop(why error) {
	e.mu.Lock()
	cancel := e.cancel
	e.mu.Unlock()
	if cancel != nil {
		cancel(why)
	}
}
