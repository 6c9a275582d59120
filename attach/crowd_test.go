package attach_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
)

// Who has thousands of routes and changes them all the time is looked at less often.
func TestCrowdsAreLookedAtSeldom(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		for n, state := range []string{attach.StateOffline, attach.StateUp} {
			i := newInner(t, n)
			i.ip("link set lo up")
			if state == attach.StateUp {
				i.connect(n)
				i.ip("-6 route del default") // where a family is left alone each look ends with an admission
			}
			const line = "route %s 198.51.%d.%d/32 dev lo table 7\n"
			const crowd, change = 10000, 500
			var all, changes strings.Builder
			for k := range crowd {
				fmt.Fprintf(&all, line, "add", k>>8, k&255)
			}
			for k := range 2 * change {
				fmt.Fprintf(&changes, line, [2]string{"add", "del"}[k%2], 255, k/2&255)
			}
			i.batch(all.String())
			r.shows(i.namespace())
			labtest.Eventually(t, soon, func() bool { return r.state(i.ref) == state }, "it is %s", state)
			before, began := g.admitted(i.ref), time.Now()
			for time.Since(began) < 700*time.Millisecond {
				i.batch(changes.String())
			}
			took := time.Since(began)
			const rest = 150 * time.Millisecond // less than that of 10,000, between two looks
			if n, most := g.admitted(i.ref)-before, 2+int(took/rest); n > most {
				t.Errorf("%s: looked at %d times in %v, want at most %d", state, n, took, most)
			}
			i.end()
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// batch has ip(8) do many things inside.
func (i *inner) batch(lines string) {
	i.t.Helper()
	file := filepath.Join(i.t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
		i.t.Fatal(err)
	}
	i.ip("-batch " + file)
}

func (g *gate) admitted(ns netns.Ref) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.admits[ns.Cookie()]
}
