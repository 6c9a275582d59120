// Package replay hides from a client that a path fails before the server has
// answered: it keeps what the client has sent, and sends it again by another
// path, as long as that is safe.
//
// It owns the time between the first connection of a flow and the first byte of a
// server, and nothing after it. As long as nothing goes wrong the flow is moved by relay
// and only watched (Watch). It knows neither groups nor captures; router calls it, and
// says how to connect elsewhere.
//
// # Theory of operation
//
// Begin sees a flow on of which the server has ended, or was silent, or the client has
// ended; or whose ends are such that relay cannot watch. One goroutine of control (run) takes events: bytes or the end of the client
// (read by one goroutine), the first byte or the end of a server (one goroutine
// each), a connection elsewhere, and time. What the client sends is appended to
// kept and written to each server by a goroutine of its own (pump).
//
// The first server that answers wins. Its first bytes are only looked at where
// it is a kernel socket; the others are reset. A server that ends before it has
// answered is replaced, and one that is silent gets a rival: after 1 s if its
// kernel has not acknowledged the bytes, and after the time that first bytes
// usually take, times four, if it has. Both only if all that a server may have
// got is Safe (Judge); where nothing was sent at all, an end is replaced and a
// silence is not. Twice a flow at most, for 30 s at most, and within a budget of
// all flows.
//
// As soon as the client's bytes are known to be unsafe, or more than 64 KiB, or
// the time is over, there is nothing more to be done here: the flow goes on with
// the server that it has had for longest. That is decided before a byte is given
// to a pump, so that two servers never get one that is unsafe.
//
// If nobody answers, the client is told the end that the last server has told.
package replay

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

const (
	maxKept    = 64 << 10
	maxChunks  = 64 // a client that sends byte by byte is not judged each time
	maxReplays = 2
	// maxTime is when a flow is given on whatever its state.
	maxTime = 30 * time.Second
	// unackedAfter is how long a server's kernel may leave bytes unacknowledged.
	unackedAfter = time.Second
	// The wait for a silent server: usualTimes what is usual, within these.
	usualTimes         = 4
	minHedge, maxHedge = 1500 * time.Millisecond, 10 * time.Second
	// maxHalt is how long a server may take to take what is being written to it.
	maxHalt = 2 * time.Second
)

// Options say how a flow can be helped.
type Options struct {
	// Redial connects by another outbound than those in avoid. Nil: a flow is
	// only watched.
	Redial func(ctx context.Context, avoid []string) (*dialer.Conn, error)
	// Closed is called for each conn that was closed. It may be nil.
	Closed func()
	// Usual is how long a first byte takes by that outbound; 0: nobody knows.
	// It may be nil.
	Usual func(outbound string) time.Duration
	// Hide is told of each failure of an outbound that the client does not see.
	// It may be nil.
	Hide func(outbound string, kind dialer.Hidden)
	// Budget bounds the replays of all flows. Nil: no bound.
	Budget *Budget
	// First is what the client has sent already. It is kept: the caller does not
	// change it.
	First []byte
	// Up and Down count the bytes that were handed on. Both may be nil.
	Up, Down *atomic.Int64
}

// Result is how a flow comes out of it.
type Result struct {
	// Server is who goes on, or the last one that was. Never nil; the caller
	// closes it, and reports its end.
	Server *dialer.Conn
	// Rest is what the client has sent and Server has not got. If Gone is not nil,
	// the client has ended with that error after it.
	Rest    []byte
	Gone    error
	Replays int // times that the client's bytes were sent to another server
	// Over says that the flow has ended here: both ends were told. Reason and
	// ByServer say how; as those of a relay.
	Over     bool
	Reason   flow.Reason
	ByServer bool
	// Broken is the error of a write to Server, if one has failed: its socket
	// tells it nobody else.
	Broken error
	// Shut says that Server was told that nothing more comes.
	Shut bool
}

// Begin moves a flow on until a server has answered, from where w has seen it to. ended
// is how w's server has ended; nil: it has not. It takes over that server, and gives back
// the one that is left. ctx ends the flow.
func Begin(ctx context.Context, client flow.Conn, w *Watch, ended error, o Options) Result {
	if o.Up == nil {
		o.Up = new(atomic.Int64)
	}
	if o.Down == nil {
		o.Down = new(atomic.Int64)
	}
	if o.Closed == nil {
		o.Closed = func() {}
	}
	if o.Usual == nil {
		o.Usual = func(string) time.Duration { return 0 }
	}
	if o.Hide == nil {
		o.Hide = func(string, dialer.Hidden) {}
	}
	r := &run{o: o, client: client, port: w.port, began: w.began, chunks: w.chunks, sentAt: w.sentAt, counted: len(w.kept)}
	r.kept.b = w.kept
	l := r.link(w.server)
	l.began, l.sent = w.began, len(w.kept)
	return r.do(ctx, ended)
}

// run is one flow's time here. Its fields belong to the goroutine of do, but those
// of kept.
type run struct {
	o      Options
	client flow.Conn
	port   uint16 // the destination's
	began  time.Time

	links   []*link // that live, the oldest first
	last    *link   // that ended last: open until somebody takes its place
	avoid   []string
	replays int
	hidden  []failure // hidden as soon as somebody takes their place
	spent   bool      // a place of the budget is held; of redial's goroutine while it dials
	dialing context.CancelFunc

	counted int // bytes of kept that Up knows of

	kept      kept
	verdict   Verdict // on all of kept
	chunks    int     // that it came in
	clientErr error   // how the client has ended; io.EOF: in order
	sentAt    time.Time
	hedged    bool // somebody was asked for the silence since sentAt

	events chan event
	stop   chan struct{} // closed: nobody takes events any more
	work   sync.WaitGroup
}

type failure struct {
	outbound string
	kind     dialer.Hidden
}

// event is news for do: of a server (link), of a dial (dialed), or of the client.
type event struct {
	link   *link
	dialed bool
	conn   *dialer.Conn
	chunk  []byte // of the client
	err    error
}

// do sees the flow on from there. The error is that of its server, if that has ended
// already.
func (r *run) do(ctx context.Context, ended error) Result {
	r.events, r.stop = make(chan event), make(chan struct{})
	r.kept.cond.L = &r.kept.mu
	r.verdict = Judge(r.kept.b, r.port)
	l := r.links[0]
	if ended == nil {
		r.start(l)
	}
	r.work.Go(r.readClient)
	var res Result
	done := false
	switch {
	case ended != nil:
		res, done = r.lost(ctx, l, ended)
	case len(r.o.First) > 0:
		res, done = r.heard(ctx, r.o.First)
	}
	if done {
		return res
	}
	timer := time.NewTimer(r.next())
	defer timer.Stop()
	for {
		var res Result
		done := false
		select {
		case <-ctx.Done():
			return r.end(ctx, context.Cause(ctx), false)
		case <-timer.C:
			res, done = r.onTime(ctx)
		case e := <-r.events:
			res, done = r.take(ctx, e)
		}
		if done {
			return res
		}
		timer.Reset(r.next())
	}
}

// take looks at one event.
func (r *run) take(ctx context.Context, e event) (Result, bool) {
	switch {
	case e.dialed:
		return r.dialed(ctx, e)
	case e.link == nil && e.err != nil:
		return r.clientEnded(ctx, e.err)
	case e.link == nil:
		return r.heard(ctx, e.chunk)
	case e.err == nil:
		return r.answered(ctx, e.link), true
	}
	return r.lost(ctx, e.link, e.err)
}

// send gives an event to do, false if nobody takes it any more.
func (r *run) send(e event) bool {
	select {
	case r.events <- e:
		return true
	case <-r.stop:
		return false
	}
}

// oldest is the server that goes on if nobody has answered; nil: none lives.
func (r *run) oldest() *link {
	if len(r.links) == 0 {
		return nil
	}
	return r.links[0]
}

// heard takes what the client has sent.
func (r *run) heard(ctx context.Context, chunk []byte) (Result, bool) {
	all := r.kept.with(chunk)
	r.verdict = Judge(all, r.port)
	if r.chunks++; len(all) > maxKept || r.chunks > maxChunks {
		r.verdict = Unsafe
	}
	r.sentAt, r.hedged = time.Now(), false
	l := r.oldest()
	if r.verdict == Unsafe && l != nil {
		// Before any of it is sent: by one server alone.
		r.drop(l)
		r.kept.add(chunk)
		return r.giveOn(ctx, l), true
	}
	r.kept.add(chunk)
	return Result{}, false
}

// clientEnded takes the end of the client.
func (r *run) clientEnded(ctx context.Context, err error) (Result, bool) {
	r.clientErr = err
	if err == io.EOF {
		r.kept.end()
	}
	// Without a word, or with a reset, it has no use for another server.
	if l := r.oldest(); l != nil && (err != io.EOF || r.kept.len() == 0) {
		return r.giveOn(ctx, l), true
	}
	return Result{}, false
}

// lost is called when a server has ended without an answer.
func (r *run) lost(ctx context.Context, l *link, err error) (Result, bool) {
	r.remove(l)
	r.kept.leave(l) // what comes now may be unsafe, and another server's
	if r.last != nil {
		r.close(r.last)
	}
	r.last = l
	if w := l.writeErr.Load(); w != nil && err == io.EOF {
		err = *w // the write took the reset's errno with it
	}
	l.readErr = err
	l.Tell(dialer.Outcome{News: dialer.Failed, Reason: flow.ReasonOf(err), ByServer: true})
	r.hidden = append(r.hidden, failure{l.name(), kindOf(err)})
	switch {
	case len(r.links) > 0 || r.dialing != nil:
		return Result{}, false
	case r.clientErr != nil && r.verdict != Safe:
	case r.redial(ctx):
		return Result{}, false
	}
	return r.passOn(ctx), true
}

func kindOf(err error) dialer.Hidden {
	switch {
	case err == io.EOF:
		return dialer.HiddenClose
	case flow.ReasonOf(err) == flow.TimedOut:
		return dialer.HiddenStall
	}
	return dialer.HiddenReset
}

// passOn ends the flow as its last server has.
func (r *run) passOn(ctx context.Context) Result {
	l := r.last
	if l.readErr == io.EOF {
		return r.giveOn(ctx, l) // relay sees that end again
	}
	return r.end(ctx, l.readErr, true)
}

// redial connects elsewhere, false if that is not allowed: all that a server may
// have got must be safe.
func (r *run) redial(ctx context.Context) bool {
	safe := r.kept.len() == 0 || r.verdict == Safe
	if r.o.Redial == nil || !safe || r.replays >= maxReplays || r.dialing != nil {
		return false
	}
	r.replays++
	ctx, r.dialing = context.WithCancel(ctx)
	avoid := append([]string(nil), r.avoid...)
	r.work.Go(func() {
		var c *dialer.Conn
		err := r.spend(ctx)
		if err == nil {
			c, err = r.o.Redial(ctx, avoid)
		}
		if !r.send(event{dialed: true, conn: c, err: err}) && err == nil {
			_ = c.Close()
			c.Tell(dialer.Outcome{News: dialer.Ended})
			r.o.Closed()
		}
	})
	return true
}

// spend waits for a place of the budget, once a flow.
func (r *run) spend(ctx context.Context) error {
	if r.spent || r.o.Budget == nil {
		return nil
	}
	err := r.o.Budget.take(ctx)
	r.spent = err == nil
	return err
}

// dialed goes on with a new server, or without.
func (r *run) dialed(ctx context.Context, e event) (Result, bool) {
	r.dialing()
	r.dialing = nil
	if e.err != nil {
		r.replays-- // nothing was sent again
		if len(r.links) == 0 {
			return r.passOn(ctx), true
		}
		return Result{}, false
	}
	l := r.link(e.conn)
	r.start(l)
	if r.last != nil {
		r.close(r.last)
		r.last = nil
	}
	if r.verdict == Unsafe || r.clientErr != nil && r.clientErr != io.EOF {
		return r.giveOn(ctx, l), true
	}
	return Result{}, false
}

// next is how long to wait for an event.
func (r *run) next() time.Duration {
	if len(r.links) == 0 {
		return maxTime // the dial has its own deadline
	}
	wait := time.Until(r.began.Add(maxTime))
	if r.mayHedge() {
		wait = min(wait, time.Until(r.hedgeAt()))
	}
	return max(wait, 0)
}

// onTime is called when nothing has come.
func (r *run) onTime(ctx context.Context) (Result, bool) {
	switch l := r.oldest(); {
	case l == nil:
	case time.Since(r.began) >= maxTime:
		return r.giveOn(ctx, l), true
	case r.mayHedge() && !time.Now().Before(r.hedgeAt()):
		r.hedged = true
		r.redial(ctx)
	}
	return Result{}, false
}

// mayHedge says whether the silence of the only server is of interest.
func (r *run) mayHedge() bool {
	return r.verdict == Safe && !r.hedged && len(r.links) == 1 && r.dialing == nil && r.replays < maxReplays && r.o.Redial != nil
}

// hedgeAt is when that silence is too long, or to be looked at again.
func (r *run) hedgeAt() time.Time {
	l := r.links[0]
	since := r.sentAt
	if l.began.After(since) {
		since = l.began
	}
	usual := min(max(usualTimes*r.o.Usual(l.name()), minHedge), maxHedge)
	if at := since.Add(unackedAfter); l.below != nil && (time.Now().Before(at) || unacked(l.below)) {
		return at
	}
	return since.Add(usual)
}
