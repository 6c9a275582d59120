package cgroupsel_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// pinner is an instance of this test process alone: pins are the machine's.
var pinner = fmt.Sprintf("test%d", os.Getpid())

// removePins removes those of pinner and returns how many there were.
func removePins(t *testing.T) int {
	t.Helper()
	found, err := cgroupsel.FindPins(pinner)
	if err != nil {
		t.Error(err)
	}
	for _, p := range found {
		if ok, err := cgroupsel.RemovePins(p.Home, p.Instance); !ok || err != nil {
			t.Errorf("remove pins: %v, %v", ok, err)
		}
	}
	return len(found)
}

// twoWays is a namespace with an uplink and, in place of a tun, a second link
// that is preferred.
//
//	        ┌ eth0 ──── far  (10.9.0.2): counts what passes beside the tun
//	space ──┤
//	        └ eth1 ──── sink (10.9.0.2): counts what goes through it
type twoWays struct {
	space        *labtest.Host
	beside, into *labtest.Meter
}

func newTwoWays(lab *labtest.Lab, name string) twoWays {
	space, beside := newSpace(lab, name)
	sink := lab.Host(name + "sink")
	lab.Link(space, sink, "10.8.0.1/24", "10.8.0.2/24")
	space.Run("ip", "route", "add", "10.9.0.2/32", "via", "10.8.0.2", "dev", "eth1")
	return twoWays{space, beside, sink.MeterMatch("udp dport 7000")}
}

// cut is what happens to the tun when its process dies.
func (w twoWays) cut() { w.space.Run("ip", "link", "del", "eth1") }

// owner is a cgtun of its own process, killed when it is told to.
func startOwner(t *testing.T, lab *labtest.Lab, behind []string, o cgroupsel.Options) *helper {
	t.Helper()
	words := append(append([]string{}, behind...), self(t), asJSON(t, o))
	p := startCommand(t, lab, exec.Command(words[0], words[1:]...), nil, "hold")
	if got := p.line(); got != "armed" {
		t.Fatal(got)
	}
	return p
}

// wantPins looks for the pins of an instance, whose live process is pid, or 0.
func wantPins(t *testing.T, instance string, want bool, pid int) {
	t.Helper()
	found, err := cgroupsel.FindPins(instance)
	if err != nil || (len(found) == 1) != want {
		t.Fatalf("pins %+v, %v, want some: %v", found, err, want)
	}
	if want && found[0].PID != pid {
		t.Errorf("pins of process %d, want %d", found[0].PID, pid)
	}
}

// After kill -9 with on_exit closed nothing of a selected cgroup leaves beside
// the tun, also of one that is made again, from home, from a namespace that was
// attached, and from one that nobody knew.
func TestClosedStaysClosedAfterKill(t *testing.T) {
	labtest.Alone(t)
	for _, tt := range []struct {
		name    string
		exec    bool // started by `ip netns exec`
		closed  bool
		without []string
	}{
		{"closed", false, true, nil},
		{"closed, started by ip netns exec", true, true, nil},
		{"closed, as before 6.15", false, true, []string{cgroupsel.FeatureCookie}},
		{"open", false, false, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab, _, _ := newLab(t)
			top := lab.Cgroup("top")
			sel := lab.Cgroup("top/sel")
			home, space, later := newTwoWays(lab, "home"), newTwoWays(lab, "s"), newTwoWays(lab, "later")
			sels := one(sel.Path)
			sels[0].Closed = tt.closed
			opts := cgroupsel.Options{Selections: sels, Instance: pinner, Without: tt.without}
			t.Cleanup(func() { removePins(t) })
			senders := []*helper{startHelper(t, lab, home.space, sel, "sender"), startHelper(t, lab, space.space, sel, "sender")}
			behind := []string{"nsenter", "--net=" + home.space.Path}
			if tt.exec {
				behind = []string{"ip", "netns", "exec", home.space.Name}
			}
			sending := func() bool { return home.into.Packets() > 100 && space.into.Packets() > 100 }
			labtest.Eventually(t, 10*time.Second, sending, "both send")
			owner := startOwner(t, lab, behind, opts)
			if tt.closed { // else nobody admits the other namespace
				home.into.Reset()
				space.into.Reset()
				labtest.Eventually(t, 10*time.Second, sending, "both are admitted")
			}
			home.beside.Reset()
			space.beside.Reset()
			wantPins(t, pinner, tt.closed, owner.proc.Pid)
			owner.kill()
			home.cut()
			space.cut()
			if !tt.closed {
				labtest.Eventually(t, 10*time.Second, func() bool { return home.beside.Packets() > 10 && space.beside.Packets() > 10 }, "open: it goes on by the uplink")
				return
			}
			if got := first(t, sel, exec.Command("nsenter", "--net="+later.space.Path, self(t))); got != denied {
				t.Errorf("in a namespace that nobody knew: %s", got)
			}
			for _, s := range senders {
				s.kill()
			}
			removeDir(t, sel.Dir)
			again := lab.Cgroup("top/sel")
			for _, w := range []twoWays{home, space} {
				if got := first(t, again, exec.Command("nsenter", "--net="+w.space.Path, self(t))); got != denied {
					t.Errorf("in %s, made again: %s", w.space.Name, got)
				}
				if got := first(t, top, exec.Command("nsenter", "--net="+w.space.Path, self(t))); got != "sent" {
					t.Errorf("in %s, unselected: %s", w.space.Name, got)
				}
				if n := w.beside.Packets(); n != 1 {
					t.Errorf("%s: %d packets beside the tun, want that of the unselected process alone", w.space.Name, n)
				}
			}
			if n := later.into.Packets() + later.beside.Packets(); n != 0 {
				t.Errorf("%d packets from the unknown namespace", n)
			}
			if n := removePins(t); n != 1 {
				t.Errorf("%d directories of pins, want 1", n)
			}
			wantPins(t, pinner, false, 0)
			if got := first(t, again, exec.Command("nsenter", "--net="+home.space.Path, self(t))); got != "sent" {
				t.Errorf("opened: %s", got)
			}
		})
	}
}

// A start takes over what its dead predecessor left: shut until its own gate
// is, and open after it if that is wanted now.
func TestNextStartTakesOverThePins(t *testing.T) {
	labtest.Alone(t)
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	sels := one(sel.Path)
	sels[0].Closed = true
	opts := cgroupsel.Options{Selections: sels, Instance: pinner}
	t.Cleanup(func() { removePins(t) })
	for range 3 {
		owner := startOwner(t, lab, nil, opts)
		owner.kill()
		wantPins(t, pinner, true, 0)
	}
	if _, err := cgroupsel.New(cgroupsel.Options{Selections: one(sel.Path), Instance: "other"}); err == nil || !strings.Contains(err.Error(), "instance "+pinner) {
		t.Errorf("another instance: %v, want that it is taken", err)
	}
	t.Run("open", func(t *testing.T) {
		s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Instance: pinner})
		m := manage(t, s, undecided())
		wantPins(t, pinner, true, 0)
		space, _ := newSpace(lab, "s")
		if got := first(t, sel, exec.Command("nsenter", "--net="+space.Path, self(t))); got != denied {
			t.Errorf("before Arm: %s", got)
		}
		m.arm()
		wantPins(t, pinner, false, 0)
	})
	// Others may pin at the same time.
	labtest.Eventually(t, 10*time.Second, func() bool {
		all, err := cgroupsel.FindPins()
		if err != nil {
			t.Error(err)
		}
		return len(all) > 0 || !there("/run/cgtun/bpf")
	}, "our bpffs is gone")
}
