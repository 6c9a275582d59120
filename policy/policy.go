// Package policy judges where flows may go. An outbound dials from home, in the
// name of a process that may be in a container: without a judge that process
// would reach what it cannot reach without cgtun. Home's loopback services, the
// metadata of a cloud, other containers' networks, which the host isolates where
// it forwards: what cgtun dials is not forwarded.
//
// Two questions are asked of a flow's destination, and of each address that its
// address stands for (table.go):
//
//   - Is it in a table of what nobody may reach: loopback, link-local,
//     multicast, every address that is local in home, the addresses of cgtun's
//     devices.
//   - Would the dial leave by an interface of a container network: the kernel
//     is asked for the route that the outbound's sockets would take (home.go).
//
// Flows from home's own addresses in home's attachment are not judged: their
// processes reach all that anyway. [policy] allow opens what is wanted.
//
// The package owns the table and what it remembers of home. It does not decide
// what becomes of a flow that is denied, and opens no socket but for netlink.
// router asks it as its Guard; cmd makes it, and tells it of changes.
package policy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/gaissmai/bart"

	"cgtun/dialer"
	"cgtun/flow"
)

// Options say what is open, and what cannot be seen in the tables of home.
type Options struct {
	Allow []netip.Prefix
	// Interfaces are those that outbounds name: what leaves by them is wanted.
	Interfaces []string
	// Home is the id of home's attachment.
	Home string
	// Attached returns the numbers that attached namespaces have in home
	// (RTM_NEWNSID of rtnetlink(7)); Devices the addresses of cgtun's devices in
	// them. Nil: there are none.
	Attached func() map[int]bool
	Devices  func() []netip.Addr
	Logger   *slog.Logger // nil: none
}

// Judge is a router.Guard. Safe for concurrent use.
type Judge struct {
	opts    Options
	named   map[string]bool // Interfaces
	allow   bart.Lite
	again   chan struct{} // holds one token: home has changed
	asking  chan struct{} // a place for each question to the kernel
	version atomic.Uint64
	now     atomic.Pointer[picture]
}

// calm is how long changes of home are gathered after a look: what has changed is asked
// of the kernel meanwhile. retry is how long a look that failed waits for the next one.
const (
	calm  = 250 * time.Millisecond
	retry = time.Second
)

// New looks at the network namespace that it is called in, which is home.
func New(o Options) (*Judge, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Attached == nil {
		o.Attached = func() map[int]bool { return nil }
	}
	if o.Devices == nil {
		o.Devices = func() []netip.Addr { return nil }
	}
	j := &Judge{opts: o, named: map[string]bool{}, again: make(chan struct{}, 1), asking: make(chan struct{}, maxAsking)}
	for _, p := range o.Allow {
		j.allow.Insert(plain(p))
	}
	for _, name := range o.Interfaces {
		j.named[name] = true
	}
	p, err := j.look()
	if err != nil {
		return nil, fmt.Errorf("read the addresses of home: %w", err)
	}
	j.now.Store(p)
	return j, nil
}

// Run looks at home again after each LookAgain, until ctx ends.
func (j *Judge) Run(ctx context.Context) error {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-j.again:
		}
		wait := calm
		before := j.version.Load()
		p, err := j.look()
		if err == nil {
			j.now.Store(p)
			if j.version.Load() != before {
				p.stale.Store(true) // it changed while it was looked at
			}
			j.version.Add(1)
		} else {
			wait = retry
			j.wake()
			if !failing {
				j.opts.Logger.Warn("the addresses of home could not be read, trying on", "err", err)
			}
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// LookAgain says that home's links, addresses or routes, or the attachments, may
// have changed. It does not wait: until Run has looked, nothing that is
// remembered of routes is believed.
func (j *Judge) LookAgain() {
	j.version.Add(1)
	j.now.Load().stale.Store(true)
	j.wake()
}

func (j *Judge) wake() {
	select {
	case j.again <- struct{}{}:
	default:
	}
}

// Version changes whenever what Judge has said may not hold any more.
func (j *Judge) Version() uint64 { return j.version.Load() }

// Has says whether home has an address.
func (j *Judge) Has(a netip.Addr) bool { return j.now.Load().own[a.Unmap().WithZone("")] }

// Judge says, by a *flow.Denied, why a flow may not go where it wants to by an
// outbound whose sockets leave in one of these ways. Nil: it may.
func (j *Judge) Judge(f *flow.Flow, leaves []dialer.Leave) error {
	p := j.now.Load()
	if f.Attachment == j.opts.Home && p.own[f.Src.Addr().Unmap()] {
		return nil
	}
	return j.judge(p, f.Dst.Addr(), leaves)
}

func (j *Judge) judge(p *picture, dst netip.Addr, leaves []dialer.Leave) error {
	means := meanings(dst)
	for _, a := range means {
		if a.IsValid() && j.allow.Contains(a) {
			return nil
		}
	}
	for _, a := range means {
		if kind, ok := p.denied.Lookup(a); ok && a.IsValid() {
			return &flow.Denied{Kind: string(kind), Why: fmt.Sprintf("%s is %s", shown(dst, a), words[kind])}
		}
	}
	for _, l := range leaves {
		if l.Interface != "" {
			continue // an outbound names it
		}
		for _, a := range means {
			if !a.IsValid() {
				continue
			}
			switch to := j.route(p, query{a, l.Source, l.Mark}); to.kind {
			case "":
			case container:
				return &flow.Denied{Kind: string(container), Why: fmt.Sprintf("%s is reached by %s, which leads to containers", shown(dst, a), to.link)}
			default:
				return &flow.Denied{Kind: string(to.kind), Why: fmt.Sprintf("%s is %s", shown(dst, a), words[to.kind])}
			}
		}
	}
	return nil
}

// shown is an address, and what it stands for.
func shown(dst, means netip.Addr) string {
	if dst == means {
		return dst.String()
	}
	return fmt.Sprintf("%s (%s)", dst, means)
}
