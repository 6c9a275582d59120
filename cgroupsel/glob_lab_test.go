package cgroupsel_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// The program at cgroup_mkdir, and the walk over what is older, decide as user
// space does.
func TestKernelDecidesAsThePathsSay(t *testing.T) {
	for _, tt := range patterns {
		if cgroupsel.IsUnit(tt.pattern) {
			continue // those begin at the root: TestUnitIsCapturedThroughRestarts
		}
		t.Run(strings.ReplaceAll(tt.pattern, "/", "|"), func(t *testing.T) {
			lab, _, _ := newLab(t)
			base := lab.Cgroup("base")
			o := options([]string{base.Path + tt.pattern})
			o.Instance = "younger"
			younger := newSelector(t, o)
			fullySelected(t, younger)
			want := make(map[uint64]string)
			for _, p := range slices.Concat(tt.no, tt.yes) {
				c := lab.Cgroup("base" + p)
				if slices.Contains(tt.yes, p) {
					want[c.ID] = p
				}
			}
			wantSelected(t, younger, want, tt.no)
			younger.Close()
			o.Instance = "older"
			wantSelected(t, newSelector(t, o), want, tt.no)
		})
	}
}

func wantSelected(t *testing.T, s *cgroupsel.Selector, want map[uint64]string, no []string) {
	t.Helper()
	got := s.SelectedIDs()
	for id, p := range want {
		if got[id] == 0 {
			t.Errorf("%s is not selected", p)
		}
	}
	for id := range got {
		p, _ := s.PathByID(id)
		for _, bad := range no {
			if strings.HasSuffix(p, "/base"+bad) {
				t.Errorf("%s is selected", p)
			}
		}
	}
}

func TestKernelGivesSharedCgroupsToTheSameSelection(t *testing.T) {
	for _, tt := range overlaps {
		if strings.HasPrefix(tt.name, "a unit") {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			lab, _, _ := newLab(t)
			base := lab.Cgroup("base")
			o := options()
			for i, one := range tt.options.Selections {
				one.Cgroups = []string{base.Path + one.Cgroups[0]}
				one.Mark = uint32(i + 1)
				o.Selections = append(o.Selections, one)
			}
			o.Instance = "younger"
			s := newSelector(t, o)
			fullySelected(t, s)
			c := lab.Cgroup("base" + tt.path)
			if got, _ := s.SelectedBy(c.ID); got != tt.selection {
				t.Errorf("made later it is of selection %d, want %d", got, tt.selection)
			}
			s.Close()
			o.Instance = "older"
			if got, _ := newSelector(t, o).SelectedBy(c.ID); got != tt.selection {
				t.Errorf("made before it is of selection %d, want %d", got, tt.selection)
			}
		})
	}
}

// Each route's processes have its own mark, under its own mask.
func TestSelectionsHaveMarksOfTheirOwn(t *testing.T) {
	for i, mark := range []uint32{testMark, 0x6600} {
		lab, h, _ := newLab(t)
		h.Run("nft", "flush ruleset\n")
		m := newMeter(t, h, mark, 0xff<<(8*i))
		top := lab.Cgroup("top")
		s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{
			{Cgroups: []string{top.Path + "/a"}},
			{Cgroups: []string{top.Path + "/*"}, Mark: 0x6600, Mask: 0xff00},
		}})
		fullySelected(t, s)
		for j, name := range []string{"a/x", "b"} {
			c := lab.Cgroup("top/" + name)
			send(t, lab, h, c)
			m.want(1, i == j, name)
			if got, ok := s.Selected(c.Path); got != j || !ok {
				t.Errorf("%s is of selection %d, %v, want %d", name, got, ok, j)
			}
		}
		s.Close()
	}
}

// systemd makes the directory of a unit anew at each start of it.
func TestUnitIsCapturedThroughRestarts(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	lab, h, m := newLab(t)
	outer := lab.Cgroup("outer")
	lab.Cgroup("outer/system.slice/other.service")
	lab.Cgroup("outer/ci.slice/ci-heavy.slice")
	opts := asJSON(t, options([]string{"unit:ci.service", "unit:a-b.slice"}))
	p := startBehind(t, lab, h, outer, []string{"unshare", "--cgroup"}, "select", opts)
	if say := p.told(); say.Error != "" || len(say.Cgroups) != 0 {
		t.Errorf("it says %+v", say)
	}
	restarts := 50
	if testing.Short() {
		restarts = 10
	}
	for i := range restarts {
		// Slice= of the unit can change with a restart, too.
		slice := []string{"system.slice", "ci.slice/ci-heavy.slice"}[2*i/restarts]
		bornIn(t, h, filepath.Join(outer.Dir, slice, "ci.service"))
	}
	m.want(restarts, true, "after each start of the unit")
	send(t, lab, h, lab.Cgroup("outer/a.slice/a-b.slice/x.service"))
	m.want(1, true, "in a unit of the slice")
	send(t, lab, h, lab.Cgroup("outer/system.slice/other.service"))
	m.want(1, false, "in another unit")
	p.tell("end")
	p.wait()
}

// What globs select is in the picture, whatever the kernel offers; where the
// kernel does not decide itself, the time until it is there is measured.
func TestSnapshotFollowsGlobs(t *testing.T) {
	for _, tt := range []struct {
		name    string
		without []string
		held    bool
	}{
		{"with programs at the root", nil, true},
		{"with programs on each cgroup", []string{cgroupsel.FeatureMkdir}, false},
		{"with inotify alone", []string{cgroupsel.FeatureMkdir, cgroupsel.FeaturePerCgroup}, false},
		{"with nothing", []string{cgroupsel.FeatureMkdir, cgroupsel.FeaturePerCgroup, cgroupsel.FeatureInotify}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab, h, m := newLab(t)
			top := lab.Cgroup("top")
			older := lab.Cgroup("top/a/sel-old")
			s := newSelector(t, cgroupsel.Options{
				Selections: []cgroupsel.Selection{{Cgroups: []string{top.Path + "/*/sel-*"}}}, Without: tt.without, Instance: "globs",
			})
			if !slices.Contains(tt.without, cgroupsel.FeatureInotify) {
				s.LookEvery(time.Hour) // no event may be missed
			} else {
				s.LookEvery(10 * time.Millisecond)
			}
			pictures := follow(t, s)
			picture := func(want ...*labtest.Cgroup) {
				t.Helper()
				waitForAll(t, pictures, tt.held, want...)
			}
			picture(older)
			var windows []time.Duration
			for range 10 {
				begin := time.Now()
				young := lab.Cgroup("top/b/sel-young")
				picture(older, young)
				windows = append(windows, time.Since(begin))
				if len(tt.without) < 2 {
					send(t, lab, h, lab.Cgroup("top/b/sel-young/child"))
					m.want(1, true, "in a child of what a glob selects")
					removeDir(t, filepath.Join(young.Dir, "child"))
				}
				removeDir(t, young.Dir)
				removeDir(t, filepath.Dir(young.Dir))
				picture(older)
			}
			slices.Sort(windows)
			t.Logf("from mkdir until it is in the picture: median %v, longest %v", windows[len(windows)/2], windows[len(windows)-1])
		})
	}
}

// What a process that is born in a cgroup at once after mkdir sends, where the
// kernel does not decide: how much of it is missed is measured, not promised.
func TestWindowOfTheFallbackIsMeasured(t *testing.T) {
	lab, h, m := newLab(t)
	top := lab.Cgroup("top")
	o := options([]string{top.Path + "/sel-*"})
	o.Instance, o.Without = "window", []string{cgroupsel.FeatureMkdir}
	selector := newSelector(t, o)
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- selector.Run(ctx, func(cgroupsel.Snapshot) {}) }()
	defer func() { end(); <-ended }()
	n := 20
	if labtest.Soak() {
		n = 5000
	}
	for range n {
		bornIn(t, h, filepath.Join(top.Dir, "sel-x"))
	}
	marked, missed := 0, 0
	for kind, packets := range m.read() {
		if strings.HasSuffix(kind, "_yes") {
			marked += packets
		} else {
			missed += packets
		}
	}
	t.Logf("with programs on each cgroup %d of %d packets had no mark", missed, marked+missed)
	if marked+missed != n*len(kinds) {
		t.Errorf("%d packets, want %d", marked+missed, n*len(kinds))
	}
}

// waitForAll waits for a picture of exactly these cgroups, sorted by path.
func waitForAll(t *testing.T, pictures <-chan cgroupsel.Snapshot, held bool, want ...*labtest.Cgroup) {
	t.Helper()
	var all []cgroupsel.Cgroup
	for _, c := range want {
		all = append(all, cgroupsel.Cgroup{Path: c.Path, ID: c.ID, Level: level(c), Present: true, Held: held})
	}
	deadline := time.After(20 * time.Second)
	var last cgroupsel.Snapshot
	for {
		select {
		case last = <-pictures:
			if slices.Equal(last.Cgroups, all) {
				return
			}
		case <-deadline:
			t.Fatalf("no picture with %+v, the last is %+v", all, last)
		}
	}
}

// An admin's program without a flag at the root of our tree keeps ours out,
// there and below; that is said. (The tree is that of a cgroup namespace: the
// machine's own root is not for tests.)
func TestForeignProgramAtTheRootKeepsOursOut(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	lab, h, m := newLab(t)
	outer := lab.Cgroup("outer")
	sel := lab.Cgroup("outer/sel-a")
	attachForeign(t, outer)
	p := startBehind(t, lab, h, outer, []string{"unshare", "--cgroup"}, "select", asJSON(t, options([]string{"/sel-*"})))
	say := p.told()
	for _, name := range []string{cgroupsel.FeatureRoot, cgroupsel.FeaturePerCgroup} {
		if !slices.Contains(say.Missing, name) {
			t.Errorf("it misses %q, want %q among them", say.Missing, name)
		}
	}
	if len(say.Cgroups) != 1 || say.Cgroups[0].Path != "/sel-a" || say.Cgroups[0].ID != sel.ID || say.Cgroups[0].Held {
		t.Errorf("it sees %+v", say.Cgroups)
	}
	send(t, lab, h, sel)
	m.want(1, false, "nothing marks")
	p.tell("end")
	p.wait()
	if _, err := os.Stat(sel.Dir); err != nil {
		t.Error(err)
	}
}
