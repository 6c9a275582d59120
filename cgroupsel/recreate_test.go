package cgroupsel_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// soakRounds is how often cgroups are made again: CGTUN_SOAK=1 is the full number.
func soakRounds() int {
	switch {
	case labtest.Soak():
		return 5000
	case testing.Short():
		return 40
	}
	return 200
}

// bornIn runs "send" in a cgroup that is made for it and removed after it: the
// process is born there (clone into cgroup), so that its first packet is as
// early as can be.
func bornIn(t *testing.T, h *labtest.Host, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := h.Command(t.Context(), exe)
	cmd.Env = helperEnviron("send")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("send: %v: %s", err, out)
	}
	removeDir(t, dir)
}

func removeDir(t *testing.T, dir string) {
	t.Helper()
	// A process leaves its cgroup a little after its parent knows of its end.
	labtest.Eventually(t, 5*time.Second, func() bool { return os.Remove(dir) == nil }, "remove "+dir)
}

func TestCgroupMadeAgainIsSelectedFromTheFirstPacket(t *testing.T) {
	lab, h, m := newLab(t)
	top := lab.Cgroup("top")
	dir := filepath.Join(top.Dir, "sel")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{
		top.Path + "/sel", top.Path + "/*-ci/job-*", top.Path + "/deep/**/b",
	}}}})
	fullySelected(t, s)
	lab.Cgroup("top/x-ci")
	lab.Cgroup("top/deep/a/a")
	n := soakRounds()
	for i := range n {
		switch i % 4 {
		case 0:
			bornIn(t, h, dir)
			continue
		case 1:
			bornIn(t, h, filepath.Join(top.Dir, "x-ci", fmt.Sprint("job-", i)))
			continue
		case 2:
			bornIn(t, h, filepath.Join(top.Dir, "deep/a/a/b"))
			continue
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		bornIn(t, h, filepath.Join(dir, "child"))
		removeDir(t, dir)
	}
	m.want(n, true, "made again")
	got := s.Counters()
	got.Lost = 0 // without Run nobody reads the records
	if got != (cgroupsel.Counters{}) {
		t.Errorf("counters: %+v", got)
	}
	// An entry goes with the last reference to its cgroup, in the background.
	labtest.Eventually(t, 20*time.Second, func() bool { return len(s.SelectedIDs()) == 0 }, "entries of removed cgroups left")
}

// The picture follows a cgroup that is made again, for those who need its id.
func TestSnapshotFollowsCgroupMadeAgain(t *testing.T) {
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
			lab, _, _ := newLab(t)
			top := lab.Cgroup("top")
			name := top.Path + "/a/sel"
			s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{name}}}, Without: tt.without, Instance: "follow"})
			if !slices.Contains(tt.without, cgroupsel.FeatureInotify) {
				s.LookEvery(time.Hour) // no event may be missed
			} else {
				s.LookEvery(10 * time.Millisecond)
			}
			pictures := follow(t, s)
			first := <-pictures
			want := cgroupsel.Cgroup{Path: name, Level: strings.Count(name, "/"), Held: tt.held}
			if first.Cgroups[0] != want {
				t.Fatalf("before it is there: %+v, want %+v", first.Cgroups[0], want)
			}
			for range 5 {
				c := lab.Cgroup("top/a/sel")
				want.ID, want.Present = c.ID, true
				waitFor(t, pictures, want)
				removeDir(t, c.Dir)
				removeDir(t, filepath.Dir(c.Dir))
				want.ID, want.Present = 0, false
				waitFor(t, pictures, want)
			}
		})
	}
}

// follow runs the selector and returns its pictures.
func follow(t *testing.T, s *cgroupsel.Selector) <-chan cgroupsel.Snapshot {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	pictures := make(chan cgroupsel.Snapshot, 100)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(p cgroupsel.Snapshot) { pictures <- p }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("Run: %v", err)
		}
	})
	return pictures
}

func waitFor(t *testing.T, pictures <-chan cgroupsel.Snapshot, want cgroupsel.Cgroup) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	var last cgroupsel.Snapshot
	for {
		select {
		case last = <-pictures:
			if last.Cgroups[0] == want {
				return
			}
		case <-deadline:
			t.Fatalf("no picture with %+v, the last is %+v", want, last)
		}
	}
}

// Where the kernel refuses the tracepoint, or the root, processes are marked
// by programs on the cgroups themselves.
func TestProgramsOnEachCgroupMark(t *testing.T) {
	for _, without := range []string{cgroupsel.FeatureMkdir, cgroupsel.FeatureRoot} {
		t.Run("without "+without, func(t *testing.T) {
			lab, h, m := newLab(t)
			top := lab.Cgroup("top")
			name := top.Path + "/sel"
			s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{name}}}, Without: []string{without}, Instance: "each"})
			pictures := follow(t, s)
			for i := range 3 {
				c := lab.Cgroup("top/sel")
				waitFor(t, pictures, cgroupsel.Cgroup{Path: name, ID: c.ID, Level: strings.Count(name, "/"), Present: true})
				send(t, lab, h, c)
				m.want(1, true, "in the cgroup")
				child := lab.Cgroup("top/sel/child")
				send(t, lab, h, child)
				m.want(1, true, "in its child")
				send(t, lab, h, top)
				m.want(1, false, "in its parent")
				if i < 2 {
					removeDir(t, child.Dir)
					removeDir(t, c.Dir)
				}
			}
			var missing []string
			for _, f := range s.Features() {
				if f.Err != nil {
					missing = append(missing, f.Name)
				}
			}
			if len(missing) != 1 || missing[0] != without {
				t.Errorf("features missing: %q, want %q alone", missing, without)
			}
		})
	}
}

// More cgroups than the map has room for are counted, and captured another way.
func TestFullMapIsCountedAndMadeGood(t *testing.T) {
	lab, h, m := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}, MaxCgroups: 2, Instance: "full"})
	pictures := follow(t, s)
	var last *labtest.Cgroup
	// A hash map has a few spare entries per CPU.
	for i := 0; s.Counters().Full == 0; i++ {
		if i > 1000 {
			t.Fatal("1000 cgroups in a map of two, and nothing counted")
		}
		last = lab.Cgroup("sel/" + strings.Repeat("x", i+1))
	}
	waitFor(t, pictures, cgroupsel.Cgroup{Path: sel.Path, ID: sel.ID, Level: level(sel), Present: true, Held: false})
	send(t, lab, h, last)
	m.want(1, true, "in the cgroup that had no room")
}
