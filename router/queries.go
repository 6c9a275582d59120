package router

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/rules"
	"cgtun/sniff"
)

// Queries to port 53 are answered where their flows come out of the capture,
// whatever server they are for. What is sent there and is no query to answer
// goes on as the flow that it is.

// Resolver answers queries, and knows by what names clients got addresses. Way
// is what the rules say of what a client sends to an upstream. Safe for
// concurrent use.
type Resolver interface {
	// Takes says whether what is sent to dst is looked at.
	Takes(dst netip.AddrPort) bool
	// Take looks at one message. Not mine: it goes on as a flow. With wait, that
	// is called in a goroutine of its own and calls reply, else answer is the
	// answer. No answer, nil, is one too.
	Take(f *flow.Flow, msg []byte, way func(netip.AddrPort, flow.Proto) (dialer.Outbound, error)) (
		answer []byte, wait func(ctx context.Context, reply func([]byte)), mine bool)
	// Name returns the name under which the client got the flow's destination
	// last, "" if it got it from nobody here, whether it got it under that one
	// alone, and whether the one that asked is the flow's Who.
	Name(f *flow.Flow) (name string, sure, own bool)
	// Serve does the same for the messages of a connection, until it ends or,
	// with pass, the client has sent something that is to go on: read, and all
	// that comes after it. An error is why it ended otherwise than in order.
	Serve(ctx context.Context, f *flow.Flow, c net.Conn, way func(netip.AddrPort, flow.Proto) (dialer.Outbound, error)) (read []byte, pass bool, err error)
}

// takes says whether a flow's destination is one that queries are answered for.
func (r *Router) takes(proto flow.Proto, dst netip.AddrPort) bool {
	return r.opts.Resolver != nil && proto != flow.ICMP && r.opts.Resolver.Takes(dst)
}

// denied is what the rules say of an upstream to which they give no outbound.
type denied struct{ why flow.Reason }

func (e *denied) Error() string           { return "a rule denies it: " + e.why.String() }
func (e *denied) FlowReason() flow.Reason { return e.why }

// way returns what the rules say of upstreams on behalf of a client, and the
// guard of the one that the client itself asks.
func (r *Router) way(f *flow.Flow, owner *flow.Owner, last *atomic.Pointer[passed]) func(netip.AddrPort, flow.Proto) (dialer.Outbound, error) {
	return func(to netip.AddrPort, proto flow.Proto) (dialer.Outbound, error) {
		g := *f
		g.Dst, g.Proto = to, proto
		// By name an upstream is not known: no rule by name is for it.
		verdict, outbound, _ := r.match(&rules.Facts{Flow: &g, Owner: owner, Known: rules.FactOwner | rules.FactName})
		if outbound.Outbound == nil {
			_, why := r.refusal(verdict, flow.UDP)
			return nil, &denied{why}
		}
		now := passed{to, outbound.Outbound, r.opts.Guard.Version()}
		if before := last.Load(); to == f.Dst && (before == nil || *before != now) {
			if err := r.judge(&entry{flow: f, r: r}, outbound.leaves); err != nil {
				return nil, err
			}
			last.Store(&now)
		}
		return outbound.Outbound, nil
	}
}

// Way is what the rules, and the guard, say of upstreams on behalf of a client
// that asks on loopback. It notes in f who that is.
func (r *Router) Way(ctx context.Context, f *flow.Flow) func(netip.AddrPort, flow.Proto) (dialer.Outbound, error) {
	owner := r.ownerOfQuery(ctx, f)
	f.Who = who(f, owner)
	return r.way(f, owner, new(atomic.Pointer[passed]))
}

// ownerOfQuery looks the owner of a query up if it matters: to a rule, or to a proxy
// that is asked for the client's own names.
func (r *Router) ownerOfQuery(ctx context.Context, f *flow.Flow) *flow.Owner {
	if !r.policy.Load().asksOwner(f) {
		return nil
	}
	return r.owner(ctx, f)
}

func (p *policy) asksOwner(f *flow.Flow) bool {
	return p.set.NeedsOwner() || p.asksNames && f.Attachment == flow.Home
}

// who tells processes of home apart, which have one address: users, and cgroups.
func who(f *flow.Flow, owner *flow.Owner) string {
	if owner == nil || owner.Lost || f.Attachment != flow.Home {
		return ""
	}
	return fmt.Sprintf("%d %s", owner.UID, owner.Cgroup)
}

// passed is the last server of a client's choice that the guard has let pass.
type passed struct {
	to      netip.AddrPort
	out     dialer.Outbound
	version uint64
}

// query has one datagram answered. False: it is to go on, and of joined ones those
// that are left in it.
func (s *source) query(ctx context.Context, d *flow.Datagram, now time.Time) bool {
	if !s.r.takes(s.client.Flow().Proto, d.Peer) {
		return false
	}
	src := s.client.Flow()
	f := flow.New(src.Proto, src.Src, d.Peer, src.Attachment)
	if s.r.policy.Load().asksOwner(f) {
		s.lookUpOwner(ctx, f, now)
		f.Who = who(f, s.owner)
	}
	way, size := s.r.way(f, s.owner, &s.asked), d.Segment
	if size == 0 {
		size = len(d.Data)
	}
	var rest []byte
	for data := d.Data; len(data) > 0; data = data[min(size, len(data)):] {
		one := data[:min(size, len(data))]
		answer, wait, mine := s.r.opts.Resolver.Take(f, one, way)
		if !mine {
			rest = append(rest, one...)
			continue
		}
		if wait == nil {
			if answer != nil {
				s.answers = append(s.answers, flow.Datagram{Peer: f.Dst, Data: answer})
			}
			continue
		}
		reply := func(answer []byte) {
			if answer != nil {
				_, _ = s.client.WriteBatch([]flow.Datagram{{Peer: f.Dst, Data: answer}}) // if its device is gone, the reader hears of it
			}
		}
		s.back.Go(func() {
			defer s.r.recovered(s.noEntry(), func() {})
			wait(ctx, reply)
		})
	}
	if len(rest) == 0 {
		return true
	}
	if d.Data = rest; len(rest) <= size {
		d.Segment = 0
	}
	return false
}

// answer gives the client the answers that were there at once, all together.
func (s *source) answer() {
	if len(s.answers) > 0 {
		_, _ = s.client.WriteBatch(s.answers)
		clear(s.answers)
		s.answers = s.answers[:0]
	}
}

// queries answers a client's queries. True: what it sends now is for a server,
// to which it is connected.
func (r *Router) queries(ctx context.Context, e *entry, s flow.Stream, ends *streamEnds) bool {
	query := *e.flow
	way := r.Way(ctx, &query)
	if _, err := way(e.flow.Dst, flow.TCP); err != nil {
		return r.connectServer(ctx, e, s, ends) // it is told as any other flow
	}
	ends.answered = true
	client, err := s.Accept()
	if err != nil {
		e.failed(err)
		e.end(flow.Canceled)
		return false
	}
	ends.accepted(r, client)
	e.path(nil)
	read, pass, err := r.opts.Resolver.Serve(ctx, &query, client, way)
	if !pass {
		e.end(flow.ReasonOf(err))
		return false
	}
	return r.passOn(ctx, e, ends, read)
}

// passOn connects a flow whose client is connected already, and has sent read
// that is for its server.
func (r *Router) passOn(ctx context.Context, e *entry, ends *streamEnds, read []byte) bool {
	verdict, outbound, missing, facts := r.decide(ctx, e)
	from := ""
	if missing != 0 {
		from = heard(facts, sniff.Stream, read)
		verdict, outbound, _ = r.match(facts)
	}
	e.decided(verdict, facts, from)
	return r.connectLate(ctx, e, ends, late{verdict, outbound, read})
}
