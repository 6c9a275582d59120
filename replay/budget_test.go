package replay_test

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/replay"
)

// TestBudget: no more than its share replay at a time, and who waits has the place that
// is given back, in turn.
func TestBudget(t *testing.T) {
	budget := replay.NewBudget(func() int { return 100 })
	gone, leave := context.WithCancel(t.Context())
	leave()
	for n := range 20 {
		if err := budget.Take(gone); err != nil {
			t.Fatalf("place %d: %v", n, err)
		}
	}
	if budget.Take(gone) == nil {
		t.Error("there is one place too many")
	}
	synctest.Test(t, func(t *testing.T) {
		budget := replay.NewBudget(func() int { return 0 })
		for range 10 {
			if err := budget.Take(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		turns := make(chan int, 2)
		for n := range 2 {
			go func() {
				if err := budget.Take(t.Context()); err != nil {
					t.Error(err)
				}
				turns <- n
			}()
			synctest.Wait()
		}
		for n := range 2 {
			budget.Give()
			synctest.Wait()
			if len(turns) != 1 || <-turns != n {
				t.Errorf("place %d that was given back: another one has it, or nobody", n)
			}
		}
		began := time.Now()
		if budget.Take(t.Context()) == nil {
			t.Error("a place that nobody gave back")
		}
		if waited := time.Since(began); waited != 5*time.Second {
			t.Errorf("waited %v", waited)
		}
		for range 10 {
			budget.Give()
		}
		if budget.Take(gone) != nil {
			t.Error("who has left the queue has a place")
		}
	})
}

// TestOneOfMany: a flow that fails while as many replay as may has its turn when one of
// them has been helped.
func TestOneOfMany(t *testing.T) {
	budget := replay.NewBudget(func() int { return 0 })
	for range 10 {
		if err := budget.Take(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	b := &bed{T: t, budget: budget}
	b.script = []func(*net.TCPConn){
		func(c *net.TCPConn) {
			b.read(0, len(get), c)
			reset(c)
			time.AfterFunc(50*time.Millisecond, budget.Give)
		},
		func(c *net.TCPConn) { b.read(1, len(get), c); _, _ = io.WriteString(c, "answer") },
	}
	if heard, err := b.run(say(get)); string(heard) != "answer" || err != nil {
		t.Errorf("heard %q, %v", heard, err)
	}
}
