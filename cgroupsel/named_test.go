package cgroupsel_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"cgtun/cgroupsel"
)

func namespaces(names ...string) cgroupsel.Options {
	o := options()
	o.Selections = []cgroupsel.Selection{{Netns: names, Mark: testMark, Mask: 0xff}}
	o.Instance = "named"
	return o
}

// Everything in a named namespace is marked, whatever its cgroup, and nothing
// outside of it.
func TestNamedNamespaceIsMarked(t *testing.T) {
	for _, tt := range []struct {
		name    string
		without []string
	}{
		{"by programs for all", nil},
		{"by a program for namespaces alone", []string{cgroupsel.FeatureMkdir}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab, h, m := newLab(t)
			other := lab.Host("other")
			elsewhere := newMeter(t, other, testMark, 0xff)
			sel := lab.Cgroup("sel")
			o := namespaces(h.Name)
			o.Selections = append(o.Selections, cgroupsel.Selection{Cgroups: []string{sel.Path}, Mark: 0x6600, Mask: 0xff00})
			o.Without = tt.without
			// In a process of its own: cgtun moves away from its cgroup.
			p := startHelper(t, lab, other, lab.Cgroup("home"), "select", asJSON(t, o))
			if say := p.told(); !say.IsSelf || len(say.Namespaces) != 1 || say.Namespaces[0] != h.Name {
				t.Errorf("it says %+v", say)
			}
			send(t, lab, h, nil)
			m.want(1, true, "in no cgroup")
			send(t, lab, h, lab.Cgroup("free"))
			m.want(1, true, "in one that is not selected")
			send(t, lab, h, sel)
			m.want(1, true, "in one that another route selects")
			send(t, lab, other, nil)
			elsewhere.want(1, false, "in another namespace")
			p.tell("end")
			p.wait()
			send(t, lab, h, nil)
			m.want(1, false, "after the end")
		})
	}
}

// cgtun can be started in the namespace that it is to capture.
func TestOwnSocketsInANamedNamespaceAreNeverMarked(t *testing.T) {
	for _, without := range [][]string{nil, {cgroupsel.FeatureRoot}} {
		lab, h, m := newLab(t)
		start := lab.Cgroup("start")
		o := namespaces(h.Name)
		o.Without = without
		p := startHelper(t, lab, h, start, "select", asJSON(t, o))
		if say := p.told(); say.Self.Path != start.Path+"/.cgtun-named" {
			t.Errorf("own cgroup: %+v", say.Self)
		}
		p.tell("send")
		p.line()
		m.want(1, false, "own sockets")
		send(t, lab, h, start)
		m.want(1, true, "its neighbour")
		p.tell("end")
		p.wait()
	}
}

// Names come and go. The time from `ip netns add` on is the window in which
// what is in the namespace is not selected yet.
func TestNamesAreFollowed(t *testing.T) {
	for _, without := range [][]string{nil, {cgroupsel.FeatureInotify}} {
		t.Run(fmt.Sprint("without ", without), func(t *testing.T) {
			_, h, _ := newLab(t)
			later := h.Name + "-l"
			o := namespaces(h.Name, later)
			o.Without = without
			s := newSelector(t, o)
			s.LookEvery(time.Hour)
			if len(without) > 0 {
				s.LookEvery(10 * time.Millisecond)
			}
			pictures := follow(t, s)
			wait := func(want ...string) {
				t.Helper()
				waitForNames(t, pictures, want...)
			}
			wait(h.Name)
			var windows []time.Duration
			for range 10 {
				begin := time.Now()
				h.Run("ip", "netns", "add", later)
				wait(h.Name, later)
				windows = append(windows, time.Since(begin))
				h.Run("ip", "netns", "del", later)
				wait(h.Name)
			}
			slices.Sort(windows)
			t.Logf("from before `ip netns add` until it is selected: median %v, longest %v", windows[5], windows[9])
		})
	}
}

func waitForNames(t *testing.T, pictures <-chan cgroupsel.Snapshot, want ...string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	var last cgroupsel.Snapshot
	for {
		select {
		case p := <-pictures:
			last = p
			var got []string
			for _, n := range p.Namespaces {
				if !n.All || n.Selection != 0 {
					t.Errorf("namespace %+v", n)
				}
				got = append(got, n.Ref.String())
			}
			if slices.Equal(got, want) {
				return
			}
		case <-deadline:
			t.Fatalf("no picture with %q, the last is %+v", want, last)
		}
	}
}
