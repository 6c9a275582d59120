package group_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
)

// pair is two paths in a group whose Scores run until the test ends.
type pair struct {
	*testing.T
	a, b *fake
	s    *group.Scores
	g    *group.Group
}

func withPair(t *testing.T, kind string, f func(p *pair)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := &pair{T: t, a: &fake{name: "a", connect: in(10 * ms)}, b: &fake{name: "b", connect: in(20 * ms)}, s: board(t)}
		p.g = newGroup(t, settings(kind), p.s, p.a, p.b)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- p.s.Run(ctx) }()
		f(p)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// flow dials and says how the flow ended.
func (p *pair) flow(target dialer.Target, end dialer.Outcome) (by string) {
	p.Helper()
	c, err := p.g.DialStream(context.Background(), target)
	if err != nil {
		p.Fatal(err)
	}
	if end.Down > 0 {
		c.Tell(dialer.Outcome{News: dialer.Answered})
	}
	c.Tell(end)
	_ = c.Close()
	return c.Path[0]
}

var (
	whole  = dialer.Outcome{News: dialer.Ended, Reason: flow.Closed, Up: 100, Down: 1 << 20}
	broken = dialer.Outcome{News: dialer.Ended, Reason: flow.Reset, ByServer: true, Up: 100, Down: 300_000, Lasted: ms}
)

func (p *pair) score(name string) group.Stats { return p.s.Stats()[name] }

// TestAllDeadThenBack is W5: all paths are dead for 20 s. None is lost to the
// group, and the first connect after their return takes no longer than usual.
func TestAllDeadThenBack(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		p.flow(dst(1), whole)
		p.flow(dst(1), whole)
		dead := time.Now().Add(20 * time.Second)
		// A packet that is sent into the hole is sent again, as the kernel does.
		hole := func(netip.AddrPort) (time.Duration, error) {
			wait := ms
			for _, again := range []time.Duration{time.Second, 3 * time.Second, 7 * time.Second} {
				if time.Now().Add(wait).After(dead) {
					break
				}
				wait = again
			}
			if time.Now().Add(wait).Before(dead) {
				wait = never
			}
			return wait, nil
		}
		p.a.set(hole)
		p.b.set(hole)
		waiting := make(chan time.Duration)
		for i := range 5 {
			go func() {
				_, took, err := dial(t, p.g, dst(i))
				if err != nil {
					t.Errorf("a flow that waits for a path: %v", err)
				}
				waiting <- took
			}()
		}
		time.Sleep(20*time.Second + ms)
		if _, took, err := dial(t, p.g, dst(9)); took > time.Second || err != nil {
			t.Errorf("the first connect after the return took %v, %v", took, err)
		}
		for range 5 {
			if took := <-waiting; took > 23*time.Second {
				t.Errorf("a flow that waited got its connection after %v", took)
			}
		}
	})
}

// TestDestinationRefusesEverywhere is W6: no path is blamed.
func TestDestinationRefusesEverywhere(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		p.a.set(says(ms, errRefused))
		p.b.set(says(ms, errRefused))
		for i := range 20 {
			if _, took, err := dial(t, p.g, dst(i)); reasonOf(err) != flow.Refused || took > 10*ms {
				t.Fatalf("after %v: %v", took, err)
			}
		}
		for _, name := range []string{"a", "b"} {
			if s := p.score(name); s.Score != 1 || s.Ejected {
				t.Errorf("%s: %+v", name, s)
			}
		}
	})
}

// TestProbeBlamesNobody: a client that counts routers hears of the one that he
// has reached, and no path is worse for it.
func TestProbeBlamesNobody(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		p.a.set(says(ms, errExpired))
		p.b.set(says(ms, errExpired))
		for i := range 20 {
			_, took, err := dial(t, p.g, dst(i))
			if said := flow.Said(err); reasonOf(err) != flow.Expired || took > 10*ms || said == nil || said.Type != 11 {
				t.Fatalf("after %v: %v", took, err)
			}
		}
		for _, name := range []string{"a", "b"} {
			if s := p.score(name); s.Score != 1 || s.Ejected {
				t.Errorf("%s: %+v", name, s)
			}
		}
	})
}

// TestRefusalOfOnePath: who refuses what the other connects is leaving the race,
// as soon as it is not one destination alone.
func TestRefusalOfOnePath(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		p.a.set(says(ms, errRefused))
		for i := range 20 {
			if by, _, err := dial(t, p.g, dst(i)); by != "b" || err != nil {
				t.Fatalf("%q, %v", by, err)
			}
		}
		if n := p.a.asked(); n > 3 {
			t.Errorf("it was asked %d times", n)
		}
	})
}

// TestDeadDestination: one that no path reaches blames none, whoever asks for it
// and how often.
func TestDeadDestination(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		good := in(10 * ms)
		net := func(d netip.AddrPort) (time.Duration, error) {
			if d == dst(13).Addr {
				return never, nil
			}
			return good(d)
		}
		p.a.set(net)
		p.b.set(net)
		for i := range 5 {
			if _, _, err := dial(t, p.g, dst(13)); reasonOf(err) != flow.TimedOut {
				t.Fatal(err)
			}
			if _, took, err := dial(t, p.g, dst(i)); took > 100*ms || err != nil {
				t.Errorf("another destination: %v, %v", took, err)
			}
		}
		for _, name := range []string{"a", "b"} {
			if s := p.score(name); s.Ejected {
				t.Errorf("%s: %+v", name, s)
			}
		}
	})
}

// TestBrokenFlows: a path that resets flows in their midst is left, though its
// connects succeed, and though it is the quicker one.
func TestBrokenFlows(t *testing.T) {
	for _, kind := range []string{group.TypeRace, group.TypeFallback, group.TypeBalance} {
		t.Run(kind, func(t *testing.T) {
			withPair(t, kind, func(p *pair) {
				for range 5 {
					p.flow(dst(1), whole)
				}
				first := p.flow(dst(1), whole)
				if by := p.flow(dst(1), broken); by != first {
					t.Fatalf("%q", by)
				}
				for range 5 {
					if by := p.flow(dst(1), whole); by == first {
						t.Errorf("a flow was given to %q again", by)
					}
				}
			})
		})
	}
}

// TestTheLastToBreakIsLeft: a path that has broken many flows a while ago is better
// than one that has just broken its first.
func TestTheLastToBreakIsLeft(t *testing.T) {
	for _, kind := range []string{group.TypeRace, group.TypeFallback} {
		t.Run(kind, func(t *testing.T) {
			withPair(t, kind, func(p *pair) {
				for range 5 {
					p.flow(dst(1), whole)
				}
				away := dst(1)
				away.Avoid = []string{"a"}
				for range 5 {
					p.flow(away, broken)
				}
				time.Sleep(10 * time.Second)
				if by := p.flow(dst(1), broken); by != "a" {
					t.Fatalf("%q", by)
				}
				for range 3 {
					time.Sleep(100 * ms)
					if by := p.flow(dst(1), whole); by != "b" {
						t.Errorf("a flow was given to %q", by)
					}
				}
			})
		})
	}
}

// TestBrokenFlowsOfOneServer: where both paths break, the destination does it.
func TestBrokenFlowsOfOneServer(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		for range 20 {
			p.flow(dst(1), broken)
		}
		for _, name := range []string{"a", "b"} {
			if s := p.score(name); s.Ejected || s.Score < 1 {
				t.Errorf("%s: %+v", name, s)
			}
		}
	})
}

// TestQuietFlow is a hint that new flows follow.
func TestQuietFlow(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		for range 5 {
			p.flow(dst(1), whole)
		}
		c, err := p.g.DialStream(context.Background(), dst(1))
		if err != nil || c.Path[0] != "a" {
			t.Fatalf("%v, %v", c, err)
		}
		c.Tell(dialer.Outcome{News: dialer.Quiet})
		if by := p.flow(dst(2), whole); by != "b" {
			t.Errorf("%q", by)
		}
		c.Tell(dialer.Outcome{News: dialer.Ended})
		time.Sleep(10 * time.Second)
		if by := p.flow(dst(2), whole); by != "a" {
			t.Errorf("later: %q", by)
		}
	})
}

// TestHiddenIsCounted: each failure that a connection was found behind.
func TestHiddenIsCounted(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		p.a.set(says(ms, errUnreachable))
		p.flow(dst(1), whole)
		s := p.score("a")
		if s.HiddenTotal[dialer.HiddenDial] != 1 || s.FailuresTotal != 1 || s.DialsTotal != 1 {
			t.Errorf("%+v", s)
		}
		p.s.Hide("a", dialer.HiddenStall)
		if s := p.score("a"); s.HiddenTotal[dialer.HiddenStall] != 1 {
			t.Errorf("%+v", s)
		}
	})
}

// TestProbesOfIdlePaths: where a group wants them, and no flow is there to tell.
func TestProbesOfIdlePaths(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		c := settings("race")
		c.Probe.Interval = 5 * time.Second
		newGroup(t, c, p.s, p.a, p.b)
		p.flow(dst(1), whole)
		p.a.asked()
		p.b.asked()
		time.Sleep(time.Minute)
		if n := p.b.asked(); n < 9 || n > 13 {
			t.Errorf("%d probes in a minute, want one each 5 s", n)
		}
		p.b.set(says(ms, errUnreachable))
		time.Sleep(time.Minute)
		if s := p.score("b"); s.Score > 0.99 {
			t.Errorf("a path whose probes fail: %+v", s)
		}
	})
}

// TestManyDestinations: what is remembered has a bound.
func TestManyDestinations(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		for i := range 10_000 {
			target := dialer.Target{Addr: netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("10.%d.%d.1", i/250, i%250)), 443)}
			if _, _, err := dial(t, p.g, target); err != nil {
				t.Fatal(err)
			}
		}
		if n := p.s.Destinations(); n > 4096 {
			t.Errorf("%d destinations are remembered", n)
		}
	})
}

// TestChoose says what explain shows.
func TestChoose(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		p.flow(dst(1), whole)
		o, why := p.g.Choose(dst(1))
		const want = `group "race" (race) would ask "a" (score 1.00, connects in 10.0 ms), then "b" (score 1.00, not connected yet)`
		if o.Name() != "a" || why != want {
			t.Errorf("%s\n got %s\nwant %s", o.Name(), why, want)
		}
	})
}

// noDatagrams is a member that carries streams alone.
type noDatagrams struct{ *fake }

func (noDatagrams) CarriesPackets() bool { return false }

// What a member cannot carry, it is not asked to; and a group of such members cannot
// carry it either.
func TestMembersThatCannotCarryAreNotChosen(t *testing.T) {
	a, b := noDatagrams{&fake{name: "a", connect: in(ms)}}, &fake{name: "b", connect: in(ms)}
	g := newGroup(t, settings("fallback"), board(t), a, b)
	target := dst(1)
	for proto, want := range map[flow.Proto]string{flow.TCP: "a", flow.UDP: "b"} {
		target.Flow = &flow.Flow{Proto: proto}
		if o, why := g.Choose(target); o == nil || o.Name() != want {
			t.Errorf("%v: %s; want %s", proto, why, want)
		}
	}
	target.Flow = &flow.Flow{Proto: flow.ICMP}
	if o, why := g.Choose(target); o != nil {
		t.Errorf("a ping: %s", why)
	}
	if dialer.CanOpenPackets(g) != nil || dialer.CanEcho(g) == nil {
		t.Errorf("the group: datagrams %v, echo %v", dialer.CanOpenPackets(g), dialer.CanEcho(g))
	}
	if dialer.CanOpenPackets(newGroup(t, settings("race"), board(t), a)) == nil {
		t.Error("a group of members without datagrams carries them")
	}
}

// TestFlowsStay: of two paths that do alike, the one that served last is asked; that
// one is better by chance is no reason to leave it.
func TestFlowsStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		swings := func(netip.AddrPort) (time.Duration, error) {
			n++
			return time.Duration(9+n%3) * ms, nil
		}
		g := newGroup(t, settings("race"), board(t), &fake{name: "a", connect: swings}, &fake{name: "b", connect: in(10 * ms)})
		changes, last := 0, ""
		for range 50 {
			by, _, _ := dial(t, g, dst(1))
			if by != last {
				changes++
			}
			last = by
		}
		if changes > 2 { // each was asked for the first time
			t.Errorf("%d changes", changes)
		}
	})
}

// TestPathThatNobodyHasUsed is tried where the one that serves is slow, and else left
// for when it fails.
func TestPathThatNobodyHasUsed(t *testing.T) {
	for _, tt := range []struct {
		connect time.Duration
		want    int
	}{{10 * ms, 0}, {240 * ms, 19}} {
		synctest.Test(t, func(t *testing.T) {
			b := &fake{name: "b", connect: in(20 * ms)}
			g := newGroup(t, settings("race"), board(t), &fake{name: "a", connect: in(tt.connect)}, b)
			for range 20 {
				_, _, _ = dial(t, g, dst(1))
			}
			if n := b.asked(); n != tt.want {
				t.Errorf("beside one that connects in %v it was asked %d times, want %d", tt.connect, n, tt.want)
			}
		})
	}
}

// TestBrokenFlowIsAHint: before it is known whose failure it was, flows to other ports
// and other hosts leave the path, too, and no score has fallen for that.
func TestBrokenFlowIsAHint(t *testing.T) {
	for _, other := range []dialer.Target{{Addr: netip.AddrPortFrom(dst(1).Addr.Addr(), 80)}, dst(2)} {
		withPair(t, "race", func(p *pair) {
			for range 5 {
				p.flow(dst(1), whole)
			}
			if by := p.flow(dst(1), broken); by != "a" {
				t.Fatal(by)
			}
			if s := p.score("a"); s.Score < 1 {
				t.Errorf("%+v", s)
			}
			if by := p.flow(other, whole); by != "b" {
				t.Errorf("to %v by %q", other.Addr, by)
			}
		})
	}
}

// TestNext: what is known of an outbound that stays is kept, also what flows of
// before tell yet, and nothing of one that was made anew.
func TestNext(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		p.flow(dst(1), whole)
		late, err := p.g.DialStream(context.Background(), dst(2))
		if err != nil {
			t.Fatal(err)
		}
		p.b.set(says(ms, errUnreachable))
		p.a.set(says(ms, errUnreachable))
		for range 3 {
			_, _, _ = dial(t, p.g, dst(3))
			_, _, _ = dial(t, p.g, dst(4))
		}
		before := p.s.Stats()
		next := p.s.Next(func(name string) bool { return name == "a" })
		newGroup(t, settings("race"), next, p.a, &fake{name: "b", connect: in(ms)})
		after := next.Stats()
		if a := after["a"]; a != before["a"] || a.Score > 0.9 || a.DialsTotal == 0 {
			t.Errorf("an outbound that stays: %+v, was %+v", a, before["a"])
		}
		if b := after["b"]; b.Score != 1 || b.DialsTotal != 0 || before["b"].DialsTotal == 0 {
			t.Errorf("one that was made anew: %+v, was %+v", b, before["b"])
		}
		late.Tell(dialer.Outcome{News: dialer.Answered})
		late.Tell(whole)
		if a := next.Stats()["a"]; a.Score <= after["a"].Score {
			t.Errorf("a flow of before tells nothing: %+v, was %+v", a, after["a"])
		}
	})
}

// TestUsualConnectTime: of the last 32.
func TestUsualConnectTime(t *testing.T) {
	var all []time.Duration
	for n := range 200 {
		all = append(all, time.Duration(rand.IntN(20)))
		last := slices.Clone(all[max(0, len(all)-32):])
		slices.Sort(last)
		if got, want := group.P95(all...), last[(len(last)-1)*95/100]; got != want {
			t.Fatalf("after %d: %d, want %d of %v", n+1, got, want, last)
		}
	}
}

// TestRefusalsAreCountedAcrossQuickSuccesses: between two contradicted refusals a success,
// however soon after the last one, shows that they were not the path's.
func TestRefusalsAreCountedAcrossQuickSuccesses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refuses := map[netip.AddrPort]bool{dst(5).Addr: true, dst(6).Addr: true}
		a := &fake{name: "a", connect: func(d netip.AddrPort) (time.Duration, error) {
			if refuses[d] {
				return 0, errRefused
			}
			return 0, nil
		}}
		b := &fake{name: "b", connect: in(0)}
		s := board(t)
		g := newGroup(t, settings("fallback"), s, a, b)
		for range 10 {
			_, _, _ = dial(t, g, dst(1))
		}
		for _, n := range []int{5, 1, 6} {
			if _, _, err := dial(t, g, dst(n)); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.Stats()["a"].Score; got != 1 {
			t.Errorf("score %v", got)
		}
	})
}
