package main

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"cgtun/config"
)

// readyMessage is the message of the record that scripts wait for.
const readyMessage = "ready"

// newLogger makes the daemon's log as [log] says. Its level can be changed.
func newLogger(l config.Log, w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := new(slog.LevelVar)
	level.Set(l.SlogLevel())
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(w, opts)
	if l.Format == config.FormatJSON {
		h = slog.NewJSONHandler(w, opts)
	}
	return slog.New(logHandler{h, &told{of: map[string]*alike{}}}), level
}

// logHandler lets the record "ready" through at every level, and bounds the others:
// a process that is captured can bring the same about again and again.
type logHandler struct {
	slog.Handler
	told *told
}

// Enabled is asked before the message is known, so it lets all records of
// ready's level come.
func (h logHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return l == slog.LevelInfo || h.Handler.Enabled(ctx, l)
}

func (h logHandler) Handle(ctx context.Context, r slog.Record) error {
	switch {
	case r.Message == readyMessage:
	case !h.Handler.Enabled(ctx, r.Level):
		return nil
	case r.Level >= slog.LevelInfo:
		untold, ok := h.told.again(r.Message, r.Time)
		if !ok {
			return nil
		}
		if untold > 0 {
			r = r.Clone()
			r.AddAttrs(slog.Int("untold", untold))
		}
	}
	return h.Handler.Handle(ctx, r)
}

func (h logHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return logHandler{h.Handler.WithAttrs(a), h.told}
}

func (h logHandler) WithGroup(name string) slog.Handler {
	return logHandler{h.Handler.WithGroup(name), h.told}
}

// Of records with the same message so many are written in so long.
const (
	mostAlike = 30
	alikeTime = time.Minute
)

// told counts them. Messages are constants of ours, so that they are few.
type told struct {
	mu sync.Mutex
	of map[string]*alike
}

type alike struct {
	since         time.Time
	count, untold int
}

// again says whether one more is to be written, and how many were not since the
// last one that was.
func (t *told) again(message string, now time.Time) (untold int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.of[message]
	if a == nil {
		a = &alike{}
		t.of[message] = a
	}
	if now.Sub(a.since) >= alikeTime {
		a.since, a.count = now, 0
	}
	if a.count == mostAlike {
		a.untold++
		return 0, false
	}
	a.count++
	untold, a.untold = a.untold, 0
	return untold, true
}
