package router

import (
	"context"
	"net"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/relay"
)

// ServeStream implements flow.Handler: whose is it, what do the rules say,
// dial, answer the client, relay, end.
//
// The frame that waits for as long as the flow lives is this one and those of
// relay: what is deep or large is done in calls that have returned by then, so
// that the collector can shrink the goroutine's stack.
func (r *Router) ServeStream(ctx context.Context, s flow.Stream) {
	e := r.begin(s.Flow())
	ends := new(streamEnds)
	defer ends.close(r)
	defer r.recovered(e, func() { ends.abort(s) })
	if !r.connect(ctx, e, s, ends) {
		return
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e.stoppedBy(cancel)
	ends.how.Up, ends.how.Down, ends.how.Half, ends.how.Workers = &e.up, &e.down, e.closing, &r.pumps
	r.watch(e, ends)
	result := relay.Streams(ctx, ends.client, ends.server.Conn, &ends.how)
	if result.Left {
		if !r.untilAnswer(ctx, e, ends, result.Err) {
			return
		}
		result = relay.Streams(ctx, ends.client, ends.server.Conn, &ends.how)
	}
	ends.over(e, &result)
}

// streamEnds are the two ends of a flow, as far as they are there.
type streamEnds struct {
	client   flow.Conn
	server   *dialer.Conn
	place    bool            // taken for the server's socket
	answered bool            // Accept or Reject was called
	by       dialer.Outbound // that has made server
	how      relay.Options   // the flow is moved
	quiet    *quiet          // of server, under the mu of the entry; nil: nobody has looked yet
	since    time.Time       // that server is connected
	outcome  dialer.Outcome  // what is told of server when it is closed
}

func (s *streamEnds) close(r *Router) {
	if s.place {
		defer r.giveSockets(1)
	}
	if s.client != nil {
		_ = s.client.Close()
		r.streams.Add(-1)
	}
	if s.server != nil {
		s.outcome.News = dialer.Ended
		s.server.Tell(s.outcome)
		_ = s.server.Close()
	}
}

// over notes how a flow has ended.
func (s *streamEnds) over(e *entry, result *relay.Result) {
	s.outcome = dialer.Outcome{
		Reason: result.Reason, ByServer: result.By == relay.Server,
		Up: e.up.Load(), Down: e.down.Load(), Lasted: time.Since(s.since),
	}
	if result.Reason == flow.Reset && e.ending() {
		s.outcome.Reason = flow.Closed // one side had said all: many servers end like that
	}
	e.end(result.Reason)
}

func (s *streamEnds) accepted(r *Router, client flow.Conn) {
	s.client = client
	r.streams.Add(1)
}

// abort lets both ends see that the flow did not end in order.
func (s *streamEnds) abort(st flow.Stream) {
	if !s.answered {
		s.answered = true
		st.Reject(flow.Unknown, nil)
	}
	if s.client != nil {
		_ = s.client.Reset()
	}
	if s.server != nil {
		_ = s.server.Reset()
	}
}

func (s *streamEnds) reject(st flow.Stream, why flow.Reason, said *flow.ICMPError) {
	s.answered = true
	st.Reject(why, said)
}

// connect brings a flow to the point where both ends are connected. If it
// returns false, the client was told and the flow has ended.
func (r *Router) connect(ctx context.Context, e *entry, s flow.Stream, ends *streamEnds) bool {
	if r.takes(flow.TCP, e.flow.Dst) {
		return r.queries(ctx, e, s, ends)
	}
	return r.connectServer(ctx, e, s, ends)
}

// connectServer is connect for a flow to a server.
func (r *Router) connectServer(ctx context.Context, e *entry, s flow.Stream, ends *streamEnds) bool {
	verdict, outbound, missing, facts := r.decide(ctx, e)
	if missing != 0 {
		return r.acceptFirst(ctx, e, s, ends, facts)
	}
	e.decided(verdict, facts, "")
	if outbound.Outbound == nil {
		tell, why := r.refusal(verdict, flow.TCP)
		ends.reject(s, tell, nil)
		e.end(why)
		return false
	}
	if err := r.judge(e, outbound.leaves); err != nil {
		ends.reject(s, refusalOf(flow.TCP), nil)
		e.end(flow.ReasonOf(err))
		return false
	}
	s.Begun()
	began := time.Now()
	server, err := r.dial(ctx, e, outbound, ends)
	if why := e.dialled(began, err); err != nil {
		e.failed(err)
		ends.reject(s, why, flow.Said(err))
		e.end(why)
		return false
	}
	ends.server, ends.by, ends.since, ends.answered = server, outbound.Outbound, time.Now(), true
	client, err := s.Accept()
	if err != nil {
		_ = server.Reset() // nobody is left who could use it
		e.failed(err)
		e.end(flow.Canceled)
		return false
	}
	ends.accepted(r, client)
	if k := flow.Socket(server.Conn); k != nil {
		e.watchSocket(k)
	}
	e.path(server.Path)
	return true
}

// dial gives a flow what is left of its deadline.
func (r *Router) dial(ctx context.Context, e *entry, o out, ends *streamEnds) (c *dialer.Conn, err error) {
	if err := r.takeSocket(); err != nil {
		return nil, err
	}
	ends.place = true
	return r.dialStream(ctx, e.flow, o.Outbound, e.target(), e.flow.Start.Add(r.opts.Deadline))
}

// watchSocket has Run look after the server's end until the flow ends.
func (e *entry) watchSocket(c *net.TCPConn) {
	e.mu.Lock()
	e.kernel = c
	e.mu.Unlock()
}

// lookAfter is called by Run alone. What is wrong with the socket relay sees
// too.
func (e *entry) lookAfter() {
	e.mu.Lock()
	c := e.kernel
	e.mu.Unlock()
	if c != nil {
		_ = e.patience.Check(c)
	}
}
