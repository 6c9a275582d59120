package group_test

import (
	"testing"
	"time"

	"cgtun/dialer"
)

// TestEjection: three failures that are the path's put it last, longer each time
// though never for more than a minute and a fifth; probes bring it back.
func TestEjection(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		p.flow(dst(1), whole)
		p.a.set(says(ms, errUnreachable))
		for i := range 3 {
			// Once it has failed it is not the first any more: it is asked
			// where the other one is avoided.
			p.flow(dst(i), whole)
			target := dst(i)
			target.Avoid = []string{"b"}
			_, _, _ = dial(t, p.g, target)
		}
		if !p.score("a").Ejected {
			t.Fatalf("not ejected: %+v", p.score("a"))
		}
		if got := p.g.Order(); got[0] != "b" || len(got) != 2 {
			t.Errorf("order %q", got)
		}
		p.a.asked()
		time.Sleep(time.Minute)
		if n := p.a.asked(); n < 3 || n > 8 {
			t.Errorf("%d probes in a minute; want them after 2 s, 4 s, 8 s, …", n)
		}
		p.a.set(in(10 * ms))
		time.Sleep(35 * time.Second)
		if by := p.flow(dst(1), whole); by != "a" || p.score("a").Ejected {
			t.Errorf("after good probes: %q, %+v", by, p.score("a"))
		}
	})
}

// TestEjectionTimes: a path that goes on failing is out for longer each time, up to a
// minute, give or take a fifth; a good flow ends that before its time, and the next
// one is a short one again.
func TestEjectionTimes(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		byA := dst(1)
		byA.Avoid = []string{"b"}
		ejected := func() {
			p.Helper()
			p.a.set(says(ms, errUnreachable))
			for range 5 {
				p.flow(dst(1), whole) // by the other one
				_, _, _ = dial(t, p.g, byA)
				if p.score("a").Ejected {
					return
				}
			}
			t.Fatalf("not ejected: %+v", p.score("a"))
		}
		lasts := func(n int) {
			p.Helper()
			began := time.Now()
			for p.score("a").Ejected {
				time.Sleep(100 * ms)
			}
			want := min(time.Duration(n)*5*time.Second, time.Minute)
			if took := time.Since(began); took < want*8/10-100*ms || took > want*12/10+200*ms {
				t.Errorf("time %d: %v, want %v", n, took, want)
			}
		}
		for n := range 20 {
			ejected()
			lasts(n + 1)
		}
		ejected()
		p.a.set(in(10 * ms))
		p.flow(byA, whole)
		if p.score("a").Ejected {
			t.Error("it is ejected after a good flow")
		}
		ejected()
		lasts(1)
	})
}

// TestWhoseFailureItWas: of the path, if another one reached the same destination
// shortly before or after, or if two destinations fail by it with no success between;
// else of the destination.
func TestWhoseFailureItWas(t *testing.T) {
	by := func(p *pair, name string, n int, fails bool) {
		target := dst(n)
		target.Avoid = []string{map[string]string{"a": "b", "b": "a"}[name]}
		p.a.set(in(10 * ms))
		if fails {
			p.a.set(says(ms, errUnreachable))
		}
		_, _, _ = dial(p.T, p.g, target)
	}
	for _, tt := range []struct {
		name    string
		do      func(p *pair)
		charged bool
	}{
		{"alone", func(p *pair) { by(p, "a", 1, true) }, false},
		{"the same again", func(p *pair) { by(p, "a", 1, true); by(p, "a", 1, true) }, false},
		{"another path has reached it", func(p *pair) { by(p, "b", 1, false); time.Sleep(5 * time.Second); by(p, "a", 1, true) }, true},
		{"long ago", func(p *pair) { by(p, "b", 1, false); time.Sleep(15 * time.Second); by(p, "a", 1, true) }, false},
		{"another path reaches it", func(p *pair) { by(p, "a", 1, true); time.Sleep(5 * time.Second); by(p, "b", 1, false) }, true},
		{"much later", func(p *pair) { by(p, "a", 1, true); time.Sleep(15 * time.Second); by(p, "b", 1, false) }, false},
		{"two destinations", func(p *pair) { by(p, "a", 1, true); by(p, "a", 2, true) }, true},
		{"a success between", func(p *pair) { by(p, "a", 1, true); by(p, "a", 3, false); by(p, "a", 2, true) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			withPair(t, "fallback", func(p *pair) {
				tt.do(p)
				if s := p.score("a").Score; s < 1 != tt.charged {
					t.Errorf("score %.2f, charged: want %v", s, tt.charged)
				}
				by(p, "a", 3, false)
				before := p.score("a").Score
				time.Sleep(2 * time.Minute)
				if s := p.score("a").Score; s < before || s < 0.95 {
					t.Errorf("two minutes later: %.2f, after %.2f", s, before)
				}
			})
		})
	}
}

// TestBothEjected: ejected members are asked all the same where there is none
// better.
func TestBothEjected(t *testing.T) {
	withPair(t, "race", func(p *pair) {
		for i := range 6 {
			p.flow(dst(i), whole)
		}
		for i := range 10 {
			p.a.set(says(ms, errUnreachable))
			p.b.set(in(20 * ms))
			p.flow(dst(i), whole)
			p.a.set(in(10 * ms))
			p.b.set(says(ms, errUnreachable))
			p.flow(dst(i), whole)
		}
		p.a.set(in(10 * ms))
		p.b.set(in(20 * ms))
		if _, took, err := dial(t, p.g, dst(1)); err != nil || took > time.Second {
			t.Errorf("%v, %v", took, err)
		}
	})
}

// TestFlowsThatBreakTogether are one fault of the path, however many they were.
func TestFlowsThatBreakTogether(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		long := broken
		long.Lasted = time.Second
		time.Sleep(time.Minute)
		away := dst(1)
		away.Avoid = []string{"a"}
		p.flow(away, whole)
		for range 10 {
			if by := p.flow(dst(1), long); by == "a" {
				long.Lasted += ms // the next one has begun before that, too
				continue
			}
			c := dst(1)
			c.Avoid = []string{"b"}
			p.flow(c, long)
		}
		if s := p.score("a"); s.Ejected {
			t.Errorf("ejected: %+v", s)
		}
		time.Sleep(3 * time.Minute)
		if s := p.score("a"); s.Score < 0.95 {
			t.Errorf("it is not forgotten: %+v", s)
		}
	})
}

// TestShortFlowsProveNothing: a path that breaks what is long is good again when it
// has carried more than that.
func TestShortFlowsProveNothing(t *testing.T) {
	withPair(t, "fallback", func(p *pair) {
		p.flow(dst(1), whole)
		p.flow(dst(1), broken)
		byA, short := dst(1), whole
		byA.Avoid, short.Down = []string{"b"}, broken.Down/2
		for _, tt := range []struct {
			end  dialer.Outcome
			want string
		}{{short, "b"}, {whole, "a"}} {
			for range 3 {
				time.Sleep(time.Second)
				p.flow(byA, tt.end)
			}
			if o, _ := p.g.Choose(dst(1)); o.Name() != tt.want {
				t.Errorf("after flows of %d bytes by a: %q, want %q", tt.end.Down, o.Name(), tt.want)
			}
		}
	})
}
