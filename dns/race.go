package dns

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// The stagger before the next upstream is asked as well: twice the round
	// trip of the one before, within these bounds.
	minStagger = 100 * time.Millisecond
	maxStagger = 250 * time.Millisecond
	// again is when an upstream is asked once more that has not said anything:
	// a datagram may have been lost.
	again = time.Second
	// maxAttempts bounds the sockets of one question, if it has not more paths.
	maxAttempts = 8
)

type result struct {
	p   *path
	a   *answer
	err error
}

// race asks the paths, and returns the first answer that settles the question,
// else the first one that does not, else nil. It takes places of the client's
// share. elsewhere says that the answer is not of the server that was meant.
func (r *Resolver) race(ctx context.Context, by clientKey, paths []path, q *query) (a *answer, elsewhere bool) {
	if len(paths) == 0 {
		return nil, false
	}
	intent := paths[0].server
	r.health.sort(paths, time.Now())
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()

	most := max(maxAttempts, len(paths))
	results := make(chan result, most)
	began := make([]time.Time, len(paths))
	started, running := 0, 0
	// The first attempt waits for a place; beside one that runs, another one is
	// made only if there is one.
	place := func() bool {
		if running > 0 {
			return r.asking.take(by)
		}
		return r.asking.wait(ctx, by) == nil
	}
	start := func() {
		if !place() {
			return
		}
		p := &paths[started%len(paths)]
		if began[started%len(paths)].IsZero() {
			began[started%len(paths)] = time.Now()
		}
		started++
		running++
		asking.Go(func() {
			a, err := r.ask(ctx, p, q)
			r.asking.give(by)
			results <- result{p, a, err}
		})
	}
	start()
	if started == 0 {
		return nil, false // no place came free in time
	}
	next := time.NewTimer(r.pause(paths, started))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			r.lost(paths, began, nil)
			return a, false
		case <-next.C:
			if started < most {
				start()
			}
			next.Reset(r.pause(paths, started))
		case got := <-results:
			running--
			if got.err == nil && got.a.final() {
				r.won(paths, began, got.p)
				return got.a, intent.asked && got.p.server != intent
			}
			switch {
			case got.err != nil:
				r.health.failed(got.p, time.Now())
				r.log.Debug("no answer of an upstream", "upstream", got.p.id(), "outbound", got.p.out.Name(), "err", got.err)
			case a == nil:
				a = got.a
			}
			switch {
			case started < len(paths):
				start()
				next.Reset(r.pause(paths, started))
			case running == 0:
				return a, false
			}
		}
	}
}

// pause is the time until the next attempt. All paths to a server together get
// the time that it has.
func (r *Resolver) pause(paths []path, started int) time.Duration {
	if started < len(paths) {
		p := &paths[started-1]
		return r.health.stagger(p) / time.Duration(p.beside)
	}
	return again
}

// won notes how fast the one was that answered, and that others did not.
func (r *Resolver) won(paths []path, began []time.Time, by *path) {
	now := time.Now()
	for i := range paths {
		if p := &paths[i]; p == by {
			r.health.answered(p, now.Sub(began[i]))
		}
	}
	r.lost(paths, began, by)
}

// lost notes who has been asked for longer than a stagger and said nothing.
func (r *Resolver) lost(paths []path, began []time.Time, by *path) {
	now, hidden := time.Now(), false
	for i := range paths {
		p := &paths[i]
		if p == by || began[i].IsZero() || now.Sub(began[i]) < r.health.stagger(p)/time.Duration(p.beside) {
			continue
		}
		r.health.failed(p, now)
		hidden = true
	}
	if hidden && by != nil {
		r.counts.hidden.Add(1)
	}
}

// health is how upstreams did, by server and outbound. Safe for concurrent use.
type health struct {
	mu    sync.Mutex
	known map[healthKey]*condition
}

type healthKey struct{ server, outbound, member string }

type condition struct {
	trip   time.Duration // average of the answers' times; 0: none yet
	fails  int           // in a row
	failed time.Time
}

const (
	maxHealth = 1024
	// An upstream that failed goes last for a while, which doubles up to a
	// bound.
	restFirst = 5 * time.Second
	restMost  = time.Minute
)

// of returns the condition of a path. Under mu.
func (h *health) of(p *path) *condition {
	key := healthKey{p.id(), p.out.Name(), p.member}
	c := h.known[key]
	if c == nil {
		if len(h.known) >= maxHealth {
			clear(h.known)
		}
		c = new(condition)
		h.known[key] = c
	}
	return c
}

func (c *condition) resting(now time.Time) bool {
	return c.fails > 0 && now.Sub(c.failed) < min(restFirst<<min(c.fails-1, 10), restMost)
}

// sort puts the paths that failed lately behind the others.
func (h *health) sort(paths []path, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	slices.SortStableFunc(paths, func(a, b path) int {
		restA, restB := h.of(&a).resting(now), h.of(&b).resting(now)
		switch {
		case restA == restB:
			return 0
		case restA:
			return 1
		}
		return -1
	})
}

func (h *health) stagger(p *path) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.of(p)
	if c.trip == 0 {
		return maxStagger
	}
	return min(max(2*c.trip, minStagger), maxStagger)
}

func (h *health) answered(p *path, took time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.of(p)
	if c.trip == 0 {
		c.trip = took
	}
	const weight = 4
	c.trip += (took - c.trip) / weight
	c.fails = 0
}

func (h *health) failed(p *path, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.of(p)
	if !c.resting(now) {
		c.fails++
		c.failed = now
	}
}
