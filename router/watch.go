package router

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/flow"
)

// watches are those who follow the table. Flows never wait for them: an event
// that finds a watcher's buffer full is lost to it, and counted.
type watches struct {
	buffer int
	any    atomic.Bool // false: nobody has to be told, and no lock is taken

	mu   sync.Mutex
	list map[*watch]bool
}

type watch struct {
	events chan flow.Event
}

// Watch calls f for each change of a flow until ctx ends, and returns then; at
// first for each flow that lives already, as if it were new (one that begins at
// that very moment can be told of twice). f may take its
// time, but what changes while WatchBuffer events wait is lost to it
// (Counters.EventsLost).
func (r *Router) Watch(ctx context.Context, f func(flow.Event)) {
	ws := &r.table.watches
	w := &watch{events: make(chan flow.Event, ws.buffer)}
	ws.add(w)
	defer ws.remove(w)
	now := time.Now()
	live := r.table.alive(now)
	for _, e := range live {
		if ctx.Err() != nil {
			return
		}
		f(flow.Event{Event: flow.EventOpen, Flow: e.info(now)})
	}
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-w.events:
			f(event)
		}
	}
}

func (ws *watches) add(w *watch) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.list == nil {
		ws.list = make(map[*watch]bool)
	}
	ws.list[w] = true
	ws.any.Store(true)
}

func (ws *watches) remove(w *watch) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	delete(ws.list, w)
	ws.any.Store(len(ws.list) > 0)
}

// tell sends an event to all who watch.
func (ws *watches) tell(kind string, e *entry) {
	if !ws.any.Load() {
		return
	}
	event := flow.Event{Event: kind, Flow: e.info(time.Now())}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for w := range ws.list {
		select {
		case w.events <- event:
		default:
			e.r.counts.lost.Add(1)
		}
	}
}
