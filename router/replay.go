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
	// Down is for how long one of its outbounds cannot be used at all, while another
	// one can; 0: it can, or there is none.
	Down(outbound string) time.Duration
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
		Budget: r.budget, Port: e.flow.Dst.Port(), First: ends.first, Up: &e.up, Down: &e.down,
		Closed: func() { r.giveSockets(1) }, Usual: g.Usual, Hide: g.Hide,
		Workers: &r.pumps,
	}
	if g.Replay() && movable(ends.by) {
		o.Redial = func(ctx context.Context, avoid []string) (*dialer.Conn, error) {
			return r.redial(ctx, e, ends.by, avoid)
		}
	}
	was := ends.server
	res := replay.Begin(ctx, ends.client, was, o)
	ends.server, ends.first, ends.gone, ends.broken, ends.shut = res.Server, res.Rest, res.Gone, res.Broken, res.Shut
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
		r.quiets.watch(e, res.Server, g)
	}
	return !res.Over
}

// redial connects a flow by a group once more, by none of avoid.
func (r *Router) redial(ctx context.Context, e *entry, o dialer.Outbound, avoid []string) (c *dialer.Conn, err error) {
	if err := r.takeSocket(); err != nil {
		return nil, err
	}
	err = r.inFlight(ctx, time.Now().Add(r.opts.Deadline), e.flow, func(ctx context.Context) (err error) {
		t := e.target()
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
