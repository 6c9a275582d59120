package cgroupsel_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
)

// TestFilters: in a namespace that comes and goes frames are kept by a filter where that
// can work, by a link else, and what others have at the device is theirs.
func TestFilters(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path)})
	for i, tt := range []struct {
		name   string
		before func(t *testing.T, space *labtest.Host, ref netns.Ref, eth0 cgroupsel.Device)
		filter bool   // is the way
		left   string // of others, when it is forgotten
	}{
		{"nobody else", func(*testing.T, *labtest.Host, netns.Ref, cgroupsel.Device) {}, true, ""},
		{"a filter of somebody else that lets all pass", func(t *testing.T, space *labtest.Host, ref netns.Ref, eth0 cgroupsel.Device) {
			space.Run("tc", "qdisc", "add", "dev", "eth0", "clsact")
			passingFilter(t, ref, eth0.Index, 5)
		}, true, "passing"},
		{"one in the first place", func(t *testing.T, space *labtest.Host, ref netns.Ref, eth0 cgroupsel.Device) {
			space.Run("tc", "qdisc", "add", "dev", "eth0", "clsact")
			passingFilter(t, ref, eth0.Index, 1)
		}, true, "passing"},
		{"an empty clsact of somebody else", func(t *testing.T, space *labtest.Host, _ netns.Ref, _ cgroupsel.Device) {
			space.Run("tc", "qdisc", "add", "dev", "eth0", "clsact")
		}, true, "clsact"},
		{"an ingress qdisc of somebody else", func(t *testing.T, space *labtest.Host, _ netns.Ref, _ cgroupsel.Device) {
			space.Run("tc", "qdisc", "add", "dev", "eth0", "ingress")
		}, false, "ingress"},
		{"a program of somebody else that lets all pass", func(t *testing.T, _ *labtest.Host, ref netns.Ref, eth0 cgroupsel.Device) {
			passing(t, ref, eth0.Index)
		}, false, ""},
		{"a filter of who has died", func(t *testing.T, space *labtest.Host, ref netns.Ref, eth0 cgroupsel.Device) {
			if err := s.GuardFrames(ref, cgroupsel.AnyCgroup, eth0); err != nil {
				t.Fatal(err)
			}
			if err := s.DieFilters(); err != nil {
				t.Fatal(err)
			}
			s.Forget(ref)
			labtest.Eventually(t, 10*time.Second, func() bool { return sendsIn(t, space, sel) == saysOfFrames(nil, unix.EPERM) }, "it does nothing")
		}, true, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			space, _ := newSpace(lab, fmt.Sprint("f", i))
			ref, err := netns.Named(space.Path)
			if err != nil {
				t.Fatal(err)
			}
			eth0 := cgroupsel.Device{Index: device(t, space, "eth0"), Ethernet: true, Passing: true}
			tt.before(t, space, ref, eth0)
			if err := s.GuardFrames(ref, cgroupsel.AnyCgroup, eth0); err != nil {
				t.Fatal(err)
			}
			if got := sendsIn(t, space, sel); got != saysOfFrames(unix.ENOBUFS, unix.EPERM) {
				t.Errorf("guarded:\n%s", got)
			}
			if n := strings.Count(space.Run("tc", "filter", "show", "dev", "eth0", "egress"), " cgtun_frames"); n > 1 || n == 1 != tt.filter {
				t.Errorf("%d filters, want one: %t", n, tt.filter)
			}
			s.Forget(ref)
			if got := sendsIn(t, space, sel); got != saysOfFrames(nil, unix.EPERM) {
				t.Errorf("forgotten:\n%s", got)
			}
			left := space.Run("tc", "qdisc", "show", "dev", "eth0") + space.Run("tc", "filter", "show", "dev", "eth0", "egress")
			if !strings.Contains(left, tt.left) || strings.Contains(left, "cgtun") || tt.left == "" && strings.Contains(left, "clsact") {
				t.Errorf("left: %s", left)
			}
		})
	}
}

// passing attaches a program that lets everything pass.
func passing(t *testing.T, ref netns.Ref, device int) {
	t.Helper()
	err := ref.Do(func() error {
		lk, err := link.AttachTCX(link.TCXOptions{Interface: device, Program: passingProgram(t), Attach: ebpf.AttachTCXEgress})
		if err == nil {
			t.Cleanup(func() { lk.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// passingFilter adds a filter that lets everything pass, and asks no other.
func passingFilter(t *testing.T, ref netns.Ref, device int, priority uint16) {
	t.Helper()
	p := passingProgram(t)
	err := ref.Do(func() error {
		return netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: device, Parent: netlink.HANDLE_MIN_EGRESS, Protocol: unix.ETH_P_ALL, Priority: priority},
			Fd:          p.FD(), Name: "passing", DirectAction: true,
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func passingProgram(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// TestFiltersOfTheDead: what is left at devices does nothing, and is removed; what works
// is left alone.
func TestFiltersOfTheDead(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path)})
	space, _ := newSpace(lab, "f")
	ref, err := netns.Named(space.Path)
	if err != nil {
		t.Fatal(err)
	}
	eth0 := cgroupsel.Device{Index: device(t, space, "eth0"), Ethernet: true, Passing: true}
	guard := func() {
		t.Helper()
		if err := s.GuardFrames(ref, cgroupsel.AnyCgroup, eth0); err != nil {
			t.Fatal(err)
		}
	}
	removed := func(want int) {
		t.Helper()
		if n, err := cgroupsel.RemoveFilters(ref); n != want || err != nil {
			t.Errorf("%d removed, %v, want %d", n, err, want)
		}
	}
	removed(0)
	guard()
	removed(0)
	if got := sendsIn(t, space, sel); got != saysOfFrames(unix.ENOBUFS, unix.EPERM) {
		t.Errorf("beside a removal:\n%s", got)
	}
	if err := s.DieFilters(); err != nil {
		t.Fatal(err)
	}
	free := saysOfFrames(nil, unix.EPERM)
	labtest.Eventually(t, 10*time.Second, func() bool { return sendsIn(t, space, sel) == free }, "what is left does nothing")
	removed(1)
	if left := space.Run("tc", "qdisc", "show", "dev", "eth0"); strings.Contains(left, "clsact") {
		t.Errorf("left: %s", left)
	}
	s.Forget(ref)

	// It is let go by a way that has ended: what cannot be taken away does nothing.
	visitor := exec.Command("nsenter", "--net="+space.Path, "sleep", "100")
	if err := visitor.Start(); err != nil {
		t.Fatal(err)
	}
	var by netns.Ref
	labtest.Eventually(t, 5*time.Second, func() bool {
		by, err = netns.Named(fmt.Sprintf("/proc/%d/ns/net", visitor.Process.Pid))
		return err == nil && by.Cookie() == ref.Cookie()
	}, "there is another way in")
	if err := s.GuardFrames(by, cgroupsel.AnyCgroup, eth0); err != nil {
		t.Fatal(err)
	}
	_ = visitor.Process.Kill()
	_ = visitor.Wait()
	s.Forget(by)
	labtest.Eventually(t, 10*time.Second, func() bool { return sendsIn(t, space, sel) == free }, "what was let go does nothing")
	removed(1)
}
