package router

import (
	"context"
	"errors"
	"runtime"
	"runtime/debug"
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

// noPlace says whether a flow was not served for want of room, or to make some.
func noPlace(err error) bool {
	var full noRoom
	return errors.As(err, &full) || errors.Is(err, errCrowded)
}

// takeSocket takes a place for an outbound socket, or none and says why.
// giveSockets gives some back.
func (r *Router) takeSocket() error {
	if r.scarce.Load() {
		r.turnedAway.Store(true)
		return errNoMemory
	}
	if n := r.sockets.Add(1); r.opts.MaxSockets > 0 && n > int64(r.opts.MaxSockets) {
		r.sockets.Add(-1)
		r.turnedAway.Store(true)
		if !r.full.Swap(true) {
			r.log.Warn("new flows are refused: all sockets are in use; raise the limit of open files", "sockets", r.opts.MaxSockets)
		}
		return errNoSocket
	}
	return nil
}

func (r *Router) giveSockets(places int) {
	n, most := r.sockets.Add(int64(-places)), int64(r.opts.MaxSockets)
	if n < most-most/8 && r.full.Load() && r.full.Swap(false) {
		r.log.Info("new flows are served again", "sockets", n)
	}
}

// TakeExtra takes a place for a socket that a flow has beside its own for a moment,
// such as another attempt to connect; false: there is none, and the flow goes on
// with what it has. GiveExtra gives it back.
func (r *Router) TakeExtra() bool {
	if r.scarce.Load() {
		return false
	}
	if n := r.sockets.Add(1); r.opts.MaxSockets > 0 && n > int64(r.opts.MaxSockets) {
		r.sockets.Add(-1)
		return false
	}
	return true
}

// GiveExtra gives the place of TakeExtra back.
func (r *Router) GiveExtra() { r.giveSockets(1) }

// How often memory is looked at: what a machine with fast links can fill between
// two looks has to be a fraction of what is kept free. Few flows cannot fill much.
const (
	memoryEvery    = 100 * time.Millisecond
	memoryOftener  = 10 * time.Millisecond
	memoryFewFlows = 16
	// Garbage is collected before its time at most that often, and in a
	// twentieth of the time.
	collectAtMost   = time.Second
	collectFraction = 20
	// In a fifth where somebody would be refused.
	collectHurried = 5
	// And that often where more than an eighth of the memory is held, so that what
	// a flood leaves goes back to the system.
	collectAtLeast = 20 * time.Second
	// stallRoom is kept free for each open flow, for the time that its ends do
	// not read: its buffers are as small as they get by then.
	stallRoom = 8 << 10
)

// memory is what watchMemory remembers.
type memory struct {
	limit     uint64 // bytes above the start
	live      uint64 // of them, after garbage was collected last
	collected time.Time
	pause     time.Duration // until it may be done again
	took      time.Duration // the last time
}

// CollectorLimit is the limit of memory to set for Go's collector (debug.SetMemoryLimit)
// beside what there was at the start, so that MaxMemory is not passed by garbage: below
// where new flows are refused.
func CollectorLimit(maxMemory int64) int64 { return maxMemory / 16 * 13 }

// SetMaxMemory changes Options.MaxMemory, in bytes, of a Router that has one.
func (r *Router) SetMaxMemory(most int64) { r.maxMemory.Store(most) }

// watchMemory refuses new flows when more than seven eighths of MaxMemory are in
// use, above what there was at the start, until less than three quarters are, and
// tells MemoryUsed.
func (r *Router) watchMemory(ctx context.Context) {
	if r.opts.MaxMemory <= 0 {
		return
	}
	var m memory
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	every := memoryEvery
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.lookAtMemory(&m)
		next := memoryEvery
		if r.table.len() > memoryFewFlows {
			next = memoryOftener
		}
		if next != every {
			every = next
			tick.Reset(every)
		}
	}
}

// lookAtMemory is one look. When an eighth more is in use than was live, it may
// all be garbage; and before somebody is refused for it, that is looked at more
// often. While somebody is, what has ended since is looked for.
func (r *Router) lookAtMemory(m *memory) {
	m.limit = uint64(r.maxMemory.Load())
	used := r.memoryAboveStart()
	since := time.Since(m.collected)
	grown := used > m.live+m.limit/8
	due := since > m.pause && (grown || r.scarce.Load()) || grown && r.tight(m, used) && since > collectHurried*m.took
	collect := runtime.GC
	if since > collectAtLeast && r.aboveStart(heldMemory()) > m.limit/8 {
		due, collect = true, debug.FreeOSMemory
	}
	if due {
		began := time.Now()
		collect()
		m.collected = time.Now()
		m.took = time.Since(began)
		m.pause = max(collectAtMost, collectFraction*m.took)
		used = r.memoryAboveStart()
		m.live = used
	}
	m.live = min(m.live, used)
	if r.opts.MemoryUsed != nil {
		r.opts.MemoryUsed(int64(used), int64(m.limit))
	}
	if r.tight(m, used) && !r.scarce.Swap(true) {
		r.log.Warn("new flows are refused: the flows fill the memory; raise [limits] memory", "used", used, "limit", m.limit)
	} else if r.promised(used) < m.limit/4*3 && r.scarce.Swap(false) {
		r.log.Info("new flows are served again", "used", used)
	}
}

// tight says whether so much is in use that new flows are refused.
func (r *Router) tight(m *memory, used uint64) bool { return r.promised(used) > m.limit/8*7 }

// promised is what is in use, and what the open connections may yet fill.
func (r *Router) promised(used uint64) uint64 { return used + uint64(r.streams.Load())*stallRoom }

func (r *Router) memoryAboveStart() uint64 { return r.aboveStart(usedMemory()) }

func (r *Router) aboveStart(bytes uint64) uint64 { return bytes - min(bytes, r.startMemory) }

// heldMemory is usedMemory, and what is free and was not given back to the kernel.
func heldMemory() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() - s[1].Value.Uint64()
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
