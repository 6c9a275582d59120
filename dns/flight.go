package dns

import (
	"context"
	"sync"
	"time"
)

// flights lets one of those who ask the same put the question, and the others
// wait for it.
type flights struct {
	mu     sync.Mutex
	calls  map[string]*flight
	failed map[string]time.Time // questions that nobody answered lately
}

type flight struct {
	done chan struct{}
	a    *answer
	left bool // who asked went away before there was an answer
}

// maxFailed bounds the questions of which it is known that they failed.
const maxFailed = 4096

// do returns what ask does, or what it does for somebody who asked before. Nil:
// no answer before ctx ended.
func (f *flights) do(ctx context.Context, key string, ask func() *answer) *answer {
	for {
		f.mu.Lock()
		one := f.calls[key]
		if one == nil {
			one = &flight{done: make(chan struct{})}
			f.calls[key] = one
			f.mu.Unlock()
			f.lead(ctx, key, one, ask)
			return one.a
		}
		f.mu.Unlock()
		select {
		case <-one.done:
			if !one.left {
				return one.a
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// lead puts the question. Whatever happens, nobody waits for ever.
func (f *flights) lead(ctx context.Context, key string, one *flight, ask func() *answer) {
	one.left = true
	defer func() {
		f.mu.Lock()
		delete(f.calls, key)
		if one.a != nil && one.a.final() {
			delete(f.failed, key)
		} else if !one.left {
			if f.failed == nil || len(f.failed) >= maxFailed {
				f.failed = map[string]time.Time{}
			}
			f.failed[key] = time.Now()
		}
		f.mu.Unlock()
		close(one.done)
	}()
	one.a = ask()
	one.left = one.a == nil && context.Cause(ctx) == context.Canceled
}

// failedLately says whether nobody answered a question a moment ago.
func (f *flights) failedLately(key string, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, ok := f.failed[key]
	return ok && now.Sub(at) < recheck
}
