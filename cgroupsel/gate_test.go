package cgroupsel_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

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
	t.Run("", func(t *testing.T) { gateDrops(t, cgroupsel.FeatureHold) })
	t.Run("as before 6.15", func(t *testing.T) { gateDrops(t, cgroupsel.FeatureHold, cgroupsel.FeatureCookie) })
}

func gateDrops(t *testing.T, without ...string) {
	t.Helper()
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	// Without the hold everything hangs on the gate.
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: without})
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
	for _, f := range s.Features() {
		if f.Name == cgroupsel.FeatureCookie && (f.Err != nil) != slices.Contains(without, cgroupsel.FeatureCookie) {
			t.Errorf("%s: %v", f.Name, f.Err)
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
		for _, tt := range []struct {
			name     string
			families cgroupsel.Family
			want     string
			packets  uint64
		}{
			{"as to the other family", cgroupsel.V6, "sent", 1},
			{"as to both, one by one", cgroupsel.V4, denied, 0},
		} {
			if err := s.Doubt(ns.Ref, tt.families); err != nil {
				t.Fatal(err)
			}
			sends("doubted "+tt.name, p, tt.want, tt.packets)
		}
		if err := s.Deny(ns.Ref); err != nil {
			t.Fatal(err)
		}
		sends("denied", p, denied, 0)
		if err := s.Doubt(ns.Ref, cgroupsel.V6); err != nil {
			t.Fatal(err)
		}
		sends("doubted after it was denied", p, denied, 0)
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

// Run ends with an error when new namespaces cannot be told of any more, and
// leaves the gate shut. With an old sign of life it stays so while the process
// lives; without any it is open for who is to be open, and for nobody else.
func TestGateWithoutASignOfLife(t *testing.T) {
	labtest.Alone(t)
	lab, _, _ := newLab(t)
	open, closed := lab.Cgroup("open"), lab.Cgroup("closed")
	sels := append(one(open.Path), one(closed.Path)...)
	sels[1].Mark, sels[1].Closed = testMark^0xff, true
	t.Cleanup(func() { removePins(t) })
	s := newSelector(t, cgroupsel.Options{Selections: sels, Instance: pinner, Without: []string{cgroupsel.FeatureHold}})
	ended, first := make(chan error, 1), make(chan struct{})
	once := sync.OnceFunc(func() { close(first) })
	go func() { ended <- s.Run(t.Context(), func(cgroupsel.Snapshot) { once() }) }()
	<-first
	if err := s.Arm(); err != nil {
		t.Fatal(err)
	}
	space, meter := newSpace(lab, "s")
	ways := []*helper{stay(t, lab, space, open), stay(t, lab, space, closed)}
	send := func(when string, want ...string) {
		t.Helper()
		for i, p := range ways {
			p.tell("go")
			if got := p.line(); got != want[i] {
				t.Errorf("%s, selection %d: %s, want %s", when, i, got, want[i])
			}
		}
	}
	send("while Run runs", denied, denied)
	if err := s.BreakRecords(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v, want why no record is read", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run goes on without records")
	}
	send("after the error", denied, denied)
	s.SetBeat(1)
	send("with an old sign of life", denied, denied)
	s.SetBeat(0)
	send("without a sign of life", "sent", denied)
	if n := meter.Packets(); n != 1 {
		t.Errorf("%d packets outside, want 1", n)
	}
}
