package cgroupsel_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

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
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{deep, used}, Create: true}}, Instance: "made"})
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

// An instance that lives holds what it made, empty or not; one of the same
// number in another namespace neither removes it nor takes it for its own.
func TestMadeCgroupsOfTheLivingStay(t *testing.T) {
	lab, _, _ := newLab(t)
	top := lab.Cgroup("top")
	path := top.Path + "/sel"
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{path}, Create: true}}, Instance: "twice"})
	found, err := cgroupsel.Find("twice")
	if err != nil || len(found) != 1 || !found[0].Alive {
		t.Errorf("Find: %+v %v", found, err)
	}
	if removed, err := cgroupsel.Remove("twice"); err != nil || len(removed) != 0 {
		t.Errorf("removed %q of a live instance, %v", removed, err)
	}
	ours, end, err := cgroupsel.MakeAgain(path, "twice")
	if err != nil || len(ours) != 0 {
		t.Errorf("the second of the number takes %q for its own, %v", ours, err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if there(filepath.Join(top.Dir, "sel")) {
		t.Error("the cgroup is still there")
	}
}

// Who cleans up takes nothing that an instance has taken over since it was found, and
// that does not steer yet.
func TestWhatIsTakenOverIsNotCleanedUp(t *testing.T) {
	lab, _, _ := newLab(t)
	path, name := lab.Cgroup("top").Path+"/sel", "over"
	for range 2 { // made, and taken over
		_, end, err := cgroupsel.MakeAgain(path, name)
		if err != nil {
			t.Fatal(err)
		}
		if removed, err := cgroupsel.RemoveFound(path, name); removed || err != nil {
			t.Errorf("removed while it is held: %v, %v", removed, err)
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	}
	if removed, err := cgroupsel.RemoveFound(path, name); !removed || err != nil {
		t.Errorf("of a dead one: %v, %v", removed, err)
	}
}

func TestWithoutCreateNothingIsMade(t *testing.T) {
	lab, _, _ := newLab(t)
	top := lab.Cgroup("top")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{top.Path + "/sel"}}}, Instance: "none"})
	if there(filepath.Join(top.Dir, "sel")) || s.Snapshot().Cgroups[0].Present {
		t.Error("it was made")
	}
	fd := pidfd(t, os.Getpid())
	if _, err := s.Join(top.Path+"/sel", fd); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("join: %v, want that it does not exist", err)
	}
}

// What somebody removed and made again is no longer ours.
func TestCgroupMadeAgainByOthersStays(t *testing.T) {
	lab, _, _ := newLab(t)
	top := lab.Cgroup("top")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{top.Path + "/sel"}, Create: true}}, Instance: "again"})
	removeDir(t, filepath.Join(top.Dir, "sel"))
	theirs := lab.Cgroup("top/sel")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if !there(theirs.Dir) {
		t.Error("it is gone")
	}
}

// Two instances mark each its own, under its own mask.
func TestTwoSelectorsSideBySide(t *testing.T) {
	lab, h, m := newLab(t)
	a, b := lab.Cgroup("a"), lab.Cgroup("b")
	first := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{a.Path}}}, Instance: "a"})
	second := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{b.Path}, Mark: 0x6600, Mask: 0xff00}}, Instance: "b"})
	newMeter(t, h, 0x6600, 0xff00)
	m.read()
	send(t, lab, h, a)
	if got := m.read(); got["udp4_yes"] != 1 || got["udp4_no"] != 1 {
		t.Errorf("in a: %v, want the mark of one", got)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	send(t, lab, h, a)
	m.want(2, false, "in a, without its selector")
	send(t, lab, h, b)
	if got := m.read(); got["udp4_yes"] != 1 || got["udp4_no"] != 1 {
		t.Errorf("in b: %v, want the mark of the other", got)
	}
	if selected(second, a.Path) || !selected(second, b.Path) {
		t.Error("the second selects what is the first's")
	}
}

// What a glob selects is taken, too, whichever of the two instances has it.
func TestCgroupThatAGlobSelectsIsTaken(t *testing.T) {
	for _, tt := range []struct {
		name          string
		first, second string
		taken         bool
	}{
		{"by a plain path, wanted by a glob", "/a", "/*", true},
		{"by a glob, wanted by a plain path", "/*", "/a", true},
		{"by a glob, wanted by a plain path below", "/*", "/a/b", true},
		{"by two globs", "/a*", "/*a", true},
		{"by none", "/a", "/b*", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab, _, _ := newLab(t)
			top := lab.Cgroup("top")
			lab.Cgroup("top/a/b")
			newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{top.Path + tt.first}}}, Instance: "301"})
			s, err := cgroupsel.New(cgroupsel.Options{
				Selections: []cgroupsel.Selection{{Cgroups: []string{top.Path + tt.second}, Mark: 0x6600, Mask: 0xff00}}, Instance: "302",
			})
			var taken *cgroupsel.TakenError
			if errors.As(err, &taken) != tt.taken || (err != nil) != tt.taken {
				t.Errorf("the second starts with %v", err)
			}
			if err == nil {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestCgroupOfALiveInstanceIsTaken(t *testing.T) {
	lab, _, _ := newLab(t)
	top := lab.Cgroup("top")
	held := top.Path + "/a"
	newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{held}}}, Instance: "101"})
	for _, tt := range []struct{ name, path string }{
		{"the same", held},
		{"above it", top.Path},
		{"below it", held + "/b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			s, err := cgroupsel.New(cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{tt.path}, Create: true}}, Instance: "102"})
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("the refusal took %v, as if the other were dead", took)
			}
			if err == nil {
				s.Close()
				t.Fatal("selected twice")
			}
			var taken *cgroupsel.TakenError
			want := cgroupsel.TakenError{Cgroup: tt.path, Held: held, Instance: "101", PID: os.Getpid()}
			if !errors.As(err, &taken) || *taken != want {
				t.Errorf("error %v, want %v", err, &want)
			}
			if found, err := cgroupsel.Find("102"); err != nil || len(found) != 0 {
				t.Errorf("it made %v, %v", found, err)
			}
		})
	}
}

func TestBadOptionsAreRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    cgroupsel.Options
	}{
		{"no instance", cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/a"}}}}},
		{"instance with a slash", cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/a"}}}, Instance: "a/b"}},
		{"relative path", cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"a"}}}, Instance: "1"}},
		{"slash at the end", cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/a/"}}}, Instance: "1"}},
		{"way out", cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/a/../b"}}}, Instance: "1"}},
		{"too long", cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/" + string(make([]byte, 255))}}}, Instance: "1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if s, err := cgroupsel.New(tt.o); err == nil {
				s.Close()
				t.Error("taken")
			}
		})
	}
}
