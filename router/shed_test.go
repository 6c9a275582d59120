package router_test

import (
	"context"
	"io"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// Thousands of connections on which nothing moves give up some when there is no room
// for others: the idle ones, of the source that has most. Without need none ends, and
// when one flow was refused and nobody asks again, no more than once.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const room, many = 1300, 1200
		var servers, flows sync.WaitGroup
		out := &outbound{"up", func(context.Context, dialer.Target) (flow.Conn, error) {
			ours, theirs := memPipe()
			servers.Go(func() {
				defer theirs.Close()
				_, _ = io.Copy(io.Discard, theirs)
			})
			return ours, nil
		}}
		set, err := rules.Compile([]rules.Config{{Use: "up"}})
		if err != nil {
			t.Fatal(err)
		}
		r := router.New(router.Options{MaxSockets: room})
		r.Reload(set, map[string]dialer.Outbound{"up": out})
		ctx, cancel := context.WithCancel(t.Context())
		running := make(chan error, 1)
		go func() { running <- r.Run(ctx) }()
		open := func(src string) *client {
			c := newClient("198.51.100.1:80")
			c.flow = flow.New(flow.TCP, netip.AddrPortFrom(netip.MustParseAddr(src), 1), c.flow.Dst, "home")
			flows.Go(func() { r.ServeStream(ctx, c) })
			synctest.Wait()
			return c
		}
		accepted := func(c *client) bool { yes, _ := c.told(t); return yes }

		hoard := make([]*client, many)
		for i := range hoard {
			hoard[i] = open("192.0.2.1")
		}
		others := make([]*client, room-many)
		for i := range others {
			others[i] = open("192.0.2.2")
		}
		time.Sleep(10*time.Minute + time.Second) // between two looks
		if n := r.Counters(); n.FlowsLive != room || n.StreamsShed != 0 {
			t.Fatalf("with room for all: %+v", n)
		}
		if _, err := hoard[0].conn.Write([]byte("x")); err != nil { // the oldest is not the idlest
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if accepted(open("192.0.2.3")) {
			t.Error("there was room")
		}
		time.Sleep(time.Minute)
		if n := r.Counters(); n.StreamsShed != many/8 {
			t.Errorf("%d idle connections ended for one flow that was refused, want %d", n.StreamsShed, many/8)
		}
		if !accepted(open("192.0.2.3")) {
			t.Error("no room was made")
		}
		for i, c := range append(others, hoard[0]) {
			if _, err := c.conn.Write([]byte("y")); err != nil {
				t.Errorf("connection %d has ended: %v", i, err)
			}
		}
		cancel()
		flows.Wait()
		servers.Wait()
		if err := <-running; err != nil {
			t.Error(err)
		}
	})
}
