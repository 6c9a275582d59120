package labtest

import (
	"context"
	"sync"
	"testing"
	"time"
)

// Background calls run, in a goroutine, until the test ends or stop is called:
// then its context ends, and run has 10 s to return without an error.
func Background(t testing.TB, what string, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%s ended with %v", what, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s does not end", what)
		}
	})
	t.Cleanup(stop)
	return stop
}
