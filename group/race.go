package group

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
)

// A race, theory of operation.
//
// The members are asked one after the other: the next one when one has failed,
// or after the stagger, which is twice what 95 % of the connects of the first
// took, and nothing if that one failed lately; the whole stagger if the next one has
// just broken a flow. The first connection wins, the others are closed at once.
//
// What a member says is either an answer or a failure. A refusal and a denial
// are answers: the others are asked too, for a path can lie, but a client is
// not kept waiting for those that are silent (answerWait). Where all fail, the
// client is told what they say; if some were silent, the members are asked again
// until the deadline. ErrUnsupported and dialer.ErrAccount count as if the member
// were not there.
//
// An attempt has a time of its own, and ends early when the kernel says that its path is
// gone: its context is ended for that cause, which groups and proxies inside find there.

const (
	maxInFlight = 3
	minStagger  = 50 * time.Millisecond
	// answerWait is what the silent ones get after the first refusal, or twice
	// their usual time.
	answerWait = time.Second
	// roundTime is the least time between two attempts of one member.
	roundTime = time.Second
	// crowdedWait is when a race that found no room for a second socket asks again.
	crowdedWait = 100 * time.Millisecond
)

// race is one question to the members of a group.
type race[T io.Closer] struct {
	g      *Group
	target dialer.Target
	dial   func(context.Context, dialer.Outbound, *dialer.Target) (T, error)
	scored bool // what it tells is for the scores

	until    time.Time      // the deadline of it all; before run that of the flow, or zero
	ending   *dialer.Ending // nil: its context alone ends it
	stagger  time.Duration
	queue    []ranked
	tries    []*try // of this round
	inFlight int
	extra    int       // places that the attempts beside the first have taken
	nextAt   time.Time // when the next of the queue may start
	began    time.Time // of the round
	answered time.Time // when the refused give up waiting for the others; zero: no refusal

	first   try       // the first of all
	room    [1]*try   // for tries: nearly always it is enough
	places  [4]ranked // for queue
	making  sync.Once
	results chan result[T]  // by ended
	ctx     context.Context // of the caller
	joined  chan outcome[T] // of the goroutine in which the others have joined
}

type result[T any] struct {
	*try
	conn T
	err  error
}

// outcome is how a race ends.
type outcome[T any] struct {
	conn T
	m    *member
	err  error
}

// run returns the conn of the first member to connect, and that member. Nothing
// of the race is left when it returns.
func (r *race[T]) run(ctx context.Context) (conn T, m *member, err error) {
	now := time.Now()
	if until := now.Add(r.g.c.Deadline); r.until.IsZero() || until.Before(r.until) {
		r.until = until
	}
	r.ctx = ctx
	attempt, cancel := context.WithCancelCause(ctx)
	r.ending.By(cancel)
	if t := r.line(now, cancel); t != nil {
		return r.alone(attempt, t)
	}
	cancel(nil)
	if len(r.queue) == 0 {
		return conn, nil, r.fail(flow.HostUnreachable, errNobody)
	}
	return r.loop()
}

// line has the members stand in line, for the first time, and begins the attempt of the
// first one if that is to be alone for a while; else it returns nil.
func (r *race[T]) line(now time.Time, cancel context.CancelCauseFunc) *try {
	s := r.g.scores
	s.mu.Lock()
	defer s.mu.Unlock()
	r.stand(now, now)
	if len(r.queue) == 0 {
		return nil
	}
	if r.stagger = r.queue[0].path.stagger(r.g.c.Stagger, now); r.stagger == 0 {
		return nil
	}
	return r.next(now, cancel, r)
}

// ended is where attempts that have ended are told of; joined is made with it. Room for all that can be in
// flight: an attempt never waits for us.
func (r *race[T]) ended() chan result[T] {
	r.making.Do(func() { r.results, r.joined = make(chan result[T], maxInFlight), make(chan outcome[T], 1) })
	return r.results
}

// alone asks the first member in the caller's goroutine: nearly always that is all
// there is to do. The others join when the stagger is over, or when it has failed.
func (r *race[T]) alone(attempt context.Context, t *try) (conn T, m *member, err error) {
	res := r.try(attempt, t)
	if !t.alone.CompareAndSwap(true, false) {
		r.ended() <- res
		o := <-r.joined
		return o.conn, o.m, o.err
	}
	now := r.took(&res)
	if res.err == nil {
		r.settle(t, now)
		return res.conn, t.member, nil
	}
	return r.loop()
}

// join is loop beside an attempt of alone.
func (r *race[T]) join() {
	r.ended()
	var o outcome[T]
	defer func() {
		if p := recover(); p != nil {
			o.err = r.panicked(p, r.g.c.Name)
		}
		r.joined <- o
	}()
	o.conn, o.m, o.err = r.loop()
}

// loop sees the race to its end.
func (r *race[T]) loop() (conn T, m *member, err error) {
	ctx, cancel := context.WithDeadline(r.ctx, r.until)
	defer cancel()
	r.ending.By(func(error) { cancel() }) // settle ends all attempts
	results := r.ended()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		if ctx.Err() != nil {
			err := r.over(ctx)
			r.settle(nil, now)
			return conn, nil, err
		}
		r.start(ctx, now)
		if r.inFlight == 0 && len(r.queue) == 0 {
			again, err := r.verdict()
			r.settle(nil, now)
			if !again {
				return conn, nil, err
			}
			r.round(now, later(now, r.began.Add(roundTime)))
		}
		timer.Reset(time.Until(r.wake(now)))
		select {
		case res := <-results:
			now := r.took(&res)
			if res.err == nil {
				r.settle(res.try, now)
				return res.conn, res.member, nil
			}
		case now := <-timer.C:
			if !r.answered.IsZero() && !now.Before(r.answered) {
				_, err := r.verdict()
				r.settle(nil, time.Now())
				return conn, nil, err
			}
		case <-ctx.Done():
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func sooner(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// round asks all members again, from then on.
func (r *race[T]) round(now, then time.Time) {
	r.g.scores.mu.Lock()
	defer r.g.scores.mu.Unlock()
	r.stand(now, then)
}

// stand puts the members in their order, for a round that begins then. Under Scores.mu.
func (r *race[T]) stand(now, then time.Time) {
	r.queue, r.tries = r.g.order(r.places[:0], &r.target, now), r.room[:0]
	r.began, r.nextAt = then, then
}

// start begins the attempts that are due.
func (r *race[T]) start(ctx context.Context, now time.Time) {
	for len(r.queue) > 0 && r.inFlight < maxInFlight && !now.Before(r.nextAt) {
		if r.inFlight > r.extra {
			if !r.g.scores.takeExtra() {
				r.nextAt = now.Add(crowdedWait)
				return
			}
			r.extra++
		}
		attempt, cancel := context.WithCancelCause(ctx)
		r.g.scores.mu.Lock()
		t := r.next(now, cancel, nil)
		r.g.scores.mu.Unlock()
		go func() { r.results <- r.try(attempt, t) }()
	}
}

// next begins the attempt of the next member, that others are to join; nil: nobody.
// Under Scores.mu.
func (r *race[T]) next(now time.Time, cancel context.CancelCauseFunc, others joiner) *try {
	t := &r.first
	if t.member != nil {
		t = new(try)
	}
	t.member, t.began, t.until, t.cancel = r.queue[0].member, now, sooner(now.Add(r.g.c.Attempt), r.until), cancel
	r.queue = r.queue[1:]
	r.tries = append(r.tries, t)
	r.inFlight++
	r.nextAt = now.Add(r.stagger)
	if len(r.queue) > 0 && r.queue[0].breaks {
		r.nextAt = now.Add(r.g.c.Stagger)
	}
	t.joinAt, t.others = r.nextAt, others
	t.alone.Store(others != nil)
	r.g.scores.begin(t)
	return t
}

// try makes an attempt.
func (r *race[T]) try(ctx context.Context, t *try) result[T] {
	conn, err := r.safely(ctx, t.out)
	return result[T]{t, conn, dialer.WhyEnded(ctx, err)}
}

// safely is dial in a goroutine that nobody else guards: what a server says may
// hit a fault of ours, which then is a failure of that one attempt.
func (r *race[T]) safely(ctx context.Context, o dialer.Outbound) (conn T, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked(p, o.Name())
		}
	}()
	return r.dial(ctx, o, &r.target)
}

// panicked tells of a panic. It is to be called where that was recovered.
func (r *race[T]) panicked(p any, outbound string) error {
	err := r.fail(flow.Unknown, fmt.Errorf("ended by a panic: %v", p))
	r.g.scores.log.Error("attempt ended by a panic", "outbound", outbound, "err", err, "stack", string(debug.Stack()))
	return err
}

// wake is when to look again if nothing comes.
func (r *race[T]) wake(now time.Time) time.Time {
	at := now.Add(time.Hour)
	if len(r.queue) > 0 && r.inFlight < maxInFlight {
		at = r.nextAt
	}
	if !r.answered.IsZero() && r.answered.Before(at) {
		at = r.answered
	}
	return at
}

// took notes the end of an attempt, which is now.
func (r *race[T]) took(res *result[T]) (now time.Time) {
	now = time.Now()
	t := res.try
	t.done, t.err = true, res.err
	t.cancel(nil)
	r.inFlight--
	took := now.Sub(t.began)
	if res.err == nil && r.scored {
		r.g.scores.connected(t, r.target.Addr, took, now)
	} else {
		r.g.scores.end(t)
	}
	if r.scored && r.g.scores.meter != nil {
		r.g.scores.meter.Dialled(t.path.name, took, flow.ReasonOf(res.err))
	}
	if res.err == nil {
		return now
	}
	r.nextAt = now
	if isAnswer(res.err) && r.answered.IsZero() {
		r.answered = now.Add(r.g.scores.answerWait(r.g.members))
	}
	return now
}

// isAnswer tells what a destination, or who guards it, says from what becomes of
// a path.
func isAnswer(err error) bool {
	why := flow.ReasonOf(err)
	return (why == flow.Refused || why == flow.Prohibited || why == flow.Expired) && !absent(err)
}

// errNobody is of a group all of whose members are to be avoided.
var errNobody = errors.New("no member is left")

// absent tells the errors of a member that nobody was asked by.
func absent(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, dialer.ErrAccount) || errors.Is(err, errNobody)
}

// verdict says what the failures of a round mean: ask again, or what the client
// is to be told.
func (r *race[T]) verdict() (again bool, err error) {
	var told, silent, unable error
	for _, t := range r.tries {
		switch why := flow.ReasonOf(t.err); {
		case t.err == nil: // given up
		case isAnswer(t.err):
			return false, t.err
		case absent(t.err):
			unable = t.err
		case why == flow.TimedOut:
			silent = t.err
		case told == nil || why == flow.HostUnreachable:
			told = t.err
		}
	}
	switch {
	case silent != nil:
		return true, silent
	case told != nil:
		return false, told
	case unable != nil:
		return false, unable
	}
	return false, r.fail(flow.HostUnreachable, errNobody)
}

// over is the error of a race whose time is up, or whose client has left.
func (r *race[T]) over(ctx context.Context) error {
	if err := dialer.WhyEnded(ctx, ctx.Err()); flow.ReasonOf(err) != flow.TimedOut {
		return r.fail(flow.ReasonOf(err), err)
	}
	err := fmt.Errorf("no outbound has connected in time: %w", context.DeadlineExceeded)
	for _, t := range r.tries {
		if t.err != nil {
			err = fmt.Errorf("no outbound has connected in time: %w", t.err)
		}
	}
	return r.fail(flow.TimedOut, err)
}

func (r *race[T]) fail(why flow.Reason, err error) error {
	return &dialer.Error{Hop: r.g.c.Name, Op: "connect", Addr: r.target.Addr, Reason: why, Err: err}
}

// settle ends what is in flight and tells the scores what the others than the
// winner did.
func (r *race[T]) settle(winner *try, now time.Time) {
	if r.inFlight > 0 {
		for _, t := range r.tries {
			t.end(now)
		}
	}
	for r.inFlight > 0 {
		res := <-r.results
		r.inFlight--
		r.g.scores.end(res.try)
		if res.err != nil && !errors.Is(res.err, context.Canceled) {
			res.done, res.try.err = true, res.err // in the same moment, and by itself
		}
		if res.err == nil {
			_ = res.conn.Close()
		}
	}
	r.g.scores.giveExtra(r.extra)
	r.extra = 0
	if !r.scored {
		return
	}
	for _, t := range r.tries {
		switch {
		case t == winner:
		case t.done:
			if !blameless(t.err) {
				r.g.scores.lost(t.path, r.target.Addr, flow.ReasonOf(t.err), winner != nil, now)
			}
		case winner != nil && r.g.scores.overtaken(t.path, now.Sub(t.began), r.g.c.Stagger):
			r.g.scores.lost(t.path, r.target.Addr, flow.TimedOut, true, now)
		}
	}
}

// exhausted tells that this machine lacks something.
func exhausted(err error) bool {
	for _, e := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EADDRINUSE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// stagger is how long it is alone as the first member of a race, most at most. Under
// Scores.mu.
func (p *path) stagger(most time.Duration, now time.Time) time.Duration {
	if l := &p.level[connects]; !l.failedAt.IsZero() && now.Sub(l.failedAt) < freshFailure || p.down != "" {
		return 0
	}
	usual := p.times.p95()
	if usual == 0 {
		return most
	}
	return min(max(2*usual, minStagger), most)
}

// overtaken says whether a member that has not connected within took is to be
// called slow.
func (s *Scores) overtaken(p *path, took, most time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	usual := p.times.p95()
	if usual == 0 {
		return took >= most
	}
	return took >= max(2*usual, min(minStagger, most))
}

func (s *Scores) answerWait(members []*member) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := answerWait
	for _, m := range members {
		wait = max(wait, 2*m.path.times.p95())
	}
	return wait
}
