package cgroupsel_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

const testMark = 0x65

// All lab tests are one namespace, whose loopback is all the network there is:
//
//	┌ host ───────────────────────────────┐
//	│ helper in a cgroup ── lo ── nobody  │
//	│        nft output: counts by mark   │
//	└─────────────────────────────────────┘
func newLab(t *testing.T) (*labtest.Lab, *labtest.Host, *meter) {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("ip"), labtest.Tool("nft"))
	lab := labtest.New(t)
	h := lab.Host("host")
	return lab, h, newMeter(t, h, testMark, 0xff)
}

func newSelector(t *testing.T, o cgroupsel.Options) *cgroupsel.Selector {
	t.Helper()
	for i := range o.Selections {
		if o.Selections[i].Mark == 0 {
			o.Selections[i].Mark, o.Selections[i].Mask = testMark, 0xff
		}
	}
	if o.Instance == "" {
		o.Instance = filepath.Base(t.Name())
		if len(o.Instance) > 32 {
			o.Instance = o.Instance[:32]
		}
	}
	if o.Patience == 0 {
		o.Patience = 2 * time.Second
	}
	s, err := cgroupsel.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// level is the depth of a cgroup.
func level(c *labtest.Cgroup) int { return strings.Count(c.Path, "/") }

func fullySelected(t *testing.T, s *cgroupsel.Selector) {
	t.Helper()
	for _, f := range s.Features() {
		if f.Err != nil {
			t.Fatalf("feature: %v", f.Err)
		}
	}
	for _, c := range s.Snapshot().Cgroups {
		if !c.Held {
			t.Fatalf("%s is not held", c.Path)
		}
	}
}

func selected(s *cgroupsel.Selector, cgroup string) bool {
	_, ok := s.Selected(cgroup)
	return ok
}

func send(t *testing.T, lab *labtest.Lab, h *labtest.Host, c *labtest.Cgroup) {
	t.Helper()
	startHelper(t, lab, h, c, "send").wait()
}

func TestSelectedCgroupsAreMarked(t *testing.T) {
	lab, h, m := newLab(t)
	sel := lab.Cgroup("sel")
	older := lab.Cgroup("sel/older/deep")
	sibling := lab.Cgroup("selx")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}})
	fullySelected(t, s)
	younger := lab.Cgroup("sel/younger/deep")
	youngSibling := lab.Cgroup("selx/sel")
	for _, tt := range []struct {
		name   string
		c      *labtest.Cgroup
		marked bool
	}{
		{"the cgroup", sel, true},
		{"an older child", older, true},
		{"a younger child", younger, true},
		{"one with the same prefix", sibling, false},
		{"a child of that", youngSibling, false},
		{"the root", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			send(t, lab, h, tt.c)
			m.want(1, tt.marked, tt.name)
			if tt.c != nil && selected(s, tt.c.Path) != tt.marked {
				t.Errorf("Selected(%s) = %v", tt.c.Path, !tt.marked)
			}
		})
	}
	if n := s.Counters(); n != (cgroupsel.Counters{}) {
		t.Errorf("counters: %+v", n)
	}
}

func TestForeignBitsOfTheMarkStay(t *testing.T) {
	lab, h, _ := newLab(t)
	sel := lab.Cgroup("sel")
	newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}})
	whole := newMeter(t, h, 0xab65, 0xffffffff)
	whole.read()
	t.Setenv("SEND_MARK", "43776") // 0xab00
	p := startHelper(t, lab, h, sel, "send")
	p.wait()
	got := whole.read()
	// A mark set after socket() is merged again at connect; sendto has no hook.
	for _, kind := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
		if got[kind+"_yes"] != 2 { // by both meters
			t.Errorf("%s: counts %v, want its mark to be 0xab65", kind, got)
		}
	}
}

// A process that is moved in has sockets that are older: they are marked when
// they are connected.
func TestMovedProcessIsMarkedAtConnect(t *testing.T) {
	lab, h, m := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}})
	p := startHelper(t, lab, h, nil, "send", "wait")
	if got := p.line(); got != "ready" {
		t.Fatal(got)
	}
	fd := pidfd(t, p.proc.Pid)
	if _, err := s.Join(sel.Path, fd); err != nil {
		t.Fatal(err)
	}
	if got, err := cgroupsel.CgroupOf(p.proc.Pid); got != sel.Path || err != nil {
		t.Fatalf("cgroup of the process: %q, %v", got, err)
	}
	p.tell("go")
	p.wait()
	got := m.read()
	for _, kind := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
		if got[kind+"_yes"] != 1 || got[kind+"_no"] != 0 {
			t.Errorf("%s: %v", kind, got)
		}
	}
}

func TestV1CgroupOfTheSamePathDoesNotMatter(t *testing.T) {
	const v1 = "/sys/fs/cgroup/pids"
	lab, _, _ := newLab(t)
	if _, err := os.Stat(v1); err != nil {
		t.Log("no cgroup v1 on this machine: nothing to confuse")
		return
	}
	top := lab.Cgroup("top")
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{top.Path + "/sel"}}}})
	old := filepath.Join(v1, top.Path, "sel")
	if err := os.MkdirAll(old, 0o755); err != nil {
		t.Fatal(err)
	}
	// Renamed away, and to the path again.
	if err := errors.Join(os.Rename(old, old+"x"), os.Rename(old+"x", old)); err != nil {
		t.Fatal(err)
	}
	got := s.SelectedIDs()
	for dir := old; dir != v1; dir = filepath.Dir(dir) {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	}
	if len(got) != 0 {
		t.Errorf("ids %v selected by a v1 cgroup", got)
	}
	lab.Cgroup("top/sel")
	if got := s.SelectedIDs(); len(got) != 1 {
		t.Errorf("ids %v selected, want that of the v2 cgroup", got)
	}
}

// A cgroup2 cannot be renamed: what is selected by its path keeps it, and is removed
// and made again or not at all.
func TestCgroupCannotBeRenamed(t *testing.T) {
	lab, h, m := newLab(t)
	sel := lab.Cgroup("sel")
	newSelector(t, cgroupsel.Options{Selections: one(sel.Path)})
	if err := os.Rename(sel.Dir, sel.Dir+"x"); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("rename: %v, want that the kernel does not permit it", err)
	}
	send(t, lab, h, sel)
	m.want(1, true, "under its own name")
}
