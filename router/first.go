package router

import (
	"context"
	"errors"
	"slices"
	"time"

	"cgtun/flow"
	"cgtun/rules"
	"cgtun/sniff"
)

// Where a rule hangs on a name that the DNS did not tell, the client is accepted
// before its outbound is asked, and what it sends first is looked at. Only then:
// a client that is accepted learns of its server's refusal by a reset alone.

const (
	// firstWithin is how long a client may take to say something. One that
	// waits for its server has no name.
	firstWithin = 300 * time.Millisecond
	fromDNS     = "dns"
)

// late is what a flow is connected by whose client is connected already.
type late struct {
	verdict rules.Verdict
	out     out
	read    []byte // what the client has sent
}

// acceptFirst is connect for a flow whose name only its client can tell.
func (r *Router) acceptFirst(ctx context.Context, e *entry, s flow.Stream, ends *streamEnds, facts *rules.Facts) bool {
	r.counts.acceptedFirst.Add(1)
	ends.answered = true
	client, err := s.Accept()
	if err != nil {
		e.failed(err)
		e.end(flow.Canceled)
		return false
	}
	ends.accepted(r, client)
	read, from := readFirst(ctx, client, facts)
	verdict, outbound, _ := r.match(facts)
	e.decided(verdict, facts, from)
	return r.connectLate(ctx, e, ends, late{verdict, outbound, read})
}

// readFirst reads from a client until the name is told, or will not be.
func readFirst(ctx context.Context, client flow.Conn, facts *rules.Facts) (read []byte, from string) {
	stop := context.AfterFunc(ctx, func() { _ = client.SetReadDeadline(flow.Past) })
	defer func() {
		stop()
		_ = client.SetReadDeadline(time.Time{})
	}()
	if client.SetReadDeadline(time.Now().Add(firstWithin)) != nil {
		facts.Known |= rules.FactName
		return nil, ""
	}
	buf := make([]byte, sniff.MaxStream)
	n := 0
	for n < len(buf) {
		m, err := client.Read(buf[n:])
		n += m
		if _, _, told := sniff.Stream(buf[:n]); err != nil || !errors.Is(told, sniff.ErrShort) {
			break
		}
	}
	return buf[:n:n], heard(facts, sniff.Stream, buf[:n])
}

// heard is the last word on a name: the one in what the client sends, or else the
// one that the DNS told.
func heard(facts *rules.Facts, look func([]byte) (name, from string, err error), data []byte) (from string) {
	facts.Known |= rules.FactName
	name, from, err := look(data)
	if err != nil {
		return ""
	}
	facts.Name = name
	return from
}

// nameIn finds the name in the first datagrams of a flow. short: it may be in one
// that follows.
func nameIn(facts *rules.Facts, held [][]byte) (from string, short bool) {
	if facts.Flow.Proto != flow.UDP {
		facts.Known |= rules.FactName
		return "", false
	}
	from = heard(facts, func([]byte) (string, string, error) {
		name, err := sniff.Datagrams(held...)
		short = errors.Is(err, sniff.ErrShort)
		return name, sniff.FromQUIC, err
	}, nil)
	return from, short
}

// What is held of a flow before something is decided. There is no timer: a
// client that gets no answer sends again.
const (
	maxHeld      = 8
	maxHeldBytes = 16 << 10
)

// hear looks at one of the first datagrams of a client to a peer for the name
// that a rule hangs on, and sends all of them as soon as it is decided.
func (s *source) hear(ctx context.Context, p *peer, d *flow.Datagram, now time.Time) {
	one := *d
	one.Data = slices.Clone(d.Data)
	p.held = append(p.held, one)
	var all [][]byte
	bytes := 0
	for i := range p.held {
		all = append(all, p.held[i].Data)
		bytes += len(p.held[i].Data)
	}
	s.lookUpOwner(ctx, p.e.flow, now)
	facts := p.e.facts(s.owner)
	from, short := nameIn(facts, all)
	if short && len(p.held) < maxHeld && bytes < maxHeldBytes && now.Sub(p.since) < firstWithin {
		return
	}
	held := p.held
	p.held = nil
	verdict, outbound, _ := s.r.match(facts)
	s.settle(ctx, p, facts, from, verdict, outbound, now)
	p.e.up.Add(int64(bytes))
	if p.out == nil {
		s.unreachable(d.Peer, p.tell, nil)
	}
	s.send(p.out, held)
}

// connectLate connects a flow whose client is connected already. If it returns
// false, the client was reset and the flow has ended.
func (r *Router) connectLate(ctx context.Context, e *entry, ends *streamEnds, l late) bool {
	if err := r.dialLate(ctx, e, ends, l); err != nil {
		e.failed(err)
		_ = ends.client.Reset()
		e.end(flow.ReasonOf(err))
		return false
	}
	return true
}

func (r *Router) dialLate(ctx context.Context, e *entry, ends *streamEnds, l late) error {
	if l.out.Outbound == nil {
		_, why := r.refusal(l.verdict, flow.TCP)
		return &denied{why}
	}
	if err := r.judge(e, l.out.leaves); err != nil {
		return err
	}
	began := time.Now()
	server, err := r.dial(ctx, e, l.out, ends)
	e.dialled(began, err)
	if err != nil {
		return err
	}
	ends.server, ends.by, ends.since = server, l.out.Outbound, time.Now()
	ends.how.First = l.read
	if k := flow.Socket(server.Conn); k != nil {
		e.watchSocket(k)
	}
	e.path(server.Path)
	return nil
}
