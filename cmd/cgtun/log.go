package main

import (
	"context"
	"io"
	"log/slog"

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
	return slog.New(readyHandler{h}), level
}

// readyHandler lets the record "ready" through at every level.
type readyHandler struct{ slog.Handler }

// Enabled is asked before the message is known, so it lets all records of
// ready's level come.
func (h readyHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return l == slog.LevelInfo || h.Handler.Enabled(ctx, l)
}

func (h readyHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Message != readyMessage && !h.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

func (h readyHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return readyHandler{h.Handler.WithAttrs(a)}
}

func (h readyHandler) WithGroup(name string) slog.Handler {
	return readyHandler{h.Handler.WithGroup(name)}
}
