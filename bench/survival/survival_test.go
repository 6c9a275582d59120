package survival_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

const perRun = 200

// lasts is the time in which the downloads of a run begin.
const lasts = 80 * time.Second

// TestSurvival is the bench of what groups are for. Downloads of 1 to 5 MB begin at
// seeded times, each is tried once, while one path or the other fails, never both at
// once. A loss is avoidable if no fault began while the download ran: there was a
// good path all the time. The others were in their midst when their path failed: only
// resumption could have saved them. Nobody can know of a fault that shows in the
// midst of flows alone before it has broken one, so the first to meet it may be lost.
func TestSurvival(t *testing.T) {
	t.Parallel()
	race := settings[slices.IndexFunc(settings, func(s setting) bool { return s.name == "race" })]
	var all total
	t.Run("seeds", func(t *testing.T) {
		for seed, group := range []string{directly, directly, proxied} {
			t.Run(fmt.Sprintf("%s %d", group, seed), func(t *testing.T) {
				t.Parallel()
				s := survive(t, race, group, uint64(seed))
				all.add(s)
				for _, d := range s.avoidable() {
					if !s.first(d) {
						t.Errorf("lost though no fault began while it ran: %+v: %s", d, s.during(d))
					}
				}
			})
		}
	})
	t.Log(all.String())
	if all.lost*5 > all.downloads { // on a slow machine more faults begin while they run
		t.Errorf("more than a fifth of all downloads were lost")
	}
}

// TestSurvivalTable compares the settings, on the same seeds.
func TestSurvivalTable(t *testing.T) {
	first, last, only := 0, -1, os.Getenv("CGTUN_SURVIVAL_ONLY")
	if labtest.Soak() {
		last = 19
	}
	if text := os.Getenv("CGTUN_SURVIVAL_SEEDS"); text != "" {
		if n, _ := fmt.Sscanf(text, "%d-%d", &first, &last); n != 2 {
			t.Fatalf("CGTUN_SURVIVAL_SEEDS is %q, want two numbers, as 0-5", text)
		}
	}
	for _, s := range settings {
		for _, group := range []string{directly, proxied} {
			name := s.name + ", " + group
			if s.off && group == proxied || !strings.Contains(name, only) || last < first {
				continue
			}
			var all total
			t.Run(name, func(t *testing.T) {
				for seed := first; seed <= last; seed++ {
					t.Run(fmt.Sprint(seed), func(t *testing.T) {
						t.Parallel()
						all.add(survive(t, s, group, uint64(seed)))
					})
				}
			})
			t.Logf("%s: %v", name, &all)
		}
	}
}

// result is what became of one run.
type result struct {
	seed      uint64
	downloads []download
	faults    []happened
}

// survive makes one run.
func survive(t *testing.T, s setting, group string, seed uint64) result {
	l := newLab(t)
	if !s.off {
		l.start(s, group)
	}
	text, _ := json.Marshal(client{N: perRun, Seed: seed, Within: lasts})
	self, _ := os.Executable()
	cmd := l.sel.In(context.Background(), l.machine, "env", clientEnv+"="+string(text), self)
	p := l.in.StartCommand(cmd)
	p.WaitOutput("ready", 30*time.Second)
	r := result{seed: seed, faults: l.inflict(plan(seed, lasts, group == proxied))}
	if err := p.Wait(); err != nil {
		t.Fatalf("client: %v\n%s", err, p.Output())
	}
	for line := range strings.Lines(p.Output()) {
		var d download
		if json.Unmarshal([]byte(line), &d) == nil {
			r.downloads = append(r.downloads, d)
		}
	}
	if len(r.downloads) != perRun {
		t.Fatalf("the client tells of %d downloads, want %d", len(r.downloads), perRun)
	}
	for _, d := range r.lost() {
		t.Logf("lost from %s to %s after %d of %d bytes: %s: %s", d.Begin.Format("05.000"), d.End.Format("05.000"), d.Got, d.Want, d.Err, r.during(d))
	}
	hidden := ""
	if !s.off {
		h := l.status().Counters.HiddenTotal
		hidden = fmt.Sprintf("; hidden: dial %d, reset %d, close %d, stall %d", h.Dial, h.Reset, h.Close, h.Stall)
	}
	var one total
	one.add(r)
	t.Logf("seed %d: %v, %d faults%s", seed, &one, len(r.faults), hidden)
	return r
}

func (r result) lost() (lost []download) {
	for _, d := range r.downloads {
		if d.Err != "" {
			lost = append(lost, d)
		}
	}
	return lost
}

// began says whether a fault began while d ran.
func (r result) began(d download) bool {
	return slices.ContainsFunc(r.faults, func(h happened) bool { return h.beganIn(d) })
}

// first says whether d was lost by a fault that shows in the midst of downloads
// alone, and that none lost before d began had shown.
func (r result) first(d download) bool {
	for _, h := range r.faults {
		if !strings.Contains(h.what, "past 300 kB") || !h.begin.Before(d.End) || !h.end.After(d.Begin) {
			continue
		}
		return !slices.ContainsFunc(r.lost(), func(l download) bool { return l.End.After(h.begin) && l.End.Before(d.Begin) })
	}
	return false
}

func (r result) avoidable() []download {
	return slices.DeleteFunc(r.lost(), r.began)
}

// during says in words what happened while d ran.
func (r result) during(d download) string {
	var words []string
	for _, h := range r.faults {
		switch {
		case h.beganIn(d):
			words = append(words, fmt.Sprintf("when it began: %s of path %d, at %s", h.what, h.path, h.begin.Format("05.000")))
		case h.begin.Before(d.End) && h.end.After(d.Begin):
			words = append(words, fmt.Sprintf("in the midst of %s of path %d, since %s", h.what, h.path, h.begin.Format("05.000")))
		}
	}
	return strings.Join(words, ", ")
}

// total is the sum of runs. Safe for concurrent use.
type total struct {
	mu                               sync.Mutex
	runs, downloads, lost, avoidable int
	first                            int             // of the avoidable ones: nobody could know of their fault
	worst                            float64         // per cent of one run
	connects                         []time.Duration // of those that began while a path failed
	by                               map[string]int
}

func (a *total) add(r result) {
	a.mu.Lock()
	defer a.mu.Unlock()
	lost := r.lost()
	rate := 100 * float64(len(r.downloads)-len(lost)) / float64(len(r.downloads))
	if a.runs++; a.runs == 1 || rate < a.worst {
		a.worst = rate
	}
	a.downloads += len(r.downloads)
	a.lost += len(lost)
	for _, d := range r.avoidable() {
		a.avoidable++
		if r.first(d) {
			a.first++
		}
	}
	for _, d := range r.downloads {
		if d.Err == "" && slices.ContainsFunc(r.faults, func(h happened) bool { return h.inForce.Before(d.Begin) && h.end.After(d.Begin) }) {
			a.connects = append(a.connects, d.Connect)
		}
	}
	if a.by == nil {
		a.by = map[string]int{}
	}
	for _, d := range lost {
		what := "no fault"
		for _, h := range r.faults {
			if h.begin.Before(d.End) && h.end.After(d.Begin) {
				what = h.what
			}
		}
		a.by[what]++
	}
}

// String is a row of the table.
func (a *total) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var by []string
	for what, n := range a.by {
		by = append(by, fmt.Sprintf("%s %d", what, n))
	}
	slices.Sort(by)
	slices.Sort(a.connects)
	percentile := func(p int) time.Duration {
		if len(a.connects) == 0 {
			return 0
		}
		return a.connects[(len(a.connects)-1)*p/100].Round(100 * time.Microsecond)
	}
	rate := func(lost int) float64 { return 100 * float64(a.downloads-lost) / float64(max(a.downloads, 1)) }
	return fmt.Sprintf("%d of %d downloads, %.1f %% (worst run %.1f %%, reachable without resumption %.1f %%); %d lost avoidably, of them %d as the first to meet their fault; connects while a path failed: p50 %v, p99 %v; lost by %s",
		a.downloads-a.lost, a.downloads, rate(a.lost), a.worst, rate(a.lost-a.avoidable), a.avoidable, a.first, percentile(50), percentile(99), strings.Join(by, ", "))
}
