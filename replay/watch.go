package replay

import (
	"sync"
	"time"

	"cgtun/dialer"
)

// Watch sees the beginning of a flow that relay moves already (relay.Watcher), until the
// server's first byte or the first thing that goes wrong. It keeps a copy of what the
// client has sent. What is not safe ends its interest before it is sent; an end or a
// silence of the server, before that, is for Begin, which takes over what was kept.
type Watch struct {
	server *dialer.Conn
	port   uint16
	helps  bool
	began  time.Time

	next    []byte // kept, and what is being sent
	chunks  int
	verdict Verdict // on next

	mu     sync.Mutex
	state  watching
	kept   []byte // what the server has got
	sentAt time.Time
}

// watching is how far a Watch has come.
type watching uint8

const (
	unanswered watching = iota
	given               // to relay, which is to go on alone
	taken               // from relay
)

// NewWatch begins to see a flow to that port by server. helps says whether another
// server can be asked: where none can, a silence is nothing.
func NewWatch(server *dialer.Conn, port uint16, helps bool) *Watch {
	return &Watch{server: server, port: port, helps: helps, began: time.Now()}
}

// Next implements relay.Watcher.
func (w *Watch) Next(slices [][]byte, n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != unanswered {
		return w.state == given
	}
	w.judge(slices, n)
	if w.sentAt = time.Now(); w.verdict == Unsafe || w.sentAt.Sub(w.began) >= maxTime {
		w.give()
	}
	return true
}

// judge looks at what comes behind what is kept.
func (w *Watch) judge(slices [][]byte, n int) {
	w.verdict = Unsafe
	if w.chunks++; w.chunks > maxChunks || len(w.kept)+n > maxKept {
		return
	}
	if len(w.kept) == 0 {
		if w.verdict = Judge(slices[0], w.port); w.verdict == Unsafe {
			return // before it is copied
		}
	}
	w.next = w.kept
	for _, s := range slices {
		w.next = append(w.next, s...)
	}
	if len(w.next) > len(slices[0]) {
		w.verdict = Judge(w.next, w.port)
	}
}

// Sent implements relay.Watcher.
func (w *Watch) Sent(n int) (until time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state == given {
		return until
	}
	w.kept = w.next[:len(w.kept)+n]
	if w.verdict == Safe && w.helps {
		until = w.sentAt.Add(unackedAfter)
	}
	return until
}

// ClientEnds implements relay.Watcher.
func (w *Watch) ClientEnds() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	// Without a word it has no use for another server; else that one is to hear of it.
	return w.goesOn(len(w.kept) == 0)
}

// ServerSpeaks implements relay.Watcher.
func (w *Watch) ServerSpeaks() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != unanswered {
		return w.state == given
	}
	news := dialer.Outcome{News: dialer.Answered}
	if !w.sentAt.IsZero() {
		news.After = time.Since(w.sentAt)
	}
	w.server.Tell(news)
	w.give()
	return true
}

// ServerEnds implements relay.Watcher.
func (w *Watch) ServerEnds(error) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.goesOn(false)
}

// goesOn leaves the flow to relay if it is to be so, or takes it. Under w.mu.
func (w *Watch) goesOn(alone bool) bool {
	switch {
	case w.state != unanswered:
	case alone || time.Since(w.began) >= maxTime:
		w.give()
	default:
		w.state = taken
	}
	return w.state == given
}

// give ends the interest in the flow. Under w.mu.
func (w *Watch) give() { w.state, w.kept, w.next = given, nil, nil }
