package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"cgtun/flow"
)

// watch sends every change of a flow until the client goes or ctx ends. The
// source is held up while the client does not read, and buffers for it; who
// takes nothing for the whole time-out is sent away.
func (c *client) watch(ctx context.Context) error {
	ctx, cancel := c.whileThere(ctx)
	defer cancel()
	err := c.s.opt.Source.Watch(ctx, func(e flow.Event) {
		if ctx.Err() != nil {
			return
		}
		line, err := json.Marshal(e)
		if err == nil {
			err = c.send(reply{Result: line})
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.s.lagging.Add(1)
		}
		if err != nil {
			cancel()
		}
	})
	if ctx.Err() != nil {
		return nil // nobody is there to be told
	}
	return err
}

// whileThere returns a context that ends when the client has gone, too. The
// caller calls cancel, which waits for what watches the client.
func (c *client) whileThere(ctx context.Context) (_ context.Context, cancel func()) {
	ctx, end := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		defer end()
		c.waitGone(ctx)
	})
	return ctx, func() { end(); watcher.Wait() }
}

// waitGone returns when the client has closed, or ctx has ended.
func (c *client) waitGone(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { c.conn.SetReadDeadline(flow.Past) })
	defer stop()
	if c.conn.SetReadDeadline(time.Time{}) != nil || ctx.Err() != nil {
		return
	}
	_, _ = io.Copy(io.Discard, c.conn)
}
