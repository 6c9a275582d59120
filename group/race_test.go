package group_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
)

const ms = time.Millisecond

type network = func(netip.AddrPort) (time.Duration, error)

// TestRace has one race of two, both new: who wins, when, and what the client
// hears if nobody does.
func TestRace(t *testing.T) {
	for _, tt := range []struct {
		name   string
		kind   string
		a, b   network
		by     string
		took   time.Duration
		reason flow.Reason
	}{
		{"the first is quick", "race", in(20 * ms), in(ms), "a", 20 * ms, 0},
		{"the first is slower than the stagger", "race", in(time.Second), in(10 * ms), "b", 260 * ms, 0},
		{"the first is a black hole", "race", in(never), in(10 * ms), "b", 260 * ms, 0},
		{"the first refuses", "race", says(5*ms, errRefused), in(10 * ms), "b", 15 * ms, 0},
		{"the first is unreachable", "race", says(5*ms, errUnreachable), in(10 * ms), "b", 15 * ms, 0},
		{"the first cannot carry it", "race", says(0, errUnsupported), in(10 * ms), "b", 10 * ms, 0},
		{"the first has no account", "race", says(0, errAccount), in(10 * ms), "b", 10 * ms, 0},
		{"one has no account, the other is silent", "race", says(0, errAccount), in(never), "", 30 * time.Second, flow.TimedOut},
		{"one has no account, the other is unreachable", "race", says(0, errAccount), says(5*ms, errUnreachable), "", 5 * ms, flow.HostUnreachable},
		{"both have no account", "race", says(0, errAccount), says(5*ms, errAccount), "", 5 * ms, flow.Prohibited},
		{"both refuse", "race", says(5*ms, errRefused), says(10*ms, errRefused), "", 15 * ms, flow.Refused},
		{"one refuses, the other is silent", "race", says(5*ms, errRefused), in(never), "", 1005 * ms, flow.Refused},
		{"one is silent, the other refuses", "race", in(never), says(5*ms, errRefused), "", 1255 * ms, flow.Refused},
		{"one refuses, the other is slow", "race", says(5*ms, errRefused), in(800 * ms), "b", 805 * ms, 0},
		{"both unreachable", "race", says(5*ms, errUnreachable), says(5*ms, errUnreachable), "", 10 * ms, flow.HostUnreachable},
		{"both cannot carry it", "race", says(0, errUnsupported), says(0, errUnsupported), "", 0, flow.Unknown},
		{"both silent", "race", in(never), in(never), "", 30 * time.Second, flow.TimedOut},
		{"fallback, the first is quick", "fallback", in(20 * ms), in(ms), "a", 20 * ms, 0},
		{"fallback, the first is a black hole", "fallback", in(never), in(10 * ms), "b", 260 * ms, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := &fake{name: "a", connect: tt.a}, &fake{name: "b", connect: tt.b}
				g := newGroup(t, settings(tt.kind), board(t), a, b)
				by, took, err := dial(t, g, dst(1))
				if by != tt.by || took != tt.took || reasonOf(err) != tt.reason {
					t.Errorf("%q after %v: %v (%v), want %q after %v, %v", by, took, err, reasonOf(err), tt.by, tt.took, tt.reason)
				}
				if n := a.open.Load() + b.open.Load(); n != 0 {
					t.Errorf("%d connections are left open", n)
				}
			})
		})
	}
}

// TestRaceIsEnded: by who may end it and by the time of the flow, whether others have
// joined or not; afterwards nobody is asked, and to end it again does nothing.
func TestRaceIsEnded(t *testing.T) {
	for _, tt := range []struct {
		name    string
		stagger time.Duration
		after   time.Duration // it is ended; 0: it is not
		until   time.Duration // 0: no time of its own
		took    time.Duration
		reason  flow.Reason
		asked   int
	}{
		{"at once, alone", 250 * ms, 1, 0, 1, flow.Canceled, 1},
		{"alone", 250 * ms, 100 * ms, 0, 100 * ms, flow.Canceled, 1},
		{"when another one has joined", 250 * ms, 300 * ms, 0, 300 * ms, flow.Canceled, 2},
		{"when the first attempt is over", 250 * ms, 7 * time.Second, 0, 7 * time.Second, flow.Canceled, 4},
		{"without a stagger", 0, 100 * ms, 0, 100 * ms, flow.Canceled, 2},
		{"its time, alone", 250 * ms, 0, 100 * ms, 100 * ms, flow.TimedOut, 1},
		{"its time, when another one has joined", 250 * ms, 0, 400 * ms, 400 * ms, flow.TimedOut, 2},
		{"its time is longer than the group's", 250 * ms, 0, time.Hour, 30 * time.Second, flow.TimedOut, 12},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := &fake{name: "a", connect: in(never)}, &fake{name: "b", connect: in(never)}
				c := settings("race")
				c.Stagger = tt.stagger
				g := newGroup(t, c, board(t), a, b)
				var until time.Time
				if tt.until > 0 {
					until = time.Now().Add(tt.until)
				}
				ending := new(dialer.Ending)
				if tt.after > 0 {
					time.AfterFunc(tt.after, ending.End)
				}
				start := time.Now()
				_, err := g.DialStreamUntil(t.Context(), dst(1), until, ending)
				if took := time.Since(start); took != tt.took || flow.ReasonOf(err) != tt.reason {
					t.Errorf("after %v: %v (%v), want %v, %v", took, err, flow.ReasonOf(err), tt.took, tt.reason)
				}
				if n := a.asked() + b.asked(); n != tt.asked {
					t.Errorf("%d were asked, want %d", n, tt.asked)
				}
				ending.End()
				b.set(in(ms))
				if by, _, err := dial(t, g, dst(2)); by != "b" {
					t.Errorf("the next one: %q, %v", by, err)
				}
			})
		})
	}
}

// TestRaceAsksOnce counts connects of a healthy group: no more than one beside
// the flow's own on average, and after the first flows none.
func TestRaceAsksOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := &fake{name: "a", connect: in(30 * ms)}, &fake{name: "b", connect: in(40 * ms)}, &fake{name: "c", connect: in(500 * ms)}
		g := newGroup(t, settings("race"), board(t), a, b, c)
		const flows = 100
		for range flows {
			if _, _, err := dial(t, g, dst(1)); err != nil {
				t.Fatal(err)
			}
		}
		na, nb, nc := a.asked(), b.asked(), c.asked()
		if n := na + nb + nc; n > 2*flows || n > flows+5 {
			t.Errorf("%d connects for %d flows: %d, %d, %d", n, flows, na, nb, nc)
		}
		if na < flows*9/10 {
			t.Errorf("the quickest path had %d of %d flows", na, flows)
		}
	})
}

// TestDeadPathCostsOneStagger: after the flow that finds it, the others begin
// elsewhere.
func TestDeadPathCostsOneStagger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: in(10 * ms)}, &fake{name: "b", connect: in(20 * ms)}
		g := newGroup(t, settings("race"), board(t), a, b)
		for range 10 {
			_, _, _ = dial(t, g, dst(1))
		}
		a.set(in(never))
		by, took, err := dial(t, g, dst(1))
		if by != "b" || took != 70*ms || err != nil {
			t.Errorf("the first flow after: %q after %v, %v; want b after the least stagger and its connect, 70 ms", by, took, err)
		}
		for range 10 {
			if by, took, err := dial(t, g, dst(2)); by != "b" || took != 20*ms || err != nil {
				t.Errorf("a later flow: %q after %v, %v; want b after 20 ms", by, took, err)
			}
		}
	})
}

// TestStaggersBesideOthers: each race has its own, whatever others wait for meanwhile and
// whichever ends first.
func TestStaggersBesideOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := board(t)
		var all sync.WaitGroup
		for i, tt := range []struct{ begins, stagger time.Duration }{
			{0, 250 * ms}, {20 * ms, 100 * ms}, {30 * ms, 200 * ms}, {40 * ms, 100 * ms}, {300 * ms, 100 * ms}, {50 * ms, 250 * ms},
		} {
			a, b := &fake{name: fmt.Sprint("a", i), connect: in(never)}, &fake{name: fmt.Sprint("b", i), connect: in(10 * ms)}
			if i == 3 {
				a.set(in(60 * ms)) // in time
			}
			c := settings("race")
			c.Stagger = tt.stagger
			g := newGroup(t, c, s, a, b)
			all.Go(func() {
				time.Sleep(tt.begins)
				by, took, err := dial(t, g, dst(i))
				want, after := b.name, tt.stagger+10*ms
				if i == 3 {
					want, after = a.name, 60*ms
				}
				if by != want || took != after || err != nil {
					t.Errorf("race %d: %q after %v, %v; want %q after %v", i, by, took, err, want, after)
				}
			})
		}
		all.Wait()
	})
}

// TestNoStaggerAfterAFailure: when the best has failed lately, the next one is asked at
// once.
func TestNoStaggerAfterAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: says(ms, errUnreachable)}, &fake{name: "b", connect: says(ms, errUnreachable)}
		g := newGroup(t, settings("race"), board(t), a, b)
		_, _, _ = dial(t, g, dst(1))
		first, other := a, b
		if g.Order()[0] == "b" {
			first, other = b, a
		}
		first.set(in(never))
		other.set(in(20 * ms))
		if by, took, err := dial(t, g, dst(1)); by != other.name || took != 20*ms || err != nil {
			t.Errorf("%q after %v, %v; want %q after 20 ms", by, took, err, other.name)
		}
	})
}

// TestBreakingPathIsNoShortcut: beside a path that is a little late, one that has just
// broken a flow is asked after the whole stagger, and for a while only.
func TestBreakingPathIsNoShortcut(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		for range 5 {
			p.flow(dst(1), whole)
		}
		if by := p.flow(dst(1), broken); by != "a" {
			t.Fatal(by)
		}
		p.flow(dst(1), whole)
		p.b.set(in(200 * ms))
		if by, took, _ := dial(t, p.g, dst(1)); by != "b" || took != 200*ms {
			t.Errorf("%q after %v; want b after 200 ms", by, took)
		}
		p.b.set(in(never))
		if by, took, _ := dial(t, p.g, dst(1)); by != "a" || took != 260*ms {
			t.Errorf("%q after %v; want a after 260 ms", by, took)
		}
	})
}

// TestManySilent: no more than three attempts at a time.
func TestManySilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var members []dialer.Outbound
		var fakes []*fake
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			f := &fake{name: name, connect: in(never)}
			fakes, members = append(fakes, f), append(members, f)
		}
		fakes[4].set(in(ms))
		g := newGroup(t, settings("fallback"), board(t), members...)
		by, took, err := dial(t, g, dst(1))
		// d begins when a has had its 5 s, and e when b has.
		if by != "e" || took != 5*time.Second+250*ms+ms || err != nil {
			t.Errorf("%q after %v, %v", by, took, err)
		}
	})
}

// TestLostPathEndsAttempts: the kernel's word that a path is gone is enough.
func TestLostPathEndsAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: in(never)}, &fake{name: "b", connect: in(10 * ms)}
		s := board(t)
		g := newGroup(t, settings("race"), s, a, b)
		why := "interface eth0 has no carrier"
		time.AfterFunc(100*ms, func() {
			a.state.Store(&why)
			s.Recheck()
		})
		by, took, err := dial(t, g, dst(1))
		if by != "b" || took != 110*ms || err != nil {
			t.Errorf("%q after %v, %v; want b after 110 ms", by, took, err)
		}
		a.asked()
		if by, took, _ := dial(t, g, dst(2)); by != "b" || took != 10*ms || a.asked() != 0 {
			t.Errorf("while the path is gone: %q after %v", by, took)
		}
		a.state.Store(nil)
		s.Recheck()
		if got := g.Order(); len(got) != 2 {
			t.Errorf("order %q", got)
		}
	})
}

// TestDownIsTold: what is told of a path that is down is of use where there is another
// one; where all are, to try again would be in vain.
func TestDownIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: in(ms)}, &fake{name: "b", connect: in(ms)}
		s := board(t)
		both := newGroup(t, settings("race"), s, a, b)
		alone, outer := newGroup(t, settings("fallback"), s, a), newGroup(t, settings("balance"), s, both)
		why := "interface has no carrier"
		told := func(f *fake, state *string) (of []time.Duration) {
			f.state.Store(state)
			s.Recheck()
			time.Sleep(time.Second)
			for _, g := range []*group.Group{both, alone, outer} {
				of = append(of, g.Down("a"))
			}
			return of
		}
		for i, got := range [][]time.Duration{told(a, nil), told(a, &why), told(b, &why), told(b, nil), told(a, nil)} {
			want := [][]time.Duration{{0, 0, 0}, {time.Second, 0, time.Second}, {0, 0, 0}, {3 * time.Second, 0, 3 * time.Second}, {0, 0, 0}}[i]
			if !slices.Equal(got, want) {
				t.Errorf("step %d: by both, a alone and a group of both: %v, want %v", i, got, want)
			}
		}
	})
}

// TestCanceledRaceLeavesNothing: the client has gone, or cgtun stops for whatever it may
// be. That is nobody's failure, also before the others have joined the first.
func TestCanceledRaceLeavesNothing(t *testing.T) {
	for _, after := range []time.Duration{10 * ms, 500 * ms} {
		for _, cause := range []error{nil, errors.New("the device was deleted"), unix.EPERM} {
			synctest.Test(t, func(t *testing.T) {
				a, b := &fake{name: "a", connect: in(never)}, &fake{name: "b", connect: in(never)}
				s := board(t)
				g := newGroup(t, settings("race"), s, a, b)
				ctx, leave := context.WithCancelCause(t.Context())
				time.AfterFunc(after, func() { leave(cause) })
				if _, err := g.DialStream(ctx, dst(1)); flow.ReasonOf(err) != flow.Canceled {
					t.Errorf("got %v", err)
				}
				for name, st := range s.Stats() {
					if st.Score != 1 || st.FailuresTotal != 0 {
						t.Errorf("%s is blamed for a client that left (%v): %+v", name, cause, st)
					}
				}
			})
		}
	}
}

// TestAvoid: what failed a flow is not asked again for it.
func TestAvoid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: in(ms)}, &fake{name: "b", connect: in(ms)}
		s := board(t)
		inner := newGroup(t, settings("fallback"), s, a)
		g := newGroup(t, settings("race"), s, inner, b)
		target := dst(1)
		target.Avoid = []string{"a"}
		if by, _, err := dial(t, g, target); by != "b" || err != nil || a.asked() != 0 {
			t.Errorf("%q, %v", by, err)
		}
		if got := s.Stats()["fallback"]; got.FailuresTotal != 0 || got.HiddenTotal[dialer.HiddenDial] != 0 {
			t.Errorf("a group that nobody was asked by has failed: %+v", got)
		}
		target.Avoid = []string{"a", "b"}
		if _, _, err := dial(t, g, target); err == nil {
			t.Error("a flow that avoids all got a connection")
		}
	})
}

// TestGroupsOfGroups: a group is an outbound to another, and the leaves are what
// a path names.
func TestGroupsOfGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := board(t)
		a, b, c := &fake{name: "a", connect: in(never)}, &fake{name: "b", connect: says(0, errUnreachable)}, &fake{name: "c", connect: in(5 * ms)}
		inner := settings("fallback")
		inner.Name = "inner"
		g := newGroup(t, settings("race"), s, newGroup(t, inner, s, a, b), c)
		if by, took, err := dial(t, g, dst(1)); by != "c" || took != 255*ms || err != nil {
			t.Errorf("%q after %v, %v", by, took, err)
		}
		if got := g.Outbounds(); !slices.Equal(got, []string{"a", "b", "c"}) {
			t.Errorf("leaves %q", got)
		}
	})
}

// TestPackets: datagrams go by the first member that carries them.
func TestPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: says(0, errUnsupported)}, &fake{name: "b", connect: in(0)}
		g := newGroup(t, settings("race"), board(t), a, b)
		c, err := g.OpenPackets(context.Background(), dst(1))
		if err != nil || c.Path[0] != "b" {
			t.Errorf("%v, %v", c, err)
		}
		if _, err := dialer.OpenEcho(context.Background(), g, dst(1)); err == nil {
			t.Error("a group whose members carry no echo carries it")
		}
	})
}

// TestBalance: by destination each one keeps its path, and both get some; by load
// the one with fewer flows is next.
func TestBalance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a", connect: in(ms)}, &fake{name: "b", connect: in(ms)}
		g := newGroup(t, settings("balance"), board(t), a, b)
		count := map[string]int{}
		for i := range 200 {
			first, _, _ := dial(t, g, dst(i))
			again, _, _ := dial(t, g, dst(i))
			if first != again {
				t.Errorf("destination %d goes by %s, then by %s", i, first, again)
			}
			count[first]++
		}
		if count["a"] < 60 || count["b"] < 60 {
			t.Errorf("shares: %v", count)
		}
		c := settings("balance")
		c.By = group.ByLoad
		g = newGroup(t, c, board(t), a, b)
		var conns []*dialer.Conn
		load := map[string]int{}
		for range 10 {
			conn, err := g.DialStream(context.Background(), dst(1))
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
			load[conn.Path[0]]++
		}
		if load["a"] != 5 || load["b"] != 5 {
			t.Errorf("load: %v", load)
		}
		for _, conn := range conns {
			conn.Tell(dialer.Outcome{News: dialer.Ended})
			_ = conn.Close()
		}
	})
}

// room has so many places.
type room struct{ free, least int }

func (r *room) TakeExtra() bool {
	if r.free == 0 {
		return false
	}
	r.free--
	r.least = min(r.least, r.free)
	return true
}

func (r *room) GiveExtra() { r.free++ }

// TestRaceTakesRoom: a second attempt needs a place, and waits where there is none;
// all are given back.
func TestRaceTakesRoom(t *testing.T) {
	for _, tt := range []struct {
		free int
		took time.Duration
	}{{5, 260 * ms}, {0, 5*time.Second + 10*ms}} {
		synctest.Test(t, func(t *testing.T) {
			a, b := &fake{name: "a", connect: in(never)}, &fake{name: "b", connect: in(10 * ms)}
			s := board(t)
			r := &room{free: tt.free, least: tt.free}
			s.SetRoom(r)
			by, took, err := dial(t, newGroup(t, settings("race"), s, a, b), dst(1))
			if by != "b" || took != tt.took || err != nil || r.free != tt.free || r.least != max(0, tt.free-1) {
				t.Errorf("%d places: %q after %v, %v; %+v", tt.free, by, took, err, r)
			}
		})
	}
}

// TestPanicIsAFailure: of one attempt, and of nothing else.
func TestPanicIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &fake{name: "a", connect: func(netip.AddrPort) (time.Duration, error) { panic("a fault") }}
		b := &fake{name: "b", connect: in(10 * ms)}
		if by, took, err := dial(t, newGroup(t, settings("race"), board(t), a, b), dst(1)); by != "b" || took != 10*ms || err != nil {
			t.Errorf("%q after %v, %v", by, took, err)
		}
	})
}

// stubborn connects whatever its context says.
type stubborn struct{ *fake }

func (s stubborn) DialStream(_ context.Context, t dialer.Target) (*dialer.Conn, error) {
	return s.fake.DialStream(context.Background(), t)
}

// TestLateLoserIsClosed: one that connects although it was told to stop.
func TestLateLoserIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := stubborn{&fake{name: "a", connect: in(300 * ms)}}, &fake{name: "b", connect: in(10 * ms)}
		if by, _, err := dial(t, newGroup(t, settings("race"), board(t), a, b), dst(1)); by != "b" || err != nil || a.open.Load() != 0 {
			t.Errorf("%q, %v; %d connections are open", by, err, a.open.Load())
		}
	})
}

// TestLoadIsGivenBack: a connection that nobody tells the end of is one less, also
// one that lost a race around the group.
func TestLoadIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := board(t)
		a, b, c := stubborn{&fake{name: "a", connect: in(300 * ms)}}, &fake{name: "b", connect: in(300 * ms)}, &fake{name: "c", connect: in(10 * ms)}
		byLoad := settings("balance")
		byLoad.By = group.ByLoad
		inner := newGroup(t, byLoad, s, a, b)
		for range 3 {
			conn, err := inner.DialStream(context.Background(), dst(1))
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		}
		outer := newGroup(t, settings("fallback"), s, inner, c)
		if by, _, err := dial(t, outer, dst(2)); by != "c" || err != nil {
			t.Errorf("%q, %v", by, err)
		}
		if got := inner.Order(); got[0] != "a" {
			t.Errorf("all connections are closed, and the order is %q", got)
		}
	})
}

// TestSilenceOfTheFirstIsLearned: a first member that is silent is not asked first again,
// also where nobody joins before its time is over, or that of the race, or of a race
// around this one.
func TestSilenceOfTheFirstIsLearned(t *testing.T) {
	for _, tt := range []struct {
		name             string
		attempt, within  time.Duration
		stagger          time.Duration
		nested, reachesB bool // by the first flow
	}{
		{"its time", 5 * time.Second, 30 * time.Second, 10 * time.Second, false, true},
		{"that of the race", 5 * time.Second, 5 * time.Second, 10 * time.Second, false, false},
		{"that of a race around it", 5 * time.Second, 30 * time.Second, 10 * time.Second, true, true},
		{"after another one has joined", 5 * time.Second, 5 * time.Second, time.Second, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := &fake{name: "a", connect: in(never)}, &fake{name: "b", connect: in(10 * ms)}
				s := board(t)
				c := settings("fallback")
				c.Attempt, c.Deadline, c.Stagger = tt.attempt, tt.within, tt.stagger
				var g dialer.Outbound = newGroup(t, c, s, a, b)
				if tt.nested {
					c.Name, c.Outbounds = "outer", []string{g.Name()}
					outer, err := group.New(c, []dialer.Outbound{g}, s)
					if err != nil {
						t.Fatal(err)
					}
					g = outer
				}
				if c, err := g.DialStream(t.Context(), dst(1)); (err == nil) != tt.reachesB {
					t.Errorf("the first flow: %v", err)
				} else if err == nil {
					_ = c.Close()
				}
				start := time.Now()
				conn, err := g.DialStream(t.Context(), dst(2))
				if err != nil || time.Since(start) > time.Second {
					t.Fatalf("the next flow, after %v: %v", time.Since(start), err)
				}
				_ = conn.Close()
			})
		})
	}
}
