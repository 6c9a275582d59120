package dns

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
	"cgtun/flow"
)

// Options are what a Resolver needs, and its bounds; zero values mean the
// defaults.
type Options struct {
	Logger *slog.Logger
	// Roots are the authorities for tls and https; nil: the system's.
	Roots *x509.CertPool
	// Waiting is how many queries wait for upstreams at a time: 4,096. Others
	// are dropped, as a full socket buffer would drop them. One client, a source
	// address of an attachment, has half of them at most, and less the fewer are
	// left.
	Waiting int
	// InFlight is how many upstream questions there are at a time: 512, shared
	// out in the same way. Others wait for one to end.
	InFlight int

	host *host // tests
}

// Way says which outbound the rules give to what a client sends to an address.
// The error has a flow.Reason: Prohibited, or Dropped, where they give it none.
type Way = func(netip.AddrPort, flow.Proto) (dialer.Outbound, error)

// Resolver answers queries. Safe for concurrent use. Nothing is to be closed but
// by Run.
type Resolver struct {
	opts     Options
	log      *slog.Logger
	now      atomic.Pointer[settings]
	cache    *cache
	names    *names
	flights  flights
	health   health
	families families
	host     *host
	web      web
	asking   *shares // a place for each upstream question
	waiting  *shares // and for each query that waits for them
	counts   counts
}

type counts struct {
	queries, cached, stale, answered, failed, refused, dropped, strange, passed, hidden atomic.Uint64
}

// Counters count from the start. Queries is the sum of those that follow it but
// Strange and Hidden.
type Counters struct {
	Queries  uint64
	Cached   uint64 // answered from the cache, or from the configuration
	Stale    uint64 // with an answer that was too old, for want of another
	Answered uint64 // by an upstream
	Failed   uint64 // nobody had an answer
	Refused  uint64 // a rule did not let it
	Dropped  uint64 // for want of room
	Strange  uint64 // answers that were not to our question
	Passed   uint64 // messages to port 53 that went on as flows
	Hidden   uint64 // an upstream failed, and the client did not see it
}

// settings are what Reload swaps: immutable.
type settings struct {
	on        bool
	servers   []*server // none: the one that was asked
	scope     string    // of servers, see scopeOf
	routes    []route
	outbounds map[string]dialer.Outbound
	hosts     map[string][]netip.Addr
}

type route struct {
	suffixes []string
	servers  []*server
	scope    string
}

// New returns a Resolver that answers nothing before Reload.
func New(o Options) *Resolver {
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if o.Waiting == 0 {
		o.Waiting = 4096
	}
	if o.InFlight == 0 {
		o.InFlight = 512
	}
	if o.host == nil {
		o.host = newHost()
	}
	r := &Resolver{
		opts: o, log: o.Logger, cache: newCache(0), names: newNames(), host: o.host,
		flights: flights{calls: map[string]*flight{}}, health: health{known: map[healthKey]*condition{}},
		asking: newShares(o.InFlight), waiting: newShares(o.Waiting),
	}
	r.web = web{roots: o.Roots, clients: map[webKey]*http.Client{}, look: func(ctx context.Context, host string) ([]netip.Addr, error) {
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}}
	r.now.Store(&settings{})
	return r
}

// Reload puts a valid configuration in force for the queries that come from now
// on, with the outbounds that it names. What is in the cache stays if the
// upstreams do.
func (r *Resolver) Reload(c Config, outbounds map[string]dialer.Outbound) {
	s := &settings{on: c.Mode == ModeForward, outbounds: outbounds, hosts: map[string][]netip.Addr{}}
	s.servers = serversOf(c.Upstreams, c.Outbound)
	s.scope = scopeOf(s.servers)
	for _, one := range c.Route {
		way := one.Outbound
		if way == "" {
			way = c.Outbound
		}
		servers := serversOf(one.Upstreams, way)
		to := route{servers: servers, scope: scopeOf(servers)}
		for _, text := range one.DomainSuffix {
			if suffix, err := flow.PlainSuffix(text); err == nil {
				to.suffixes = append(to.suffixes, suffix)
			}
		}
		s.routes = append(s.routes, to)
	}
	for text, addrs := range c.Hosts {
		if name, err := flow.PlainName(text); err == nil {
			s.hosts[name] = addrs
		}
	}
	r.now.Store(s)
	r.cache.resize(c.Cache)
	r.web.close()
}

// scopeOf tells servers apart in the keys of answers: what others have said is
// not theirs. Short, as each answer has it.
func scopeOf(servers []*server) string {
	h := sha256.New()
	for _, s := range servers {
		fmt.Fprintf(h, "%q by %q\n", s.id(), s.outbound)
	}
	const size = 16
	return string(h.Sum(nil)[:size])
}

// serversOf reads upstreams that Validate has seen.
func serversOf(upstreams []string, outbound string) (all []*server) {
	for _, text := range upstreams {
		u, err := url.Parse(text)
		if err != nil {
			continue
		}
		s := &server{scheme: u.Scheme, name: u.Fragment, outbound: outbound}
		number := map[string]uint64{"tls": 853, "https": 443}[u.Scheme]
		if number == 0 {
			number = port
		}
		if p, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
			number = p
		}
		addr, err := netip.ParseAddr(u.Hostname())
		if err != nil {
			s.host = u.Hostname()
		}
		s.addr = netip.AddrPortFrom(addr.Unmap(), uint16(number))
		if u.Scheme == "https" {
			s.url = text
		}
		all = append(all, s)
	}
	return all
}

// Run waits until ctx ends, and closes the connections to upstreams then. By
// that time nobody is to wait for an answer.
func (r *Resolver) Run(ctx context.Context) error {
	<-ctx.Done()
	r.web.close()
	return nil
}

// Counters returns a snapshot.
func (r *Resolver) Counters() Counters {
	c := &r.counts
	return Counters{
		Queries: c.queries.Load(), Cached: c.cached.Load(), Stale: c.stale.Load(), Answered: c.answered.Load(), Failed: c.failed.Load(),
		Refused: c.refused.Load(), Dropped: c.dropped.Load(), Strange: c.strange.Load(), Passed: c.passed.Load(), Hidden: c.hidden.Load(),
	}
}

// Name returns the name under which the client got the flow's destination last,
// in lower case without the last dot; "" if it did not get it here. It is not
// sure if the client has got the same address under another name lately. It is the
// client's own if it, and not another one of its address, has asked for it.
func (r *Resolver) Name(f *flow.Flow) (name string, sure, own bool) {
	return r.names.find(f.Attachment, f.Src.Addr(), f.Dst.Addr(), f.Who, time.Now())
}

// Forget drops what is remembered of an attachment that has ended.
func (r *Resolver) Forget(attachment string) { r.names.forget(attachment) }

// Takes says whether what clients send to an address is looked at.
func (r *Resolver) Takes(dst netip.AddrPort) bool { return dst.Port() == port && r.now.Load().on }

// Take looks at a message that a client sent to port 53 of f.Dst. If it is not
// mine it is to go on as a flow. Otherwise answer has the answer to be sent, nil:
// none. If wait is not nil it is to be called instead, outside of the goroutine
// that reads from the client: it calls reply, once at most, with the answer,
// and returns at the latest when ctx ends. msg is not kept, answers are the
// caller's.
func (r *Resolver) Take(f *flow.Flow, msg []byte, way Way) (answer []byte, wait func(ctx context.Context, reply func([]byte)), mine bool) {
	return r.take(f, f.Src.Addr().Unmap(), msg, way)
}

// take is Take for a client that is known to names as by.
func (r *Resolver) take(f *flow.Flow, by netip.Addr, msg []byte, way Way) (answer []byte, wait func(ctx context.Context, reply func([]byte)), mine bool) {
	s := r.now.Load()
	if !s.on {
		return nil, nil, false
	}
	q, ok := parseQuery(msg, f.Proto == flow.TCP)
	if !ok {
		r.counts.passed.Add(1)
		return nil, nil, false
	}
	r.counts.queries.Add(1)
	if a := s.fixed(&q); a != nil {
		r.counts.cached.Add(1)
		return r.give(f, by, &q, a, 0, false), nil, true
	}
	put := &put{r: r, s: s, f: f, by: by, q: q, way: way}
	if err := put.choose(); err != nil {
		r.counts.refused.Add(1)
		if flow.ReasonOf(err) == flow.Dropped {
			return nil, nil, true
		}
		return q.failed(wire.RcodeRefused).render(&q, 0, false), nil, true
	}
	now := time.Now()
	if entry := r.cache.get(put.key, now); entry != nil {
		switch {
		case !entry.fresh(now):
			put.old = entry
		case r.useless(s, entry.a, now):
			put.fresh = entry
		default:
			r.counts.cached.Add(1)
			return r.give(f, by, &q, entry.a, uint32(now.Sub(entry.came)/time.Second), false), nil, true
		}
	}
	if !r.waiting.take(clientOf(f)) {
		r.counts.dropped.Add(1)
		return nil, nil, true
	}
	put.own()
	return nil, put.wait, true
}

// give renders an answer for a client, and remembers what it was told.
func (r *Resolver) give(f *flow.Flow, by netip.Addr, q *query, a *answer, age uint32, stale bool) []byte {
	if len(a.addrs) > 0 {
		r.names.note(f.Attachment, by, f.Who, a.name, a.addrs, time.Duration(a.ttl)*time.Second, time.Now())
	}
	return a.render(q, age, stale)
}
