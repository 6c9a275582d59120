package router

import (
	"context"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/replay"
)

// rescuer is an outbound that can help a flow whose path fails before the server
// has answered: a group.
type rescuer interface {
	several
	// Replay says whether the client's bytes may be sent again elsewhere.
	Replay() bool
	// Usual is how long a first byte takes by one of its outbounds; 0: nobody
	// knows.
	Usual(outbound string) time.Duration
	// Hide counts a failure of one of its outbounds that the client did not see.
	Hide(outbound string, kind dialer.Hidden)
}

// untilAnswer sees a flow of a group to the first byte of a server. If it returns
// false, the flow has ended.
func (r *Router) untilAnswer(ctx context.Context, e *entry, ends *streamEnds) bool {
	g, ok := ends.by.(rescuer)
	if !ok {
		return true
	}
	o := replay.Options{
		Budget: r.budget, Port: e.flow.Dst.Port(), Up: &e.up, Down: &e.down,
		Closed: func() { r.giveSockets(1) }, Usual: g.Usual, Hide: g.Hide,
	}
	if g.Replay() && movable(ends.by) {
		o.Redial = func(ctx context.Context, avoid []string) (*dialer.Conn, error) {
			return r.redial(ctx, e.flow, ends.by, avoid)
		}
	}
	was := ends.server
	client := ends.client
	if len(ends.read) > 0 {
		client = &rereader{Conn: client, read: ends.read}
		ends.read = nil
	}
	res := replay.Begin(ctx, client, was, o)
	ends.server, ends.rest, ends.broken = res.Server, res.Client, res.Broken
	if again, ok := res.Client.(*rereader); ok && len(again.read) == 0 {
		ends.rest = ends.client // relay finds out what it can do
	}
	e.replayed(res.Replays)
	if res.Server != was {
		ends.since = time.Now()
		e.path(res.Server.Path)
		e.watchSocket(flow.Socket(res.Server.Conn))
	}
	if res.Over {
		ends.outcome = dialer.Outcome{Reason: res.Reason, ByServer: res.ByServer, Up: e.up.Load(), Down: e.down.Load()}
		e.end(res.Reason)
	}
	if !res.Over {
		ends.watched = true
		r.quiets.watch(e, res.Server)
	}
	return !res.Over
}

// rereader is a client of which something was read already.
type rereader struct {
	flow.Conn
	read []byte
}

func (r *rereader) Read(b []byte) (int, error) {
	if len(r.read) == 0 {
		return r.Conn.Read(b)
	}
	n := copy(b, r.read)
	r.read = r.read[n:]
	return n, nil
}

// redial connects a flow by a group once more, by none of avoid.
func (r *Router) redial(ctx context.Context, f *flow.Flow, o dialer.Outbound, avoid []string) (c *dialer.Conn, err error) {
	if err := r.takeSocket(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.opts.Deadline)
	defer cancel()
	err = r.inFlight(ctx, f, func(ctx context.Context) (err error) {
		t := r.target(f)
		t.Avoid = avoid
		c, err = o.DialStream(ctx, t)
		return err
	})
	if err != nil {
		r.giveSockets(1)
		return nil, err
	}
	return c, nil
}
