package group

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

const (
	tickEvery = 500 * time.Millisecond
	// A path that fails is probed after this time, then each time after twice
	// as long.
	firstProbe, maxProbe = 2 * time.Second, 30 * time.Second
	probeTime            = 5 * time.Second
	goodProbes           = 2
	// goodFor is how long a destination is taken for one that answers.
	goodFor = 5 * time.Minute
)

// probeState is what a path's probes are at. Under Scores.mu.
type probeState struct {
	next    time.Time // zero: the path does not fail
	wait    time.Duration
	good    int // in a row
	running bool

	url      string // of the groups' settings
	interval time.Duration
}

// soon has a path that fails probed.
func (p *probeState) soon(now time.Time) {
	p.good = 0
	if p.next.IsZero() {
		p.wait, p.next = firstProbe, now.Add(firstProbe)
	}
}

// probes has the members probed as the group says: the shortest interval of
// several groups holds. Under Scores.mu.
func (g *Group) probes() {
	for _, m := range g.members {
		p := &m.path.probe
		if i := g.c.Probe.Interval; i > 0 && (p.interval == 0 || i < p.interval) {
			p.interval, p.url = i, g.c.Probe.URL
		}
	}
}

// Run probes paths that fail, and idle ones where a group wants that, and tells
// when a spell of hidden failures is over. It returns when ctx ends, all of its
// probes gone.
func (s *Scores) Run(ctx context.Context) error {
	var probes sync.WaitGroup
	defer probes.Wait()
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, p := range s.due(now) {
				probes.Go(func() { s.probe(ctx, p) })
			}
		}
	}
}

// due returns the paths that are to be probed now, and ends spells.
func (s *Scores) due(now time.Time) (list []*path) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.order {
		if p.spell.over(now) {
			s.log.Warn("no failures are hidden any more", "outbound", p.name, "failures", p.spell.count,
				"lasted", p.spell.last.Sub(p.spell.since).Round(time.Millisecond))
			p.spell = spell{}
		}
		if _, nested := p.out.(*Group); nested || p.probe.running || p.down != "" {
			continue
		}
		failing := !p.probe.next.IsZero() && !now.Before(p.probe.next)
		idle := p.probe.interval > 0 && now.Sub(p.used) >= p.probe.interval
		if failing || idle {
			p.probe.running = true
			list = append(list, p)
		}
	}
	return list
}

// probe asks one path for something that is good elsewhere.
func (s *Scores) probe(ctx context.Context, p *path) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	s.mu.Lock()
	url := p.probe.url
	dst, known := s.good.newest(time.Now())
	s.mu.Unlock()
	began := time.Now()
	var err error
	switch {
	case url != "":
		err = fetch(ctx, p.out, url)
	case known:
		err = connect(ctx, p.out, dst)
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	p.probe.running, p.used = false, now
	if url == "" && !known || blameless(err) || isAnswer(err) {
		s.probeAgain(p, now)
		return
	}
	if err != nil {
		p.probe.good = 0
		if p.probe.next.IsZero() { // an idle path: the first sign of it
			p.level[connects].failedAt = now
			s.charge(p, connects, now)
		}
		s.probeAgain(p, now)
		s.log.Debug("probe failed", "outbound", p.name, "err", err)
		return
	}
	if url == "" {
		p.times.add(now.Sub(began))
		p.connect.add(now.Sub(began).Seconds())
	}
	p.probe.good++
	if p.probe.good < goodProbes {
		p.probe.next = now.Add(firstProbe)
		return
	}
	p.probe.next = time.Time{}
	s.forgive(p, now)
	if p.ejectedBy != carries {
		s.back(p, now, "good probes")
	}
}

// forgive forgets that p did not connect and was not answered: it is another
// path now. Under s.mu.
func (s *Scores) forgive(p *path, now time.Time) {
	for k := connects; k <= answers; k++ {
		p.level[k].success(now)
		p.level[k].ok.bad = 0
		for _, d := range s.dests {
			if own := d.paths[p]; own != nil {
				own[k].ok.bad = 0
			}
		}
	}
}

// probeAgain has a path that fails probed later, twice as late each time.
func (s *Scores) probeAgain(p *path, now time.Time) {
	if p.probe.next.IsZero() {
		return
	}
	p.probe.wait = min(2*p.probe.wait, maxProbe)
	p.probe.next = now.Add(p.probe.wait)
}

func (r *recent) newest(now time.Time) (dst netip.AddrPort, ok bool) {
	var best time.Time
	for _, e := range r.list {
		if e.at.After(best) {
			dst, best = e.dst, e.at
		}
	}
	return dst, !best.IsZero() && now.Sub(best) < goodFor
}

func connect(ctx context.Context, o dialer.Outbound, dst netip.AddrPort) error {
	c, err := o.DialStream(ctx, dialer.Target{Addr: dst})
	if err != nil {
		return err
	}
	_ = c.Close()
	return nil
}

// fetch gets a URL through an outbound. Its name is resolved by the host's
// resolver. Any answer below 500 is good.
func fetch(ctx context.Context, o dialer.Outbound, url string) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			host, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			return dialName(ctx, o, host, port)
		},
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil && err != io.EOF {
		return err
	}
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("probe got %s", resp.Status)
	}
	return nil
}

func dialName(ctx context.Context, o dialer.Outbound, host, port string) (net.Conn, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		var c *dialer.Conn
		if c, err = o.DialStream(ctx, dialer.Target{Addr: netip.AddrPortFrom(a.Unmap(), uint16(n))}); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// stater is an outbound that knows whether it can be used at all.
type stater interface {
	State() (up bool, reason string)
}

// Recheck asks all outbounds whether they can be used at all: call it when links,
// addresses or routes have changed. Attempts on one that cannot end at once.
func (s *Scores) Recheck() {
	s.mu.Lock()
	paths := append([]*path(nil), s.order...)
	s.mu.Unlock()
	for _, p := range paths {
		o, ok := p.out.(stater)
		if !ok {
			continue
		}
		up, why := o.State()
		if up {
			why = ""
		}
		s.setDown(p, why)
	}
}

// setDown notes why a path cannot be used; empty: it can.
func (s *Scores) setDown(p *path, why string) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	was := p.down
	p.down = why
	switch {
	case why == "" && was != "":
		s.log.Warn("outbound is up", "outbound", p.name)
		s.forgive(p, now) // what failed may have failed for this
		if p.ejectedBy != carries {
			p.ejected = time.Time{}
		}
	case why != "":
		if was == "" {
			p.downSince = now
			s.log.Warn("outbound is down", "outbound", p.name, "why", why)
		}
		s.endAll(p, &dialer.Cause{Reason: flow.NetUnreachable, Why: "path lost: " + why})
	}
}
