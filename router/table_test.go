package router_test

import (
	"context"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/router"
)

func TestClosedFlowsAreForgotten(t *testing.T) {
	r := route(t, router.Options{KeepClosed: 100 * time.Millisecond}, failing("up", unix.ECONNREFUSED))
	wait(t, "end of the flow", serve(t, r, newClient("198.51.100.1:80")))
	if n := len(r.Flows()); n != 1 {
		t.Fatalf("%d flows just after the end, want 1", n)
	}
	labtest.Eventually(t, 5*time.Second, func() bool { return len(r.Flows()) == 0 }, "the closed flow is forgotten")
}

func TestClosedFlowsAreBounded(t *testing.T) {
	r := route(t, router.Options{MaxClosed: 10}, failing("up", unix.ECONNREFUSED))
	var last []uint64
	for range 35 {
		c := newClient("198.51.100.1:80")
		wait(t, "end of the flow", serve(t, r, c))
		last = append(last, c.flow.ID)
	}
	infos := r.Flows()
	if len(infos) != 10 {
		t.Fatalf("%d closed flows remembered, want 10", len(infos))
	}
	for i, info := range infos {
		if want := last[25+i]; info.ID != want {
			t.Errorf("flow %d is %d, want %d: the newest, in the order of their ends", i, info.ID, want)
		}
	}
	if n := r.Counters().ClosedForgotten; n != 25 {
		t.Errorf("%d counted as forgotten, want 25", n)
	}
}

func TestWatchTellsEachChange(t *testing.T) {
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(c, c) })
	r := route(t, router.Options{}, out)
	early := newClient("198.51.100.1:80")
	serve(t, r, early)
	labtest.Eventually(t, 5*time.Second, func() bool { return len(r.Flows()) == 1 && r.Flows()[0].State == "open" }, "open")

	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan flow.Event, 100)
	done := make(chan struct{})
	go func() { defer close(done); r.Watch(ctx, func(e flow.Event) { events <- e }) }()
	defer func() { cancel(); wait(t, "end of the watch", done) }()
	next := func() flow.Event {
		select {
		case e := <-events:
			return e
		case <-time.After(5 * time.Second):
			t.Fatal("no event within 5 s")
			return flow.Event{}
		}
	}
	if e := next(); e.Event != "open" || e.Flow.ID != early.flow.ID || e.Flow.State != "open" {
		t.Errorf("at first: got %s of a flow that is %s, want the flow that lived before", e.Event, e.Flow.State)
	}
	c := newClient("198.51.100.1:81")
	ended := serve(t, r, c)
	for _, want := range []struct{ event, state string }{{"open", "dialing"}, {"update", "dialing"}, {"update", "open"}} {
		if e := next(); e.Event != want.event || e.Flow.State != want.state || e.Flow.ID != c.flow.ID {
			t.Errorf("got %s of a flow that is %s, want %s, %s", e.Event, e.Flow.State, want.event, want.state)
		}
	}
	_ = c.conn.CloseWrite()
	if e := next(); e.Event != "update" || e.Flow.State != "closing" {
		t.Errorf("got %s of a flow that is %s, want update, closing", e.Event, e.Flow.State)
	}
	wait(t, "end of the flow", ended)
	if e := next(); e.Event != "close" || e.Flow.Reason == nil {
		t.Errorf("got %s, reason %v; want close and why", e.Event, e.Flow.Reason)
	}
}

func TestSlowWatcherHoldsNobodyUp(t *testing.T) {
	r := route(t, router.Options{WatchBuffer: 4}, failing("up", unix.ECONNREFUSED))
	ctx, cancel := context.WithCancel(context.Background())
	stuck, release, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	first := true
	go func() {
		defer close(done)
		r.Watch(ctx, func(flow.Event) {
			if first {
				first = false
				close(stuck)
				<-release
			}
		})
	}()
	labtest.Eventually(t, 5*time.Second, func() bool {
		wait(t, "end of the flow", serve(t, r, newClient("198.51.100.1:80")))
		select {
		case <-stuck:
			return true
		default:
			return false
		}
	}, "the watcher has an event")
	for range 20 {
		wait(t, "end of a flow beside a slow watcher", serve(t, r, newClient("198.51.100.1:80")))
	}
	if r.Counters().EventsLost == 0 {
		t.Error("no lost event counted")
	}
	cancel()
	close(release)
	wait(t, "end of the watch", done)
}
