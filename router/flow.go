package router

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/rules"
)

// refusal returns what a flow is told for which decide found no outbound, and
// counts it. streams are told no by RST, datagrams by ICMP.
func (r *Router) refusal(v rules.Verdict, p flow.Proto) (tell, why flow.Reason) {
	switch v.Use {
	case rules.UseDrop:
		r.counts.denied.add(byRule)
		return flow.Dropped, flow.Dropped
	case rules.UseReject:
		r.counts.denied.add(byRule)
		return refusalOf(p), flow.Prohibited
	}
	// No rules yet, or a name that was checked when the file was read.
	r.counts.refused.Add(1)
	r.log.Debug("no outbound of that name", "outbound", v.Use)
	return flow.NetUnreachable, flow.NetUnreachable
}

// refusalOf is what the client of a flow that is not wanted is told.
func refusalOf(p flow.Proto) flow.Reason {
	if p == flow.TCP {
		return flow.Refused
	}
	return flow.Prohibited
}

// judge asks the guard about a flow that would leave in one of these ways, and
// counts what it denies: of no failure is that.
func (r *Router) judge(e *entry, leaves []dialer.Leave) error {
	err := r.aside(func() error { return r.opts.Guard.Judge(e.flow, leaves) })
	if err == nil {
		return nil
	}
	kind := byFault
	var denied *flow.Denied
	if errors.As(err, &denied) {
		kind = denied.Kind
	}
	if r.counts.denied.add(kind) {
		r.log.Info("a flow is denied; [policy] allow opens what is wanted", "attachment", e.flow.Attachment, "dst", e.flow.Dst.String(), "reason", kind, "err", err)
	}
	e.failed(err)
	return err
}

// dialled counts what an outbound made of a flow that it was given at began,
// and returns why it failed; flow.Closed if it did not.
func (e *entry) dialled(began time.Time, err error) flow.Reason {
	e.mu.Lock()
	way := e.way
	e.mu.Unlock()
	why := flow.ReasonOf(err)
	if noPlace(err) {
		e.r.counts.refused.Add(1)
		return why // no failure of the outbound
	}
	if way != nil && e.flow.Proto == flow.TCP {
		e.r.opts.Meter.Dialled(way.name, time.Since(began), why)
	}
	if err == nil {
		way.connected(time.Since(began), e.r.log)
		return why
	}
	way.failed(err, why, e.r.log)
	if why != flow.Canceled {
		e.r.counts.refused.Add(1)
	}
	return why
}

// target is what an outbound is asked for on behalf of a flow: with the name that
// the client looked up, never with one that it says in what it sends, nor with one
// of two that had the address.
func (e *entry) target() dialer.Target {
	return dialer.Target{Flow: e.flow, Addr: e.flow.Dst, Name: e.asked}
}

// log writes the line of a flow that has ended, at debug.
func (e *entry) log() {
	ctx := context.Background()
	if !e.r.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	e.mu.Lock()
	rule, use, hops, why, lived, owner := e.rule, e.use, e.hops, e.reason, e.ended.Sub(e.flow.Start), e.owner
	e.mu.Unlock()
	f := e.flow
	attrs := []slog.Attr{
		slog.Uint64("flow", f.ID), slog.String("attachment", f.Attachment), slog.String("proto", f.Proto.String()),
		slog.String("src", f.Src.String()), slog.String("dst", f.Dst.String()),
		slog.Int("rule", int(rule)), slog.String("outbound", use), slog.Any("path", hops),
		slog.String("reason", why.String()), slog.Int64("up", e.up.Load()), slog.Int64("down", e.down.Load()),
		slog.Duration("lived", lived),
	}
	if owner != nil {
		attrs = append(attrs, slog.String("cgroup", owner.Cgroup))
	}
	e.r.log.LogAttrs(ctx, slog.LevelDebug, "flow ended", attrs...)
}

// failed writes the line of a flow that got no connection, at debug: the only
// place that has the error itself.
func (e *entry) failed(err error) {
	e.r.log.Debug("flow not connected", "flow", e.flow.ID, "attachment", e.flow.Attachment, "dst", e.flow.Dst.String(), "err", err)
}
