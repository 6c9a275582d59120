package flow_test

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/flow"
)

// TestBurstLosesNoEvent: what was done before an event is seen by a call that begins
// after it, never by two at a time, whoever runs them.
func TestBurstLosesNoEvent(t *testing.T) {
	var w flow.Workers
	ctx, cancel := context.WithCancel(t.Context())
	var ended sync.WaitGroup
	ended.Go(func() { w.Run(ctx) })
	defer ended.Wait()
	defer cancel()
	for name, workers := range map[string]*flow.Workers{"goroutines": nil, "workers": &w} {
		t.Run(name, func(t *testing.T) {
			var b flow.Burst
			var made, seen atomic.Int64
			var inside atomic.Int32
			b.Init(workers, func() {
				if inside.Add(1) > 1 {
					t.Error("two at a time")
				}
				seen.Store(made.Load())
				inside.Add(-1)
			})
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					for n := range 5_000 {
						made.Add(1)
						if n%2 == 0 {
							b.Event()
						} else {
							b.Look(func() bool { return seen.Load() == made.Load() })
						}
					}
				})
			}
			all.Wait()
			b.Wait()
			if b.Running() || seen.Load() != made.Load() {
				t.Errorf("running %t, seen %d of %d", b.Running(), seen.Load(), made.Load())
			}
		})
	}
}

// TestBurstLooksFirst: nobody is started for nothing.
func TestBurstLooksFirst(t *testing.T) {
	var b flow.Burst
	calls := 0
	b.Init(nil, func() { calls++ })
	b.Look(func() bool { return true })
	b.Wait()
	if calls != 0 || b.Running() {
		t.Errorf("%d calls, running %t", calls, b.Running())
	}
	b.Look(func() bool { return false })
	b.Wait()
	if calls != 1 {
		t.Errorf("%d calls", calls)
	}
}

// TestWorkers: calls run side by side, few goroutines are used for many that come one
// after the other, and none is left at the end.
func TestWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w flow.Workers
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { w.Run(ctx) })
		synctest.Wait()
		var done atomic.Int32
		for range 3 {
			for range 100 {
				w.Go(func() { time.Sleep(time.Second); done.Add(1) })
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		if n := done.Load(); n != 300 {
			t.Errorf("%d of 300 calls were done side by side", n)
		}
		before := runtime.NumGoroutine()
		for range 100 {
			w.Go(func() { done.Add(1) })
			synctest.Wait()
		}
		if n := runtime.NumGoroutine(); n > before || done.Load() != 400 {
			t.Errorf("%d calls are done; %d goroutines before them, %d after", done.Load(), before, n)
		}
		w.Go(func() { time.Sleep(time.Second); done.Add(1) }) // is in a call at the end
		synctest.Wait()
		cancel()
		running.Wait()
		w.Go(func() { done.Add(1) })
		time.Sleep(2 * time.Second)
		if n := done.Load(); n != 402 {
			t.Errorf("%d of 402 calls were done", n)
		}
	}) // a goroutine that is left is a deadlock
}

// BenchmarkGo is a call that needs some stack, in a new goroutine and by a worker.
func BenchmarkGo(b *testing.B) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var w flow.Workers
	go w.Run(ctx)
	for name, workers := range map[string]*flow.Workers{"goroutine": nil, "worker": &w} {
		b.Run(name, func(b *testing.B) {
			var done sync.WaitGroup
			f := func() { deep(10); done.Done() }
			for b.Loop() {
				done.Add(1)
				workers.Go(f)
				done.Wait()
			}
		})
	}
}

//go:noinline
func deep(n int) byte {
	var room [512]byte
	if n > 0 {
		room[n] = deep(n - 1)
	}
	return room[n/2]
}
