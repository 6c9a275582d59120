package router

import (
	"context"
	"runtime/metrics"
	"time"

	"cgtun/flow"
)

// Room for new flows: descriptors and memory that clients cannot take from the
// rest of the process. A flow that finds none is refused at once, which its
// program understands, rather than served badly together with all others.

// noRoom is why a flow is refused.
type noRoom string

func (e noRoom) Error() string         { return string(e) }
func (noRoom) FlowReason() flow.Reason { return flow.Refused }

const (
	errNoSocket noRoom = "as many outbound sockets as the limit of open files allows"
	errNoMemory noRoom = "as much memory in use as [limits] memory allows"
)

// takeSocket takes a place for an outbound socket, or none and says why.
// giveSocket gives it back.
func (r *Router) takeSocket() error {
	if r.scarce.Load() {
		return errNoMemory
	}
	if n := r.sockets.Add(1); r.opts.MaxSockets > 0 && n > int64(r.opts.MaxSockets) {
		r.sockets.Add(-1)
		if !r.full.Swap(true) {
			r.log.Warn("new flows are refused: all sockets are in use; raise the limit of open files", "sockets", r.opts.MaxSockets)
		}
		return errNoSocket
	}
	return nil
}

func (r *Router) giveSocket() {
	if n := r.sockets.Add(-1); n < int64(r.opts.MaxSockets)/2 && r.full.Load() {
		r.full.Store(false)
	}
}

// memoryEvery is how often memory is looked at. What a machine with fast links
// can fill between two looks is a fraction of the eighth that is kept free.
const memoryEvery = 100 * time.Millisecond

// watchMemory refuses new flows while more than seven eighths of MaxMemory are
// in use, above what there was at the start.
func (r *Router) watchMemory(ctx context.Context) {
	if r.opts.MaxMemory <= 0 {
		return
	}
	limit := r.startMemory + uint64(r.opts.MaxMemory)/8*7
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		used := usedMemory()
		if scarce := used > limit; scarce && !r.scarce.Swap(true) {
			r.log.Warn("new flows are refused: the flows fill the memory; raise [limits] memory", "used", used-r.startMemory, "limit", r.opts.MaxMemory)
		} else if !scarce && r.scarce.Swap(false) {
			r.log.Info("new flows are served again", "used", used-min(used, r.startMemory))
		}
	}
}

// usedMemory is what the Go runtime has in use, in bytes: not what is free for
// the next allocation or given back to the kernel. Garbage counts until it is
// collected, which debug.SetMemoryLimit hastens.
func usedMemory() uint64 {
	s := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	metrics.Read(s)
	return s[0].Value.Uint64() - s[1].Value.Uint64() - s[2].Value.Uint64()
}
