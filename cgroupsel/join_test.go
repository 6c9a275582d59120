package cgroupsel_test

import (
	"errors"
	"os"
	"testing"

	"cgtun/cgroupsel"

	"golang.org/x/sys/unix"
)

func pidfd(t *testing.T, pid int) *os.File {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	t.Cleanup(func() { f.Close() })
	return f
}

func TestJoinAndLeave(t *testing.T) {
	lab, h, _ := newLab(t)
	top := lab.Cgroup("top")
	sel := top.Path + "/sel"
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel}, Create: true}}, Instance: "join"})
	p := startHelper(t, lab, h, top, "send", "wait")
	p.line()
	fd := pidfd(t, p.proc.Pid)
	in := func(want string) {
		t.Helper()
		if got, err := cgroupsel.CgroupOf(p.proc.Pid); got != want || err != nil {
			t.Errorf("the process is in %q, %v, want %s", got, err, want)
		}
	}
	if _, err := s.Join(top.Path, fd); !errors.Is(err, cgroupsel.ErrNotSelected) {
		t.Errorf("join what is not selected: %v", err)
	}
	for _, odd := range []string{sel + "/..", sel + "/../other", sel + "/./job", sel + "/"} {
		if _, err := s.Join(odd, fd); !errors.Is(err, cgroupsel.ErrNotSelected) {
			t.Errorf("join %s, which leads out or is no clean path: %v", odd, err)
		}
	}
	in(top.Path)
	if _, err := s.Join(sel+"/job", fd); err != nil {
		t.Errorf("join a child that is not there yet: %v", err)
	}
	in(sel + "/job")
	if err := s.Leave(fd); err != nil {
		t.Errorf("leave: %v", err)
	}
	in("/")
	p.kill()
	if _, err := s.Join(sel, fd); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("join of a dead process: %v", err)
	}
	if _, err := s.Join(sel, os.Stdin); err == nil {
		t.Error("join of what is no process")
	}
}

func TestPathsAndIDs(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	odd := lab.Cgroup("sel/odd (deleted)")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}, Instance: "ids"})
	for _, c := range []struct {
		path string
		id   uint64
	}{{sel.Path, sel.ID}, {odd.Path, odd.ID}, {"/", 1}} {
		if got, ok := s.PathByID(c.id); got != c.path || !ok {
			t.Errorf("PathByID(%d) = %q, %v, want %s", c.id, got, ok, c.path)
		}
		if got, ok := s.IDByPath(c.path); got != c.id || !ok {
			t.Errorf("IDByPath(%s) = %d, %v, want %d", c.path, got, ok, c.id)
		}
	}
	gone := lab.Cgroup("sel/gone")
	if _, ok := s.PathByID(odd.ID); !ok {
		t.Error("not found again")
	}
	removeDir(t, gone.Dir)
	if got, ok := s.PathByID(gone.ID); ok {
		t.Errorf("a removed cgroup is at %s", got)
	}
	removeDir(t, odd.Dir)
	if got, _ := s.PathByID(odd.ID); got != odd.Path {
		t.Errorf("a removed cgroup that was asked for before: %q", got)
	}
}
