package dns

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
	"cgtun/flow"
)

const (
	// staleAfter is how long a client waits before it gets an old answer
	// (RFC 8767 §5).
	staleAfter = 1800 * time.Millisecond
	// giveUp is when a question that nobody answers has failed: before the
	// client's own patience, which is 5 s mostly (resolv.conf(5)).
	giveUp = 4500 * time.Millisecond
	// recheck is how long old answers are given at once after nobody answered
	// (RFC 8767 §5).
	recheck = 30 * time.Second
	// elsewhereTTL is the most that an answer of another server than the one
	// that was asked is kept for: that one may know better.
	elsewhereTTL = 60 * time.Second
)

// put is one question of one client.
type put struct {
	r   *Resolver
	s   *settings
	f   *flow.Flow
	by  netip.Addr // see take
	q   query
	way Way

	servers []*server // of the configuration; nil: the one that was asked
	first   dialer.Outbound
	key     string
	old     *cached // nil: there is none
	fresh   *cached // nil: it is to be asked for
}

// own copies what points into the client's message.
func (p *put) own() {
	p.q.name, p.q.options = slices.Clone(p.q.name), slices.Clone(p.q.options)
}

// choose finds whom to ask, and the key of the answer. The error says that the
// rules do not let the client ask the server.
func (p *put) choose() (err error) {
	if scope, servers := p.s.serversFor(&p.q); servers != nil {
		p.servers, p.key = servers, p.q.key(scope)
		return nil
	}
	asked := p.f.Dst
	if stub(asked.Addr()) {
		// Its questions would go out by themselves: what it asks is asked.
		if real := p.r.host.servers(time.Now()); len(real) > 0 && !stub(real[0].Addr()) {
			p.servers = hostServers(real)
			p.key = p.q.key(scopeOf(p.servers))
			return nil
		}
	}
	scope := asked.String()
	if p.first, err = p.way(asked, flow.UDP); err != nil {
		return err
	}
	if local(asked.Addr()) && !slices.Contains(p.r.host.servers(time.Now()), asked) {
		scope += " " + p.f.Attachment // the address may mean another server elsewhere
	}
	p.key = p.q.key(scope + " " + p.first.Name())
	return nil
}

// direct is the name of the outbound that there always is.
const direct = "direct"

// serversFor returns the servers that the configuration has for a name.
func (s *settings) serversFor(q *query) (scope string, servers []*server) {
	if len(s.routes) > 0 {
		name := q.text()
		for i := range s.routes {
			if s.routes[i].has(name) {
				return s.routes[i].scope, s.routes[i].servers
			}
		}
	}
	return s.scope, s.servers
}

func (r *route) has(name string) bool {
	for _, suffix := range r.suffixes {
		if rest, ok := strings.CutSuffix(name, suffix); ok && (rest == "" || suffix == "" || strings.HasSuffix(rest, ".")) {
			return true
		}
	}
	return false
}

func hostServers(addrs []netip.AddrPort) (all []*server) {
	for _, a := range addrs {
		all = append(all, &server{scheme: "udp", addr: a})
	}
	return all
}

// maxPaths bounds the paths of a question.
const maxPaths = 16

// paths lists whom to ask and by what, the preferred one first: a server by each
// member of a group before the next server.
func (p *put) paths(ctx context.Context) (all []path) {
	for _, one := range p.servedBy(ctx) {
		all = append(all, one.each()...)
	}
	return all[:min(len(all), maxPaths)]
}

// members is what groups are: any of several outbounds.
type members interface {
	Order() []string     // as they would be asked now
	Outbounds() []string // each once, those of groups inside as well
}

// each returns the paths to one server: of a datagram that a group's best member
// loses nobody else hears.
func (p *path) each() []path {
	g, ok := p.out.(members)
	if !ok || p.scheme == "https" {
		p.beside = 1
		return []path{*p}
	}
	order, names := g.Order(), slices.Clone(g.Outbounds())
	slices.SortStableFunc(names, func(a, b string) int { return slices.Index(order, a) - slices.Index(order, b) })
	var all []path
	for _, name := range names {
		one := *p
		one.member, one.beside = name, len(names)
		one.avoid = slices.DeleteFunc(slices.Clone(names), func(o string) bool { return o == name })
		all = append(all, one)
	}
	return all
}

// servedBy lists the servers, each with its outbound.
func (p *put) servedBy(ctx context.Context) (all []path) {
	if p.servers != nil {
		for _, s := range p.servers {
			all = p.addServer(ctx, all, s)
		}
		return all
	}
	asked := &server{scheme: "udp", addr: p.f.Dst, asked: true}
	all = append(all, path{server: asked, out: p.first, client: p.f})
	for _, s := range hostServers(p.r.host.servers(time.Now())) {
		if s.addr == asked.addr && (p.first.Name() == direct || !local(s.addr.Addr())) {
			continue
		}
		all = p.addServer(ctx, all, s)
	}
	return all
}

// addServer adds a server of the configuration or of this machine, if the rules
// have a way to it.
func (p *put) addServer(ctx context.Context, all []path, s *server) []path {
	switch {
	case s.outbound != "":
		if out := p.s.outbounds[s.outbound]; out != nil {
			all = append(all, path{server: s, out: out})
		}
	case local(s.addr.Addr()):
		all = append(all, path{server: s, out: p.s.outbounds[direct]})
	default:
		addr, proto := s.addr, flow.TCP
		if s.scheme == "udp" {
			proto = flow.UDP
		}
		if s.host != "" {
			addrs, err := p.r.web.look(ctx, s.host)
			if err != nil || len(addrs) == 0 {
				return all
			}
			addr = netip.AddrPortFrom(addrs[0].Unmap(), addr.Port())
		}
		if out, err := p.way(addr, proto); err == nil {
			all = append(all, path{server: s, out: out})
		}
	}
	return all
}

// wait answers a question that the cache does not.
func (p *put) wait(ctx context.Context, reply func([]byte)) {
	defer p.r.waiting.give(clientOf(p.f))
	ctx, cancel := context.WithTimeout(ctx, giveUp)
	defer cancel()
	replied := false
	say := func(b []byte) {
		if !replied {
			replied = true
			reply(b)
		}
	}
	if p.fresh != nil {
		p.r.counts.cached.Add(1)
		say(p.rendered(ctx, p.fresh.a, uint32(time.Since(p.fresh.came)/time.Second)))
		return
	}
	if p.old != nil {
		if p.r.flights.failedLately(p.key, time.Now()) {
			p.sayOld(say)
			return
		}
		done := make(chan struct{})
		late := time.NewTimer(staleAfter)
		defer late.Stop()
		var a *answer
		go func() {
			defer close(done)
			a = p.answer(ctx)
		}()
		select {
		case <-done:
		case <-late.C:
			p.sayOld(say)
			<-done
		}
		p.finish(ctx, a, say)
		return
	}
	p.finish(ctx, p.answer(ctx), say)
}

func (p *put) sayOld(say func([]byte)) {
	p.r.counts.stale.Add(1)
	p.r.counts.hidden.Add(1)
	say(p.r.give(p.f, p.by, &p.q, p.old.a, 0, true))
	p.old = nil
}

// finish gives the client what there is: nil if nobody answered.
func (p *put) finish(ctx context.Context, a *answer, say func([]byte)) {
	switch {
	case a != nil && a.final():
		p.r.counts.answered.Add(1)
		say(p.rendered(ctx, a, 0))
	case p.old != nil:
		p.sayOld(say)
	case a != nil:
		p.r.counts.failed.Add(1)
		say(a.render(&p.q, 0, false))
	default:
		p.r.counts.failed.Add(1)
		say(p.q.failed(wire.RcodeServerFailure).render(&p.q, 0, false))
	}
}

// answer asks, or waits for who asks the same already; nil: nobody answered.
func (p *put) answer(ctx context.Context) *answer {
	return p.r.flights.do(ctx, p.key, func() *answer {
		a, elsewhere := p.r.race(ctx, clientOf(p.f), p.paths(ctx), &p.q)
		if a == nil || !a.final() {
			return a
		}
		ttl := time.Duration(a.ttl) * time.Second
		if elsewhere {
			ttl = min(ttl, elsewhereTTL)
		}
		if ttl > 0 {
			p.r.cache.put(&cached{key: p.key, a: a, came: time.Now(), ttl: ttl})
		}
		return a
	})
}
