package control

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/flow"
)

// watch sends every change of a flow until the client goes or ctx ends. The
// source never waits for the client: events wait in a bounded queue, and a
// client that lets it fill up is told so and sent away.
func (c *client) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()

	queue := make(chan flow.Event, c.s.opt.Backlog)
	var lagging atomic.Bool
	helpers.Go(func() {
		defer cancel()
		_ = c.s.opt.Source.Watch(ctx, func(e flow.Event) {
			select {
			case queue <- e:
			default:
				lagging.Store(true)
				cancel()
			}
		})
	})
	helpers.Go(func() {
		defer cancel()
		c.waitGone(ctx)
	})

	for {
		select {
		case <-ctx.Done():
			if !lagging.Load() {
				return nil
			}
			c.s.lagging.Add(1)
			return fmt.Errorf("flows change faster than this client reads: %d changes were waiting", cap(queue))
		case e := <-queue:
			line, err := json.Marshal(e)
			if err != nil {
				return fmt.Errorf("encode event: %w", err)
			}
			if err := c.send(reply{Result: line}); err != nil {
				return nil
			}
		}
	}
}

// waitGone returns when the client has closed, or ctx has ended.
func (c *client) waitGone(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { c.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if c.conn.SetReadDeadline(time.Time{}) != nil || ctx.Err() != nil {
		return
	}
	_, _ = io.Copy(io.Discard, c.conn)
}
