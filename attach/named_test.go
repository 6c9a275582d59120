package attach_test

import (
	"strings"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

// In a namespace that is selected by its name nobody is held, so nothing waits there for
// somebody to be.
func TestNamedIsRepairedAtOnce(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		named := i.namespace()
		named.All, named.Running = true, false
		r.shows(named)
		labtest.Eventually(t, soon, func() bool { return r.state(i.ref) == attach.StateUp && g.last(i.ref) != "" })
		quickest := time.Hour
		for range 4 {
			time.Sleep(100 * time.Millisecond) // what was done before is looked at
			if out, err := i.try("ip", "rule del pref 10101"); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			gone := time.Now()
			labtest.Eventually(t, soon, func() bool { return strings.Contains(i.ip("rule show pref 10101"), "10101") }, "the rule is back")
			quickest = min(quickest, time.Since(gone))
		}
		if quickest > 500*time.Millisecond {
			t.Errorf("a rule was back after %v at the soonest", quickest)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}
