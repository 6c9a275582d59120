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
	dialer.Outbound
	several
	// DialStreamUntil is DialStream that takes until then at most, and that ending ends.
	DialStreamUntil(ctx context.Context, t dialer.Target, until time.Time, ending *dialer.Ending) (*dialer.Conn, error)
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

// watch begins to look after a flow of a group.
func (r *Router) watch(e *entry, ends *streamEnds) {
	g, ok := ends.by.(rescuer)
	if !ok {
		return
	}
	ends.how.Watcher = replay.NewWatch(ends.server, e.flow.Dst.Port(), helps(g))
	e.watchQuiet(ends)
}

// helps says whether the flows of a group can be tried elsewhere.
func helps(g rescuer) bool { return g.Replay() && movable(g) }

// untilAnswer sees a flow of a group on to the first byte of a server, where something
// has gone wrong before. ended is how its server has ended; nil: it has not. If it
// returns false, the flow has ended.
func (r *Router) untilAnswer(ctx context.Context, e *entry, ends *streamEnds, ended error) bool {
	g, was := ends.by.(rescuer), ends.server
	watch := ends.how.Watcher.(*replay.Watch)
	ends.how.Watcher = nil
	e.unwatchQuiet() // it is watched better here
	o := replay.Options{
		Budget: r.budget, First: ends.how.First, Up: &e.up, Down: &e.down,
		Closed: func() { r.giveSockets(1) }, Usual: g.Usual, Hide: g.Hide,
	}
	if helps(g) {
		o.Redial = func(ctx context.Context, avoid []string) (*dialer.Conn, error) {
			return r.redial(ctx, e, g, avoid)
		}
	}
	res := replay.Begin(ctx, ends.client, watch, ended, o)
	ends.server, ends.how.First, ends.how.Gone, ends.how.Broken, ends.how.Shut = res.Server, res.Rest, res.Gone, res.Broken, res.Shut
	e.replayed(res.Replays)
	if res.Server != was {
		ends.since = time.Now()
		e.path(res.Server.Path)
		e.watchSocket(flow.Socket(res.Server.Conn))
	}
	if res.Over {
		ends.outcome = dialer.Outcome{Reason: res.Reason, ByServer: res.ByServer, Up: e.up.Load(), Down: e.down.Load()}
		e.end(res.Reason)
		return false
	}
	e.watchQuiet(ends)
	return true
}

// redial connects a flow by a group once more, by none of avoid.
func (r *Router) redial(ctx context.Context, e *entry, o dialer.Outbound, avoid []string) (c *dialer.Conn, err error) {
	if err := r.takeSocket(); err != nil {
		return nil, err
	}
	t := e.target()
	t.Avoid = avoid
	c, err = r.dialStream(ctx, e.flow, o, t, time.Now().Add(r.opts.Deadline))
	if err != nil {
		r.giveSockets(1)
		return nil, err
	}
	return c, nil
}
