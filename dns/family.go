package dns

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
)

// Addresses to which no outbound has a way are left out of answers, where the name
// has others: the capture has a route for both families, so that programs would
// try them, and some try no more than the first. Where there are no others they
// stay, and the client learns that there is no way.

// families is what is known of each, for a moment. Safe for concurrent use.
type families struct{ v4, v6 atomic.Pointer[carried] }

type carried struct {
	by    *settings
	until time.Time
	ok    bool
}

// familyFor is how long it is known.
const familyFor = time.Second

// What stands for far away: addresses for documentation (RFC 5737, RFC 3849).
var (
	far4 = netip.MustParseAddr("192.0.2.1")
	far6 = netip.MustParseAddr("2001:db8:ffff::1")
)

// carries says whether some outbound has a way to an address.
func (s *settings) carries(a netip.Addr) bool {
	for _, o := range s.outbounds {
		if dialer.Carries(o, a) {
			return true
		}
	}
	return false
}

// useless says whether an answer has addresses, and no outbound a way to any.
func (r *Resolver) useless(s *settings, a *answer, now time.Time) bool {
	if len(a.addrs) == 0 {
		return false
	}
	known, far := &r.families.v4, far4
	if a.addrs[0].Is6() {
		known, far = &r.families.v6, far6
	}
	family := known.Load()
	if family == nil || family.by != s || now.After(family.until) {
		family = &carried{s, now.Add(familyFor), s.carries(far)}
		known.Store(family)
	}
	if family.ok {
		return false
	}
	for _, addr := range a.addrs[:min(len(a.addrs), maxOfAnswer)] {
		if !addr.IsGlobalUnicast() || s.carries(addr) {
			return false
		}
	}
	return true
}

// rendered is what the client is told, age seconds after it came.
func (p *put) rendered(ctx context.Context, a *answer, age uint32) []byte {
	if p.r.useless(p.s, a, time.Now()) && p.other(ctx) {
		return p.q.failed(wire.RcodeSuccess).render(&p.q, 0, false)
	}
	return p.r.give(p.f, p.by, &p.q, a, age, false)
}

// other says whether the name has addresses of the other family that are of use.
func (p *put) other(ctx context.Context) bool {
	o := &put{r: p.r, s: p.s, f: p.f, by: p.by, q: p.q, way: p.way}
	switch p.q.kind {
	case wire.TypeA:
		o.q.kind = wire.TypeAAAA
	case wire.TypeAAAA:
		o.q.kind = wire.TypeA
	default:
		return false
	}
	if o.choose() != nil {
		return false
	}
	var a *answer
	if entry := p.r.cache.get(o.key, time.Now()); entry != nil && entry.fresh(time.Now()) {
		a = entry.a
	} else {
		a = o.answer(ctx)
	}
	return a != nil && a.final() && len(a.addrs) > 0 && !p.r.useless(p.s, a, time.Now())
}
