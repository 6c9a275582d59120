package cgroupsel_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// Namespaces above the bounds are counted, shown, and left to on_exit at once;
// they harm nobody else. When there is room they are attached.
func TestNamespacesAreBounded(t *testing.T) {
	labtest.Alone(t)
	for closed, left := range map[bool]string{false: "sent", true: denied} {
		t.Run(fmt.Sprintf("closed %v", closed), func(t *testing.T) {
			lab, _, _ := newLab(t)
			sel, other := lab.Cgroup("sel"), lab.Cgroup("other")
			selections := one(sel.Path, other.Path)
			selections[0].Closed = closed
			t.Cleanup(func() { removePins(t) })
			s := newSelector(t, cgroupsel.Options{Selections: selections, Instance: pinner, MaxPerCgroup: 2, MaxNamespaces: 3})
			m := manage(t, s, &manager{}).arm()
			spaces, inside := map[string]*labtest.Host{}, map[string]*helper{}
			enter := func(name string, c *labtest.Cgroup, want string) {
				t.Helper()
				spaces[name], _ = newSpace(lab, name)
				p := stay(t, lab, spaces[name], c)
				inside[name] = p
				p.tell("go")
				if got := p.line(); got != want {
					t.Errorf("%s: %s, want %s", name, got, want)
				}
				ns, _ := m.find(spaces[name])
				if (ns.Excess != nil) != (want == left) {
					t.Errorf("%s: excess %v", name, ns.Excess)
				}
			}
			for i, want := range []string{attached, attached, left, left} {
				enter(fmt.Sprintf("s%d", i), sel, want)
			}
			enter("t0", other, attached)
			enter("t1", other, left) // the fourth in all
			if n := s.Counters(); n.Excess != 3 || n.Late != 0 {
				t.Errorf("counters %+v", n)
			}

			inside["t0"].proc.Signal(syscall.SIGKILL)
			_ = inside["t0"].proc.Wait()
			forget := func() {
				for _, ns := range s.Snapshot().Namespaces {
					if ns.Idle {
						s.Forget(ns.Ref)
					}
				}
			}
			labtest.Eventually(t, 20*time.Second, func() bool {
				forget()
				inside["t1"].tell("go")
				return inside["t1"].line() == attached
			}, "it is attached when there is room")
		})
	}
}

// The bounds that a user has: 256 namespaces of one cgroup, 1,024 in all.
func TestDefaultBounds(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	lab, _, _ := newLab(t)
	var cgroups []*labtest.Cgroup
	var paths []string
	for i := range 5 {
		cgroups = append(cgroups, lab.Cgroup(fmt.Sprintf("sel%d", i)))
		paths = append(paths, cgroups[i].Path)
	}
	s := newSelector(t, cgroupsel.Options{Selections: one(paths...)})
	m := &manager{Decide: func(ns cgroupsel.Namespace) {
		if err := s.Admit(ns.Ref, cgroupsel.Admission{Offline: true}); err != nil {
			t.Error(err)
		}
	}}
	manage(t, s, m).arm()
	// becomes waits until so many are to be attached, and so many are not.
	becomes := func(within, excess int) {
		t.Helper()
		var is, isNot int
		labtest.Eventually(t, time.Minute, func() bool {
			all := s.Snapshot().Namespaces
			isNot = 0
			for _, ns := range all {
				if ns.Excess != nil {
					isNot++
				}
			}
			is = len(all) - isNot
			return is+isNot >= within+excess
		}, "%d namespaces", within+excess)
		if is != within || isNot != excess {
			t.Errorf("%d are to be attached and %d are not, want %d and %d", is, isNot, within, excess)
		}
	}
	enter := func(c *labtest.Cgroup, n int) {
		cmd := exec.Command("sh", "-c", fmt.Sprintf("for i in $(seq %d); do unshare -n sleep 1000 & done; wait", n))
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := c.Command(cmd).Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			_ = cmd.Wait()
			if err != nil && !errors.Is(err, syscall.ESRCH) {
				t.Error(err)
			}
			labtest.Eventually(t, time.Minute, func() bool {
				left, err := os.ReadFile(c.Dir + "/cgroup.procs")
				return err == nil && len(left) == 0
			}, "those who were killed have gone")
		})
	}
	enter(cgroups[0], 257)
	becomes(256, 1)
	for _, c := range cgroups[1:4] {
		enter(c, 256)
	}
	becomes(1024, 1)
	enter(cgroups[4], 1)
	becomes(1024, 2)
	// How many are decided about in time is not what this shows: on a busy
	// machine a thousand at once can take longer than that.
	if n := s.Counters(); n.Excess != 2 {
		t.Errorf("counters %+v", n)
	}
}
