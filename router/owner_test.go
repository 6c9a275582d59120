package router_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/router"
)

// A flood of flows from one attachment has a few owners looked up at a time, and
// others are looked up beside it.
func TestLookupsOfOneLeaveRoomForOthers(t *testing.T) {
	var now, most atomic.Int64
	var all sync.WaitGroup
	goOn := make(chan struct{})
	release := sync.OnceFunc(func() { close(goOn) })
	find := func(ctx context.Context, f *flow.Flow) (*flow.Owner, error) {
		if f.Attachment != "flood" {
			return &flow.Owner{PID: 7}, nil
		}
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-goOn
		return nil, nil
	}
	r := route(t, router.Options{Owners: owners{find}, OwnerTimeout: time.Minute}, failing("up", context.Canceled))
	serveFrom := func(attachment string) *client {
		c := newClient("198.51.100.1:80")
		c.flow = flow.New(flow.TCP, netip.MustParseAddrPort("192.0.2.1:9"), c.flow.Dst, attachment)
		done := serve(t, r, c)
		all.Go(func() { <-done })
		return c
	}
	defer release() // before the flows are waited for
	for range 200 {
		serveFrom("flood")
	}
	labtest.Eventually(t, 5*time.Second, func() bool { return now.Load() == 8 }, "eight of the flood are looked up")
	// By chance one in 64 shares the places of the flood.
	var others []*client
	for i := range 8 {
		others = append(others, serveFrom(fmt.Sprint("other", i)))
	}
	served := func(c *client) bool { _, why := c.told(t); return why != flow.Closed }
	labtest.Eventually(t, 5*time.Second, func() bool { return slices.ContainsFunc(others, served) }, "others are served")
	release()
	all.Wait()
	if n := most.Load(); n > 8 {
		t.Errorf("%d owners were looked up at a time for one attachment", n)
	}
}
