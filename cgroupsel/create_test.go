package cgroupsel_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"cgtun/cgroupsel"
)

func there(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}

func TestMadeCgroupsGoAtTheEnd(t *testing.T) {
	lab, h, _ := newLab(t)
	top := lab.Cgroup("top")
	deep := top.Path + "/a/b/sel"
	used := top.Path + "/used/sel"
	s := newSelector(t, cgroupsel.Options{Cgroups: []string{deep, used}, Create: true, Instance: "made"})
	wantFound(t, "made", top.Path+"/a", top.Path+"/a/b", deep, top.Path+"/used", used)
	if found, err := cgroupsel.Find("another"); err != nil || len(found) != 0 {
		t.Errorf("another instance made %v, %v", found, err)
	}
	// A cgroup that somebody else made below keeps its parents.
	foreign := lab.Cgroup("top/used/sel/foreign")
	// And so does a process; `cleanup` leaves it alone as well.
	p := startHelper(t, lab, h, lab.Cgroup("top/a/b/sel"), "send", "wait")
	p.line()
	if removed, err := cgroupsel.Remove("made"); err != nil || len(removed) != 0 {
		t.Errorf("removed %q in use, %v", removed, err)
	}
	p.kill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if there(filepath.Join(top.Dir, "a")) {
		t.Error("/a is still there")
	}
	if !there(foreign.Dir) {
		t.Error("somebody else's cgroup is gone")
	}
	removeDir(t, foreign.Dir)
	if removed, err := cgroupsel.Remove("made"); err != nil || len(removed) != 2 {
		t.Errorf("removed %q, %v", removed, err)
	}
	if !there(top.Dir) {
		t.Error("the parent that was there before is gone")
	}
}

func TestWithoutCreateNothingIsMade(t *testing.T) {
	lab, _, _ := newLab(t)
	top := lab.Cgroup("top")
	s := newSelector(t, cgroupsel.Options{Cgroups: []string{top.Path + "/sel"}, Instance: "none"})
	if there(filepath.Join(top.Dir, "sel")) || s.Snapshot().Cgroups[0].Present {
		t.Error("it was made")
	}
	fd := pidfd(t, os.Getpid())
	if err := s.Join(top.Path+"/sel", fd); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("join: %v, want that it does not exist", err)
	}
}

// Two instances mark each its own, under its own mask.
func TestTwoSelectorsSideBySide(t *testing.T) {
	lab, h, m := newLab(t)
	a, b := lab.Cgroup("a"), lab.Cgroup("b")
	newSelector(t, cgroupsel.Options{Cgroups: []string{a.Path}, Instance: "a"})
	second := newSelector(t, cgroupsel.Options{Cgroups: []string{b.Path}, Mark: 0x6600, Mask: 0xff00, Instance: "b"})
	third, err := cgroupsel.New(cgroupsel.Options{Cgroups: []string{a.Path}, Mark: 0x7700, Mask: 0xff00, Instance: "c"})
	if err != nil {
		t.Fatal(err)
	}
	both := newMeter(t, h, 0x7765, 0xffff)
	m.read()
	send(t, lab, h, a)
	m.want(2, true, "in a: both bits, seen by both meters")
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	send(t, lab, h, a)
	if got := both.read(); got["udp4_yes"] != 1 || got["udp4_no"] != 1 {
		t.Errorf("in a, with the other gone: %v, want the mark of one", got)
	}
	send(t, lab, h, b)
	if got := m.read(); got["udp4_yes"] != 0 || got["udp4_no"] != 2 {
		t.Errorf("in b: %v, want the mark of neither", got)
	}
	if second.Selected(a.Path) || !second.Selected(b.Path) {
		t.Error("the second selects what is the first's")
	}
}

func TestBadOptionsAreRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    cgroupsel.Options
	}{
		{"no instance", cgroupsel.Options{Cgroups: []string{"/a"}}},
		{"instance with a slash", cgroupsel.Options{Cgroups: []string{"/a"}, Instance: "a/b"}},
		{"relative path", cgroupsel.Options{Cgroups: []string{"a"}, Instance: "1"}},
		{"slash at the end", cgroupsel.Options{Cgroups: []string{"/a/"}, Instance: "1"}},
		{"way out", cgroupsel.Options{Cgroups: []string{"/a/../b"}, Instance: "1"}},
		{"too long", cgroupsel.Options{Cgroups: []string{"/" + string(make([]byte, 255))}, Instance: "1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if s, err := cgroupsel.New(tt.o); err == nil {
				s.Close()
				t.Error("taken")
			}
		})
	}
}
