package cgroupsel_test

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"testing"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
)

// device is the index of a device in a namespace.
func device(t *testing.T, h *labtest.Host, name string) (index int) {
	t.Helper()
	err := h.Do(func() error {
		dev, err := net.InterfaceByName(name)
		if err == nil {
			index = dev.Index
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func TestGateDropsWhatLeavesAnUnknownNamespace(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	// Without the hold everything hangs on the gate.
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: []string{cgroupsel.FeatureHold}})
	m := manage(t, s, undecided())
	space, meter := newSpace(lab, "s")
	p := stay(t, lab, space, sel)
	other := stay(t, lab, space, nil)
	sends := func(what string, p *helper, want string, packets uint64) {
		t.Helper()
		meter.Reset()
		before := s.Counters().GateDrops
		p.tell("go")
		if got := p.line(); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
		if got := meter.Packets(); got != packets {
			t.Errorf("%s: %d packets outside, want %d", what, got, packets)
		}
		if got := s.Counters().GateDrops - before; got != 1-packets {
			t.Errorf("%s: %d dropped by the gate", what, got)
		}
	}
	sends("before Arm", p, "sent", 1)
	m.arm()
	sends("unknown", p, denied, 0)
	sends("unknown, an unselected process", other, "sent", 1)
	ns, ok := m.find(space)
	if !ok {
		t.Fatal("the namespace is not in the snapshot")
	}
	for range 2 {
		if err := s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
			t.Fatal(err)
		}
		sends("admitted", p, "sent", 1)
		if err := s.Deny(ns.Ref); err != nil {
			t.Fatal(err)
		}
		sends("denied", p, denied, 0)
	}
	s.Forget(ns.Ref)
	sends("forgotten", p, denied, 0)
}

// What is sent to oneself never leaves.
func TestGateLetsLoopbackPass(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: []string{cgroupsel.FeatureHold}})
	manage(t, s, undecided()).arm()
	h := lab.Host("h")
	startHelper(t, lab, h, sel, "send").wait()
	if n := s.Counters().GateDrops; n != 0 {
		t.Errorf("%d packets on loopback dropped", n)
	}
}

// Home has no gate, wherever it is.
func TestGateLeavesHomeAlone(t *testing.T) {
	_, sel, s := armed(t, undecided())
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Deny(home); err == nil {
		t.Error("home can be denied")
	}
	s.Forget(home)
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	script := fmt.Sprintf("exec 3<>/dev/udp/127.0.0.1/%d; echo x >&3", conn.LocalAddr().(*net.UDPAddr).Port)
	if out, err := sel.Command(exec.Command("bash", "-c", script)).CombinedOutput(); err != nil {
		t.Errorf("send: %v: %s", err, out)
	}
	if n := s.Counters(); n.Held != 0 || n.GateDrops != 0 {
		t.Errorf("counters %+v", n)
	}
}

// Marked packets leave by the tun of their selection alone.
func TestGuardDropsMarkedPacketsBesideTheTun(t *testing.T) {
	m := undecided()
	lab, sel, s := armed(t, m)
	space, meter := newSpace(lab, "s")
	eth0 := device(t, space, "eth0")
	m.decide(func(ns cgroupsel.Namespace) {
		if err := s.Admit(ns.Ref, cgroupsel.Admission{Devices: []int{eth0}}); err != nil {
			t.Error(err)
		}
	})
	p := stay(t, lab, space, sel)
	ns, _ := m.find(space)
	for _, tt := range []struct {
		name   string
		device int
		want   string
	}{
		{"by its tun", eth0, "sent"},
		{"by another device", eth0 + 100, denied},
		{"unguarded", 0, "sent"},
		{"by another device again", eth0 + 100, denied},
	} {
		meter.Reset()
		if err := s.Admit(ns.Ref, cgroupsel.Admission{Devices: []int{tt.device}}); err != nil {
			t.Fatal(err)
		}
		before := s.Counters()
		p.tell("go")
		if got := p.line(); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
		dropped := uint64(0)
		if tt.want == denied {
			dropped = 1
		}
		if n := s.Counters(); n.GuardDrops-before.GuardDrops != dropped || n.GateDrops != 0 || meter.Packets() != 1-dropped {
			t.Errorf("%s: counters %+v, %d packets outside", tt.name, n, meter.Packets())
		}
	}
	// A server's answer, or what the bypass list lets through, has no mark.
	if got := first(t, sel, exec.Command("nsenter", "--net="+space.Path, "env", "SEND_UNMARKED=1", self(t))); got != "sent" {
		t.Errorf("without a mark: %s", got)
	}
}

func TestMissingGateIsSaid(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: []string{cgroupsel.FeatureGate}})
	manage(t, s, undecided())
	err := s.Arm()
	var missing *cgroupsel.FeatureError
	if !errors.As(err, &missing) || missing.Name != cgroupsel.FeatureGate {
		t.Errorf("Arm: %v, want that the gate is missing", err)
	}
	// The hold is there all the same.
	space, _ := newSpace(lab, "s")
	says(t, stopFirst(t, lab, space, sel, false), "sent")
}
