package attach_test

import (
	"net/netip"
	"slices"
	"testing"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// Where the last of a namespace is set up, and somebody begins to run in it, while it is
// looked at, that look admits nobody: it has not seen all of what is there.
func TestStaleLookAdmitsNobody(t *testing.T) {
	atHome(t, func(t *testing.T) {
		var during func(gateway netip.Addr) (isolated bool)
		r, g := others(t, func(o *attach.Options) {
			o.Isolated = func(gateway netip.Addr) (bool, error) { return during(gateway), nil }
		})
		// begins lets somebody run in the first namespace, and waits until that is known.
		begins := func(i, other *inner) {
			r.shows(i.namespace(), other.namespace())
			labtest.Eventually(t, soon, func() bool { return r.state(other.ref) != "" }, "the picture is seen")
		}
		forked := func(i *inner) cgroupsel.Namespace {
			n := i.namespace()
			n.Running = false
			return n
		}

		i, other := newInner(t, 1), newInner(t, 2)
		i.connect(1)
		i.ip("-6 route del default")
		looks := 0
		during = func(netip.Addr) bool {
			if looks++; looks == 1 {
				i.ip("-6 route add default via fd44:1::1")
				begins(i, other)
				return true // of v4: no way out is seen
			}
			return false
		}
		r.shows(forked(i))
		labtest.Eventually(t, soon, func() bool { return r.state(i.ref) == attach.StateUp })
		labtest.Eventually(t, soon, func() bool { return g.last(i.ref) == "admitted" })
		if got := g.words(i.ref); !slices.Equal(got, []string{"admitted"}) {
			t.Errorf("no way out was seen: the gate was told %q", got)
		}

		r.shows()
		labtest.Eventually(t, soon, func() bool { return g.last(i.ref) == "forgotten" && g.last(other.ref) == "forgotten" }, "both are let go")

		i, other = newInner(t, 3), newInner(t, 4)
		i.connect(3)
		i.ip("route del default")
		looks = 0
		during = func(netip.Addr) bool {
			switch looks++; looks {
			case 1: // to be asked again by the look of the attachment
				i.ip("-6 route add default via fd44:3::9 metric 2000")
			case 2:
				i.ip("route add default via 10.44.3.1")
				begins(i, other)
			}
			return false
		}
		inside := ""
		g.onAdmit = func() {
			if inside == "" {
				inside = i.steered()
			}
		}
		r.shows(forked(i))
		labtest.Eventually(t, soon, func() bool { return g.last(i.ref) == "admitted" })
		if inside != allInside {
			t.Errorf("one family was seen: admitted with %q inside, want %q", inside, allInside)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A namespace that is seen again while it is being let go of is attached anew, though
// nothing else happens after that.
func TestSeenAgainWhileItIsLetGo(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i, other := newInner(t, 1), newInner(t, 2)
		i.connect(1)
		r.shows(i.namespace())
		labtest.Eventually(t, soon, func() bool { return g.last(i.ref) == "admitted" })
		g.onForget = func() {
			g.onForget = nil
			r.shows(i.namespace(), other.namespace())
			labtest.Eventually(t, soon, func() bool { return r.state(other.ref) != "" }, "the picture is looked at")
		}
		r.shows()
		labtest.Eventually(t, soon, func() bool {
			return slices.Equal(g.words(i.ref), []string{"admitted", "forgotten", "admitted"})
		}, "it is attached again: the gate was told %q", g.words(i.ref))
		if got := r.state(i.ref); got != attach.StateUp {
			t.Errorf("its state is %q", got)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}
