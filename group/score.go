package group

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

// Scores, theory of operation.
//
// A path is an outbound (or a group) as a member of groups. What real flows
// and probes tell of it is kept at three levels: it connects, the server's
// first byte comes, a flow is carried whole. A success at one level is one at
// the levels below too, and says nothing of those above: a path that resets
// every flow after 300 kB connects well.
//
// Each level has a share of successes with a half-life of 30 s, and counts the
// failures in a row that were charged to the path. The same is kept for each
// destination of a path, without charges.
//
// Whose failure was it? A failure is charged to the path only if another path
// reached the same destination, at that level, within 10 s before or after; or
// if two destinations failed on it with no success between. Else it is the
// destination's. A refusal, or a denial, is an answer and never a failure of its
// own; it becomes one of the path where another path gets the other answer, for
// two destinations.
//
// Three charges in a row eject a path: for 5 s times the number of ejections
// since it was last good, 60 s at most, ± 20 %. It is back after that time, after
// two good probes, or with a success of that level. Ejected is only an order:
// ejected members are asked last, so that the last one is never lost.

// The levels.
const (
	connects = iota // and passes the proxies' handshakes
	answers         // the server's first byte comes
	carries         // a flow to its end
	levels
)

const (
	halfLife = 30 * time.Second
	// maxGood bounds what a long good time is worth: a path that breaks must
	// fall at once.
	maxGood = 4.0
	// leastBad is what is forgotten of failures when so little is left.
	leastBad = 1.0 / 1024
	// stillMost is for how long what is left of that is that again with one more, at most.
	stillMost = 12 * time.Second
	// together is within which time two paths to one destination are compared.
	together = 10 * time.Second
	// settled is for how long the last success by a path at a destination stands for
	// those that follow. Where all goes well nothing is written for each flow, which
	// the processors would have to hand to each other.
	settled = 100 * time.Millisecond
	// timesEvery is the least time between two connects that are timed, for the same
	// reason.
	timesEvery = 2 * time.Millisecond
	// freshFailure is how long a failure takes away the benefit of the doubt.
	freshFailure = 10 * time.Second

	ejectAfter   = 3
	ejectTime    = 5 * time.Second
	maxEjectTime = time.Minute
	ejectJitter  = 0.2

	maxDests     = 4096
	carriedBytes = 64 << 10 // that a flow must have brought to say something of its path
)

// Scores is what is known of all paths, shared by the groups that use them. Safe
// for concurrent use. Run probes, and tells of spells.
type Scores struct {
	*known
	paths map[string]*path
	order []*path // as they were made
}

// known is what Scores share with those that come after them (Next): the lock,
// too, as what flows of before tell is of paths that both have.
type known struct {
	log   *slog.Logger
	meter dialer.Meter // nil: nobody
	room  Room         // nil: no bound

	mu       sync.Mutex
	attempts attempts
	dests    map[netip.AddrPort]*dest
	good     recent
}

// NewScores returns Scores that know nothing. meter is told of each attempt of a
// race, but for those that another one has ended; nil: nobody is.
func NewScores(log *slog.Logger, meter dialer.Meter) *Scores {
	return &Scores{known: &known{log: log, meter: meter, dests: make(map[netip.AddrPort]*dest)}, paths: make(map[string]*path)}
}

// Next returns Scores for other groups, which know of the outbounds and groups
// that stay what these do, and nothing of any other. Groups that stay need not be
// made again. These go on for the flows that use them.
func (s *Scores) Next(stays func(name string) bool) *Scores {
	next := &Scores{known: s.known, paths: make(map[string]*path)}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.order {
		if stays(p.name) {
			next.paths[p.name] = p
			next.order = append(next.order, p)
		}
	}
	return next
}

// Use is for when these are in force, in place of those that they are the Next
// of: what is known of paths that are not here is forgotten, and the groups say
// how their members are probed.
func (s *Scores) Use(groups []*Group) {
	s.mu.Lock()
	defer s.mu.Unlock()
	here := make(map[*path]bool, len(s.order))
	for _, p := range s.order {
		here[p] = true
		p.probe.interval, p.probe.url = 0, ""
	}
	for _, d := range s.dests {
		maps.DeleteFunc(d.paths, func(p *path, _ *[levels]level) bool { return !here[p] })
	}
	for _, g := range groups {
		g.probes()
	}
}

// Room has places for sockets. A flow has one for its own; what a race opens beside
// it takes more.
type Room interface {
	TakeExtra() bool // false: no attempt is begun beside one that is under way
	GiveExtra()
}

// SetRoom says where extra attempts take their places. Call it before any group is
// used.
func (s *Scores) SetRoom(r Room) { s.room = r }

func (s *Scores) takeExtra() bool { return s.room == nil || s.room.TakeExtra() }

func (s *Scores) giveExtra(n int) {
	for range n {
		if s.room != nil {
			s.room.GiveExtra()
		}
	}
}

// path is what is known of one outbound or group. Under Scores.mu.
type path struct {
	name  string
	out   dialer.Outbound
	level [levels]level

	times    times // of connects
	timedAt  time.Time
	connect  ewma // seconds
	first    ewma // seconds to the first byte
	speed    ewma // bytes a second, of flows that said something
	speedAt  time.Time
	brokenAt int64     // bytes that a flow had brought when it broke; 0: none since carried
	quiet    time.Time // a flow was silent in the middle of something
	used     time.Time // a flow or a probe was sent here
	goodAt   time.Time // a flow was answered or carried
	live     int       // flows

	ejected   time.Time // until
	ejectedBy int       // the level
	ejections int       // since it was last good
	down      string    // why it cannot be used at all; empty: it can
	downSince time.Time

	dials, failures uint64
	hidden          [dialer.HiddenKinds]uint64
	spell           spell
	probe           probeState
}

// level is how often something works.
type level struct {
	ok       share
	row      int       // charged failures with no success since
	failedAt time.Time // the last failure, charged or not; zero: none since the last success
	failedOn netip.Addr
}

// share is the part that went well, of late.
type share struct {
	good, bad float64
	at        time.Time
}

func (s *share) age(now time.Time) {
	if s.at.IsZero() {
		s.at = now
		return
	}
	if d := now.Sub(s.at); d > 0 {
		f := decay(d)
		s.good, s.bad, s.at = s.good*f, s.bad*f, now
	}
}

func (s *share) success(now time.Time) {
	if s.whole() && now.Sub(s.at) < stillMost {
		s.at = now
		return
	}
	s.age(now)
	s.good = min(s.good+1, maxGood)
	if s.bad /= 2; s.bad < leastBad {
		s.bad = 0
	}
}

// whole says whether one more success soon after the last would change nothing.
func (s *share) whole() bool { return s.bad == 0 && s.good == maxGood }

func (s *share) failure(now time.Time) {
	s.age(now)
	s.bad++
}

// value is from 0 to 1; 1 is nothing wrong.
func (s *share) value(now time.Time) float64 {
	if s.bad == 0 {
		return 1
	}
	s.age(now)
	return (1 + s.good) / (1 + s.good + s.bad)
}

func (l *level) success(now time.Time) {
	l.ok.success(now)
	l.row, l.failedAt, l.failedOn = 0, time.Time{}, netip.Addr{}
}

// flawless says the same of all levels up to that one.
func flawless(l *[levels]level, at int) bool {
	for k := range at + 1 {
		if !l[k].ok.whole() || l[k].row > 0 || !l[k].failedAt.IsZero() || l[k].failedOn.IsValid() {
			return false
		}
	}
	return true
}

// dest is what is known of one destination. Under Scores.mu.
type dest struct {
	used   time.Time
	paths  map[*path]*[levels]level
	good   [levels]event // the last success
	failed [levels]event // the last failure that was not charged
}

// goesOn says whether a path has just succeeded there, and no other one waits for news.
func (d *dest) goesOn(p *path, at int, now time.Time) bool {
	for k := range at + 1 {
		failed := d.failed[k].path
		waits := failed != nil && failed != p && now.Sub(d.failed[k].at) <= together
		if waits || d.good[k].path != p || now.Sub(d.good[k].at) >= settled {
			return false
		}
	}
	return true
}

type event struct {
	path *path
	at   time.Time
}

// of returns the path of a member, made at first.
func (s *Scores) of(o dialer.Outbound) *path {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.paths[o.Name()]
	if p == nil {
		p = &path{name: o.Name(), out: o}
		s.paths[p.name] = p
		s.order = append(s.order, p)
	}
	return p
}

// dest returns what is known of a destination, with room for p. Under s.mu.
func (s *Scores) dest(a netip.AddrPort, p *path, now time.Time) (*dest, *[levels]level) {
	d := s.dests[a]
	if d == nil {
		if len(s.dests) >= maxDests {
			s.forgetOne()
		}
		d = &dest{paths: make(map[*path]*[levels]level, 2)}
		s.dests[a] = d
	}
	if now.Sub(d.used) > settled {
		d.used = now
	}
	l := d.paths[p]
	if l == nil {
		l = new([levels]level)
		d.paths[p] = l
	}
	return d, l
}

// forgetOne makes room: the longest unused of a few that chance picks.
func (s *Scores) forgetOne() {
	const few = 8
	var oldest netip.AddrPort
	var used time.Time
	n := 0
	for a, d := range s.dests {
		if n == 0 || d.used.Before(used) {
			oldest, used = a, d.used
		}
		if n++; n == few {
			break
		}
	}
	delete(s.dests, oldest)
}

// succeeded notes a success of p at dst, at a level and those below.
func (s *Scores) succeeded(p *path, dst netip.AddrPort, at int, now time.Time) {
	d, own := s.dest(dst, p, now)
	if d.goesOn(p, at, now) && flawless(own, at) && flawless(&p.level, at) && p.ejections == 0 && p.ejected.IsZero() {
		return
	}
	for k := range at + 1 {
		own[k].success(now)
		d.good[k] = event{p, now}
		// It was not the destination, then.
		if f := d.failed[k]; f.path != nil && f.path != p && now.Sub(f.at) <= together {
			d.failed[k] = event{}
			s.charge(f.path, k, now)
		}
		p.level[k].success(now)
	}
	if at > connects {
		p.goodAt = now
	}
	s.good.add(dst, now)
	if !p.ejected.IsZero() && p.ejectedBy <= at {
		s.back(p, now, "a good flow")
	}
	if p.row() == 0 {
		p.ejections = 0
	}
}

// row is the longest row of charges.
func (p *path) row() int {
	n := 0
	for k := range p.level {
		n = max(n, p.level[k].row)
	}
	return n
}

// failed notes a failure of p at dst, and whose it was.
func (s *Scores) failed(p *path, dst netip.AddrPort, at int, now time.Time) {
	d, own := s.dest(dst, p, now)
	own[at].ok.failure(now)
	own[at].failedAt = now
	l := &p.level[at]
	others := l.failedOn.IsValid() && l.failedOn != dst.Addr() && !l.failedAt.IsZero()
	l.failedAt, l.failedOn = now, dst.Addr()
	good := d.good[at]
	switch {
	case good.path != nil && good.path != p && now.Sub(good.at) <= together, others:
		s.charge(p, at, now)
	default:
		d.failed[at] = event{p, now}
	}
}

// refused notes an answer that another path contradicts: it got a connection.
func (s *Scores) refused(p *path, dst netip.AddrPort, now time.Time) {
	_, own := s.dest(dst, p, now)
	own[connects].ok.failure(now)
	own[connects].failedAt = now
	l := &p.level[connects]
	if l.failedOn.IsValid() && l.failedOn != dst.Addr() {
		s.charge(p, connects, now)
	}
	l.failedOn = dst.Addr()
}

// charge is for a failure that was the path's.
func (s *Scores) charge(p *path, at int, now time.Time) {
	l := &p.level[at]
	l.ok.failure(now)
	l.row++
	if l.failedAt.IsZero() {
		l.failedAt = now
	}
	p.probe.soon(now)
	if l.row < ejectAfter || now.Before(p.ejected) {
		return
	}
	p.ejections++
	wait := scale(min(ejectTime*time.Duration(p.ejections), maxEjectTime), 1+ejectJitter*(2*rand.Float64()-1))
	p.ejected, p.ejectedBy = now.Add(wait), at
	s.log.Warn("outbound ejected", "outbound", p.name, "failures", l.row, "why", levelText[at], "for", wait.Round(time.Millisecond))
}

var levelText = [levels]string{"does not connect", "gets no answer", "breaks flows"}

// back ends an ejection before its time.
func (s *Scores) back(p *path, now time.Time, why string) {
	if now.Before(p.ejected) {
		s.log.Warn("outbound is back", "outbound", p.name, "why", why)
	}
	p.ejected = time.Time{}
}

// connected is the end of an attempt that has connected a flow, and took so long.
func (s *Scores) connected(t *try, dst netip.AddrPort, took time.Duration, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := t.path
	s.attempts.remove(t)
	if now.Sub(p.timedAt) >= timesEvery {
		p.timedAt = now
		p.times.add(took)
		p.connect.add(took.Seconds())
	}
	p.live++
	s.succeeded(p, dst, connects, now)
}

// lost notes what became of the other attempts of a race. answered: some other
// path got a connection, so that a refusal is contradicted.
func (s *Scores) lost(p *path, dst netip.AddrPort, why flow.Reason, answered bool, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if why == flow.Expired {
		return // as the client wanted it
	}
	p.failures++
	if answered {
		s.hide(p, dialer.HiddenDial, now)
	}
	if why != flow.Refused && why != flow.Prohibited {
		s.failed(p, dst, connects, now)
		return
	}
	if answered {
		s.refused(p, dst, now)
	}
}

// report notes what became of a conn.
func (s *Scores) report(p *path, dst netip.AddrPort, o dialer.Outcome) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch o.News {
	case dialer.Answered:
		if o.After > 0 {
			p.first.add(o.After.Seconds())
		}
		s.succeeded(p, dst, answers, now)
	case dialer.Quiet:
		p.quiet = now
	case dialer.Failed:
		s.failed(p, dst, answers, now)
	case dialer.Ended:
		p.live--
		s.ended(p, dst, o, now)
	}
}

// ended looks at a flow that was answered. One that failed before was Failed.
func (s *Scores) ended(p *path, dst netip.AddrPort, o dialer.Outcome, now time.Time) {
	if o.Down == 0 {
		return
	}
	if o.ByServer && (o.Reason == flow.Reset || o.Reason == flow.TimedOut) {
		p.brokenAt = o.Down
		if now.Add(-o.Lasted).Before(p.level[carries].failedAt) {
			// It ran when another one broke: the same fault.
			_, own := s.dest(dst, p, now)
			own[carries].ok.failure(now)
			own[carries].failedAt = now
			return
		}
		s.failed(p, dst, carries, now)
		return
	}
	if o.Reason != flow.Closed || o.Down < carriedBytes {
		return
	}
	const long = 50 * time.Millisecond
	if o.Lasted > long {
		p.speed.add(float64(o.Down) / o.Lasted.Seconds())
		p.speedAt = now
	}
	// One that began before a failure says nothing of what came after.
	began := now.Add(-o.Lasted)
	if o.Down > p.brokenAt && !began.Before(p.level[carries].failedAt) {
		p.brokenAt = 0
		s.succeeded(p, dst, carries, now)
	}
}

// hide counts a failure that the client did not see. Under s.mu.
func (s *Scores) hide(p *path, kind dialer.Hidden, now time.Time) {
	p.hidden[kind]++
	if p.spell.begin(now) {
		s.log.Warn("failures are hidden from clients", "outbound", p.name, "first", kind.String())
	}
}

// Hide counts a failure of an outbound that the client did not see.
func (s *Scores) Hide(outbound string, kind dialer.Hidden) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.paths[outbound]; p != nil {
		s.hide(p, kind, time.Now())
	}
}

// Stats is what is known of one path.
type Stats struct {
	Score         float64       // 0 to 1; 1: nothing has failed of late
	Connect       time.Duration // average; 0: not known
	Ejected       bool
	DialsTotal    uint64 // attempts in races
	FailuresTotal uint64
	HiddenTotal   [dialer.HiddenKinds]uint64 // by dialer.Hidden
}

// Stats returns what is known of each path, by its name.
func (s *Scores) Stats() map[string]Stats {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[string]Stats, len(s.paths))
	for name, p := range s.paths {
		all[name] = Stats{
			Score: p.score(now), Connect: scale(time.Second, p.connect.value), Ejected: now.Before(p.ejected),
			DialsTotal: p.dials, FailuresTotal: p.failures, HiddenTotal: p.hidden,
		}
	}
	return all
}

func (p *path) score(now time.Time) float64 {
	v := 1.0
	for k := range p.level {
		v *= p.level[k].ok.value(now)
	}
	return v
}

// why says in words how the path does.
func (p *path) why(now time.Time) string {
	switch {
	case p.down != "":
		return "down: " + p.down
	case now.Before(p.ejected):
		return fmt.Sprintf("ejected for %v more: %s", p.ejected.Sub(now).Round(time.Second), levelText[p.ejectedBy])
	case p.connect.value == 0:
		return fmt.Sprintf("score %.2f, not connected yet", p.score(now))
	}
	return fmt.Sprintf("score %.2f, connects in %.1f ms", p.score(now), p.connect.value*1000)
}
