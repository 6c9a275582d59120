package replay

import (
	"context"
	"io"
	"sync"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

// As long as nothing goes wrong a flow is only watched: the caller's goroutine waits
// for the server's first byte, and what the client sends is handed on by a flow.Burst,
// as in relay. A copy is kept. What is not safe stays in the client for relay. All
// else, an end or a silence of the server, is run's work, which takes over what has
// been kept and sent.

// direct is a client's end that shows what it has got; relay.Direct is more.
type direct interface {
	flow.Conn
	Notify(f func(readable, writable, ended bool))
	Peek(dst [][]byte) ([][]byte, int, error)
	Discard(n int)
}

// watch is a flow between such a client and a plain socket.
type watch struct {
	r      *run
	l      *link
	client direct

	pump flow.Burst

	mu    sync.Mutex
	ended bool // nothing is handed on any more
	give  bool // to relay, as it is
}

// maxShown bounds the slices of one look at a client.
const maxShown = 16

var shownPool = sync.Pool{New: func() any { return new([maxShown][]byte) }}

// watched sees the flow to the server's first byte, or to the first thing that goes
// wrong: then it returns false, and the error of a server that has ended.
func (r *run) watched(ctx context.Context, client direct, l *link) (res Result, done bool, err error) {
	w := &watch{r: r, l: l, client: client}
	w.pump.Init(r.o.Workers, w.up)
	w.arm(r.began.Add(maxTime))
	unwatch := context.AfterFunc(ctx, func() { w.end(false) })
	client.Notify(func(readable, _, ended bool) {
		if readable || ended {
			w.pump.Event()
		}
	})
	w.pump.Look(w.nothing) // what came before Notify
	err = peek(l.socket)
	w.stop()
	client.Notify(nil)
	if w.pump.Running() {
		_ = l.SetWriteDeadline(flow.Past)
		w.pump.Wait()
		_ = l.SetWriteDeadline(time.Time{})
	}
	unwatch()
	_ = l.SetReadDeadline(time.Time{})
	switch {
	case ctx.Err() != nil:
		_ = l.Reset()
		return r.finish(Result{Server: l.Conn, Over: true, Reason: flow.ReasonOf(context.Cause(ctx))}, l), true, nil
	case err == nil:
		l.Tell(dialer.Outcome{News: dialer.Answered, After: r.firstByte(l)})
	case !flow.IsDeadline(err):
		return res, false, err
	case !w.give && time.Since(r.began) < maxTime:
		return res, false, nil // silent
	}
	r.o.Up.Add(int64(l.sent))
	if failed := l.writeErr.Load(); failed != nil {
		res.Broken = *failed
	}
	res.Server = l.Conn
	return res, true, nil
}

// end has nothing more handed on, and wakes the caller.
func (w *watch) end(give bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.ended, w.give = true, give
		_ = w.l.SetReadDeadline(flow.Past)
	}
}

// stop is end by the caller itself.
func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
}

// arm says until when the server may be silent.
func (w *watch) arm(until time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		_ = w.l.SetReadDeadline(until)
	}
}

func (w *watch) over() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ended
}

// nothing says that the client has not said anything.
func (w *watch) nothing() bool {
	shown := shownPool.Get().(*[maxShown][]byte)
	defer shownPool.Put(shown)
	_, n, err := w.client.Peek(shown[:0])
	clear(shown[:])
	return n == 0 && err == nil
}

// up hands on what the client has sent, as long as that is safe.
func (w *watch) up() {
	shown := shownPool.Get().(*[maxShown][]byte)
	defer shownPool.Put(shown)
	defer clear(shown[:])
	r := w.r
	for !w.over() {
		slices, n, err := w.client.Peek(shown[:0])
		switch {
		case err == io.EOF && len(r.kept.b) > 0:
			w.end(false) // the server is to hear of that
			return
		case err != nil:
			w.end(true)
			return
		case n == 0:
			return
		}
		verdict := Undecided
		fresh := len(r.kept.b) == 0
		if fresh {
			verdict = Judge(slices[0], r.o.Port) // before it is copied
		}
		if verdict == Unsafe || n > maxKept {
			w.end(true)
			return
		}
		all := r.kept.b
		for _, s := range slices {
			all = append(all, s...)
		}
		if !fresh || len(slices) > 1 {
			verdict = Judge(all, r.o.Port)
		}
		if r.chunks++; verdict == Unsafe || len(all) > maxKept || r.chunks > maxChunks {
			w.end(true)
			return
		}
		n, err = w.l.Write(all[len(r.kept.b):])
		w.client.Discard(n)
		r.kept.b = all[:w.l.sent+n]
		w.l.sent += n
		r.sentAt = time.Now()
		if err != nil {
			if !flow.IsDeadline(err) {
				w.l.writeErr.Store(&err)
			}
			return // the caller hears how the server has ended
		}
		if verdict == Safe && r.o.Redial != nil {
			w.arm(r.sentAt.Add(unackedAfter))
		}
	}
}
