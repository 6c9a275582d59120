package cgroupsel_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

func one(paths ...string) []cgroupsel.Selection {
	return []cgroupsel.Selection{{Cgroups: paths, Mark: testMark, Mask: 0xff}}
}

// armed selects sel and has an armed manager.
func armed(t *testing.T, m *manager, without ...string) (*labtest.Lab, *labtest.Cgroup, *cgroupsel.Selector) {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("ip"), labtest.Tool("nft"))
	lab := labtest.New(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: without})
	if len(without) == 0 {
		fullySelected(t, s)
	}
	manage(t, s, m).arm()
	return lab, sel, s
}

// The first act of a process in a namespace that nobody knew is a datagram:
// however it comes there, the namespace is attached before.
func TestNamespaceIsAttachedBeforeTheFirstPacket(t *testing.T) {
	rounds := 5
	if labtest.Soak() {
		rounds = 63
	}
	for _, load := range []int{0, 8} {
		t.Run(fmt.Sprintf("%d busy loops", load), func(t *testing.T) {
			m := &manager{Takes: 3 * time.Millisecond}
			lab, sel, s := armed(t, m)
			busy(t, load)
			exe := self(t)
			for i := range rounds {
				for way, args := range [][]string{
					{"nsenter", "--net=PATH", exe},
					{"sh", "-c", "nsenter --net=PATH sh -c 'NEW; exit'; exit"},
					{"ip", "netns", "exec", "NAME", exe},
					{exe, "PATH"},
				} {
					firstIn(t, lab, sel, fmt.Sprintf("s%d%c", i, 'a'+way), args)
				}
			}
			n := s.Counters()
			t.Logf("counters: %+v", n)
			if n.GateDrops != 0 || n.Late != 0 || n.Lost != 0 || n.Held == 0 {
				t.Errorf("counters: %+v, want no drops, and tasks that were stopped", n)
			}
		})
	}
}

// firstIn runs a first act in a namespace that is made for it. PATH and NAME
// in the words are the namespace's, NEW is the helper.
func firstIn(t *testing.T, lab *labtest.Lab, sel *labtest.Cgroup, name string, args []string) {
	t.Helper()
	space, meter := newSpace(lab, name)
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = strings.NewReplacer("PATH", space.Path, "NAME", space.Name, "NEW", self(t)).Replace(a)
	}
	got := first(t, sel, exec.Command(words[0], words[1:]...))
	if got != attached {
		t.Errorf("%s: the first datagram: %s", args, got)
	}
	if n := meter.Packets(); n != 0 {
		t.Errorf("%s: %d packets outside", args, n)
	}
}

// stay starts a helper that stays in a namespace.
func stay(t *testing.T, lab *labtest.Lab, space *labtest.Host, c *labtest.Cgroup) *helper {
	t.Helper()
	p := startHelper(t, lab, space, c, "stay")
	if got := p.line(); got != "there" {
		t.Fatal(got)
	}
	return p
}

func TestNamespacesOlderThanTheSelectorAreFound(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	space, _ := newSpace(lab, "s")
	p := stay(t, lab, space, sel)
	other, _ := newSpace(lab, "t")
	stay(t, lab, other, nil)
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path)})
	m := manage(t, s, &manager{})
	got := m.snapshot().Namespaces
	if len(got) != 1 || got[0].PID != p.proc.Pid || got[0].Cgroup != sel.ID || got[0].Idle {
		t.Fatalf("namespaces %+v, want that of process %d in cgroup %d alone", got, p.proc.Pid, sel.ID)
	}
	if _, ok := m.find(space); !ok {
		t.Error("it is another one")
	}
}

// A namespace leaves the snapshot by Forget alone: the manager has to undo what
// it made there. With a process in it it comes back.
func TestNamespaceGoesIdleAndComesBack(t *testing.T) {
	m := &manager{}
	lab, sel, s := armed(t, m)
	space, _ := newSpace(lab, "s")
	wait := func(what string, ok func(ns cgroupsel.Namespace, there bool) bool) {
		t.Helper()
		labtest.Eventually(t, 20*time.Second, func() bool {
			ns, there := m.find(space)
			return ok(ns, there)
		}, what)
	}
	a, b := stay(t, lab, space, sel), stay(t, lab, space, sel)
	a.kill()
	wait("the other process leads in", func(ns cgroupsel.Namespace, there bool) bool {
		return there && ns.PID == b.proc.Pid && !ns.Idle && ns.Ref.Do(func() error { return nil }) == nil
	})
	b.kill()
	wait("it is idle", func(ns cgroupsel.Namespace, there bool) bool { return there && ns.Idle })
	ns, _ := m.find(space)
	s.Forget(ns.Ref)
	wait("it is gone", func(_ cgroupsel.Namespace, there bool) bool { return !there })
	m.again(space)
	c := stay(t, lab, space, sel)
	wait("it is back", func(ns cgroupsel.Namespace, there bool) bool { return there && ns.PID == c.proc.Pid })
	ns, _ = m.find(space)
	m.again(space)
	s.Forget(ns.Ref)
	wait("forgotten with a process in it, it is back", func(ns cgroupsel.Namespace, there bool) bool { return there && ns.PID == c.proc.Pid })
}

// A process that is moved into a selected cgroup brings its namespace along.
func TestMovedProcessBringsItsNamespace(t *testing.T) {
	m := &manager{}
	lab, sel, _ := armed(t, m)
	space, _ := newSpace(lab, "s")
	p := stay(t, lab, space, nil)
	if err := sel.Add(p.proc.Pid); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 10*time.Second, func() bool { _, ok := m.find(space); return ok })
}

// In a namespace that was judged offline, the next exec or socket asks again,
// once, and holds nobody.
func TestOfflineNamespaceIsLookedAtAgain(t *testing.T) {
	m := &manager{}
	m.decide(func(ns cgroupsel.Namespace) {
		if err := m.s.Admit(ns.Ref, cgroupsel.Admission{Offline: true}); err != nil {
			t.Error(err)
		}
	})
	lab, sel, s := armed(t, m)
	space, _ := newSpace(lab, "s")
	p := stay(t, lab, space, sel)
	ns, ok := m.find(space)
	if !ok || ns.Again {
		t.Fatalf("%+v, %v: asked again before anything happened", ns, ok)
	}
	held := s.Counters().Held
	for range 2 {
		p.tell("go")
		if got := p.line(); got != "sent" {
			t.Errorf("send: %s", got)
		}
		labtest.Eventually(t, 10*time.Second, func() bool { ns, ok := m.find(space); return ok && ns.Again })
		m.Decide(ns) // offline still
		if ns := s.Snapshot().Namespaces; len(ns) != 1 || ns[0].Again {
			t.Errorf("after the judgement: %+v", ns)
		}
		m.reconcile(s.Snapshot())
	}
	if n := s.Counters(); n.Held != held || n.GateDrops != 0 {
		t.Errorf("counters: %+v, want nobody held for it", n)
	}
}

// Namespaces by the hundred, each gone in an instant, leave nothing behind.
func TestManyShortNamespacesLeaveNothing(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	m := &manager{}
	_, sel, s := armed(t, m)
	m.decide(func(ns cgroupsel.Namespace) {
		if err := s.Admit(ns.Ref, cgroupsel.Admission{Devices: []int{7}}); err != nil {
			t.Error(err)
		}
	})
	cmd := exec.Command("sh", "-c", "for i in $(seq 50); do unshare -n true || exit 1; done")
	if out, err := sel.Command(cmd).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	labtest.Eventually(t, 20*time.Second, func() bool {
		for _, ns := range s.Snapshot().Namespaces {
			if ns.Idle {
				s.Forget(ns.Ref)
			}
		}
		return len(s.Snapshot().Namespaces) == 0
	})
	if known, guards, held := s.Entries(); known != 1 || guards != 0 || held != 0 {
		t.Errorf("%d namespaces known, %d guards, %d held; want home alone", known, guards, held)
	}
}

// The ring of records overflows: what was missed is found by a look at all
// tasks.
func TestLostRecordsAreMadeGood(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: []string{cgroupsel.FeatureHold}})
	s.LookEvery(time.Hour)
	m := manage(t, s, &manager{}).arm()
	noisy, quiet := lab.Host("noisy"), lab.Host("quiet")
	goOn := s.Stall()
	defer func() { goOn() }()
	cmd := noisy.Command(t.Context(), "sh", "-c", "for i in $(seq 1000); do env true; done")
	if out, err := sel.Command(cmd).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p := stay(t, lab, quiet, sel)
	goOn()
	goOn = func() {}
	labtest.Eventually(t, 10*time.Second, func() bool {
		ns, ok := m.find(quiet)
		return ok && ns.PID == p.proc.Pid && ns.Running
	})
	if n := s.Counters(); n.Lost == 0 {
		t.Errorf("counters %+v: the ring did not overflow", n)
	}
}
