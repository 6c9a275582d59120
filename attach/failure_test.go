package attach_test

import (
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"cgtun/attach"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/steer"
)

// What is taken inside makes the attachment fail; on_exit decides what becomes
// of the namespace, and it is attached when it can be.
func TestWhatIsTakenInside(t *testing.T) {
	atHome(t, func(t *testing.T) {
		for n, closed := range []bool{false, true} {
			r, g := others(t, func(o *attach.Options) { o.Routes[0].Plan.Closed = closed })
			i := newInner(t, n)
			i.connect(n)
			i.ip("rule add pref 7000 fwmark 0x65 lookup 9")
			r.shows(i.namespace())
			labtest.Eventually(t, soon, func() bool { return r.state(i.ref) == attach.StateFailed }, "failed")
			var taken *steer.TakenError
			if err := r.States()[1].Err; !errors.As(err, &taken) {
				t.Errorf("why: %v", err)
			}
			want := map[bool]string{false: "waived", true: "denied"}[closed]
			labtest.Eventually(t, soon, func() bool { return g.last(i.ref) == want }, "the gate is told %q", want)
			i.ip("rule del pref 7000")
			r.becomes(i, attach.StateUp, allInside, "admitted", g)
			if err := r.stop(); err != nil {
				t.Error(err)
			}
			// What blocks stays where on_exit is closed, in each namespace.
			left := map[bool]string{false: "", true: "rule rule6 nft"}[closed]
			if inside := i.steered(); inside != left || steered() != left {
				t.Errorf("closed %v: left %q inside, %q at home", closed, inside, steered())
			}
			home, err := netns.Home()
			for _, ns := range []netns.Ref{home, i.ref} {
				err = errors.Join(err, steer.Remove(ns, "101"))
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// What fails once is tried once more before on_exit is asked: who is held waits.
func TestOneFailureOpensNothing(t *testing.T) {
	atHome(t, func(t *testing.T) {
		for n, tt := range []struct {
			closed   bool
			failures int64
			want     []string // what the gate is told
		}{
			{false, 1, []string{"admitted"}},
			{true, 1, []string{"admitted"}},
			{false, 2, []string{"waived", "admitted"}},
			{true, 2, []string{"denied", "admitted"}},
		} {
			var calls atomic.Int64
			r, g := others(t, func(o *attach.Options) {
				o.Routes[0].Plan.Closed = tt.closed
				o.Isolated = func(netip.Addr) (bool, error) {
					if calls.Add(1) <= tt.failures {
						return false, errors.New("nobody answers")
					}
					return false, nil
				}
			})
			i := newInner(t, n)
			i.connect(n)
			r.shows(i.namespace())
			r.becomes(i, attach.StateUp, allInside, "admitted", g)
			if got := g.words(i.ref); !slices.Equal(got, tt.want) {
				t.Errorf("closed %v, %d failures: the gate was told %q, want %q", tt.closed, tt.failures, got, tt.want)
			}
			r.shows() // before the end, that nothing stays shut inside
			r.becomes(i, "", "", "forgotten", g)
			if err := r.stop(); err != nil {
				t.Error(err)
			}
			home, err := netns.Home()
			if err = errors.Join(err, steer.Remove(home, "101")); err != nil {
				t.Error(err)
			}
		}
	})
}
