package cgroupsel_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// undecided is a manager that leaves everything as it is.
func undecided() *manager { return &manager{Decide: func(cgroupsel.Namespace) {}} }

// stopFirst starts a first act in a namespace and waits until it is stopped. It
// is stopped in execve, or, with socket, when it opens its socket.
func stopFirst(t *testing.T, lab *labtest.Lab, space *labtest.Host, c *labtest.Cgroup, socket bool) *labtest.Proc {
	t.Helper()
	cmd := exec.Command("nsenter", "--net="+space.Path, self(t))
	if socket {
		cmd = exec.Command(self(t), space.Path)
	}
	cmd.Env = helperEnviron("first")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no job, as these are not held everywhere
	p := lab.StartCommand(c.Command(cmd))
	labtest.Eventually(t, 10*time.Second, func() bool { return state(p.Pid) == 'T' }, "the task is stopped")
	return p
}

func says(t *testing.T, p *labtest.Proc, want string) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.Wait() }()
	select {
	case err := <-done:
		if got := strings.TrimSpace(p.Output()); err != nil || got != want {
			t.Errorf("it says %q, %v, want %q", got, err, want)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("still in state %c after 20 s", state(p.Pid))
		p.Signal(syscall.SIGKILL)
		<-done
	}
}

const denied = "operation not permitted"

func TestHeldTaskGoesOnByDecision(t *testing.T) {
	for _, socket := range []bool{false, true} {
		for _, tt := range []struct {
			name   string
			decide func(s *cgroupsel.Selector, ns cgroupsel.Namespace) error
			want   string
		}{
			{"admitted", func(s *cgroupsel.Selector, ns cgroupsel.Namespace) error {
				return s.Admit(ns.Ref, cgroupsel.Admission{})
			}, "sent"},
			{"denied", func(s *cgroupsel.Selector, ns cgroupsel.Namespace) error { return s.Deny(ns.Ref) }, denied},
		} {
			t.Run(fmt.Sprintf("%s, at a socket: %v", tt.name, socket), func(t *testing.T) {
				m := undecided()
				lab, sel, s := armed(t, m)
				space, meter := newSpace(lab, "s")
				p := stopFirst(t, lab, space, sel, socket)
				labtest.Eventually(t, 10*time.Second, func() bool { _, ok := m.find(space); return ok })
				ns, _ := m.find(space)
				if ns.PID != p.Pid || ns.Cgroup != sel.ID {
					t.Errorf("namespace %+v, want process %d in cgroup %d", ns, p.Pid, sel.ID)
				}
				if err := tt.decide(s, ns); err != nil {
					t.Fatal(err)
				}
				says(t, p, tt.want)
				n := s.Counters()
				if outside := meter.Packets(); (tt.want == "sent") != (outside == 1) || (tt.want == denied) != (n.GateDrops == 1) || n.Held != 1 {
					t.Errorf("%d packets outside, counters %+v", outside, n)
				}
			})
		}
	}
}

// Who begins to send while a family is in doubt is held, too, whatever he sends.
func TestDoubtHolds(t *testing.T) {
	m := undecided()
	lab, sel, s := armed(t, m)
	space, meter := newSpace(lab, "s")
	p := stopFirst(t, lab, space, sel, false)
	labtest.Eventually(t, 10*time.Second, func() bool { _, ok := m.find(space); return ok })
	ns, _ := m.find(space)
	admit := func() {
		t.Helper()
		if err := s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
			t.Fatal(err)
		}
	}
	admit()
	says(t, p, "sent")
	for _, socket := range []bool{false, true} {
		if err := s.Doubt(ns.Ref, cgroupsel.V6); err != nil {
			t.Fatal(err)
		}
		p := stopFirst(t, lab, space, sel, socket)
		admit()
		says(t, p, "sent")
	}
	if n, outside := s.Counters(), meter.Packets(); outside != 3 || n.GateDrops != 0 || n.Held != 3 {
		t.Errorf("%d packets outside, counters %+v", outside, n)
	}
}

// Nobody decides in time: the task goes on, nothing leaves before somebody does, and
// nobody else is held.
func TestHeldTaskGoesOnInTime(t *testing.T) {
	labtest.Alone(t)
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprintf("closed %v", closed), func(t *testing.T) {
			lab, _, _ := newLab(t)
			sel := lab.Cgroup("sel")
			sels := one(sel.Path)
			sels[0].Closed = closed
			t.Cleanup(func() { removePins(t) })
			s := newSelector(t, cgroupsel.Options{Selections: sels, Instance: pinner})
			m := manage(t, s, undecided()).arm()
			space, meter := newSpace(lab, "s")
			says(t, stopFirst(t, lab, space, sel, false), denied)
			p := stay(t, lab, space, sel)
			if n, outside := s.Counters(), meter.Packets(); n.Late != 1 || outside != 0 || n.GateDrops != 1 || n.Held != 1 {
				t.Errorf("counters %+v, %d packets outside", n, outside)
			}
			ns, ok := m.find(space)
			if !ok {
				t.Fatal("the namespace is forgotten")
			}
			if err := s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
				t.Fatal(err)
			}
			p.tell("go")
			if got := p.line(); got != "sent" {
				t.Errorf("after it was admitted: %s", got)
			}
		})
	}
}

// entersAndForks is in a namespace, and has a child there, without exec: as what makes
// containers.
const entersAndForks = `import ctypes, os, sys, time
ctypes.CDLL(None).setns(os.open(sys.argv[1], os.O_RDONLY), 0)
os.fork()
time.sleep(600)`

// Who opens a socket in a namespace that others are about to run in, or runs a program
// there, as dockerd does, goes on at once, sends nothing, and decides nothing about it.
func TestVisitorDecidesNothing(t *testing.T) {
	labtest.Need(t, labtest.Tool("python3"))
	lab, _, _ := newLab(t)
	sel, daemon, box := lab.Cgroup("sel"), lab.Cgroup("sel/daemon"), lab.Cgroup("sel/box")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Patience: time.Minute})
	m := manage(t, s, undecided()).arm()
	space, meter := newSpace(lab, "s")
	lab.StartCommand(box.Command(exec.Command("python3", "-c", entersAndForks, space.Path)))
	labtest.Eventually(t, 10*time.Second, func() bool { _, ok := m.find(space); return ok }, "the namespace is seen")
	for _, cmd := range []*exec.Cmd{exec.Command(self(t), space.Path), exec.Command("nsenter", "--net="+space.Path, self(t))} {
		cmd.Env = helperEnviron("first")
		says(t, lab.StartCommand(daemon.Command(cmd)), denied)
	}
	ns, _ := m.find(space)
	if ns.Running {
		t.Error("the namespace counts as one in which something runs")
	}
	if n := s.Counters(); n.Held != 3 || n.Late != 0 || meter.Packets() != 0 {
		t.Errorf("counters %+v, %d packets outside", n, meter.Packets())
	}
	p := stopFirst(t, lab, space, box, false)
	labtest.Eventually(t, 10*time.Second, func() bool { ns, _ = m.find(space); return ns.Running }, "something runs there")
	if err := s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
		t.Fatal(err)
	}
	says(t, p, "sent")
}

func TestHeldTaskGoesOnAtTheEnd(t *testing.T) {
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s, err := cgroupsel.New(cgroupsel.Options{Selections: one(sel.Path), Instance: "end"})
	if err != nil {
		t.Fatal(err)
	}
	var p *labtest.Proc
	t.Run("held", func(t *testing.T) {
		manage(t, s, undecided()).arm()
		space, _ := newSpace(lab, "s")
		p = stopFirst(t, lab, space, sel, false)
	})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	says(t, p, "sent")
}

// The reader, and whoever else needs the lock, is stuck.
func TestHeldTaskGoesOnWhenTheReaderIsStuck(t *testing.T) {
	lab, sel, s := armed(t, undecided())
	space, _ := newSpace(lab, "s")
	goOn := s.Stall()
	defer func() { goOn() }()
	p := stopFirst(t, lab, space, sel, false)
	labtest.Eventually(t, 10*time.Second, func() bool { return state(p.Pid) != 'T' }, "it goes on")
	says(t, p, denied) // before somebody can decide otherwise
	// Nobody is held while nobody gives signs of life.
	labtest.Eventually(t, 10*time.Second, func() bool {
		cmd := exec.Command("nsenter", "--net="+space.Path, "true")
		return sel.Command(cmd).Run() == nil
	})
	goOn()
	goOn = func() {}
}

func TestHeldTaskGoesOnWhenTheOwnerIsKilled(t *testing.T) {
	for _, tt := range []struct {
		name    string
		without []string
		socket  bool
	}{
		{"by the kernel", nil, false},
		{"by the next start", []string{cgroupsel.FeatureLetGo}, false},
		{"by the next start, at a socket", []string{cgroupsel.FeatureLetGo}, true},
		{"by cleanup", []string{cgroupsel.FeatureLetGo}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab, _, _ := newLab(t)
			sel := lab.Cgroup("sel")
			opts := cgroupsel.Options{Selections: one(sel.Path), Instance: "killed", Without: tt.without}
			owner := startCommand(t, lab, exec.Command(self(t), asJSON(t, opts)), nil, "hold")
			if got := owner.line(); got != "armed" {
				t.Fatal(got)
			}
			space, _ := newSpace(lab, "s")
			// What others stopped stays so.
			theirs := stay(t, lab, lab.Host("t"), sel)
			theirs.proc.Signal(syscall.SIGSTOP)
			p := stopFirst(t, lab, space, sel, tt.socket)
			owner.kill()
			switch tt.name {
			case "by the kernel":
			case "by cleanup":
				pids, err := cgroupsel.Release(one(sel.Path)...)
				if err != nil || len(pids) != 1 || pids[0] != p.Pid {
					t.Errorf("released %v, %v, want %d", pids, err, p.Pid)
				}
			default:
				if got := state(p.Pid); got != 'T' {
					t.Errorf("state %c after the kill, want it to be stopped", got)
				}
				s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Instance: "killed"})
				manage(t, s, undecided())
			}
			says(t, p, "sent")
			if got := state(theirs.proc.Pid); got != 'T' {
				t.Errorf("the process that was stopped by others is in state %c", got)
			}
			theirs.proc.Signal(syscall.SIGCONT)
		})
	}
}

// The first process of a container's pid namespace ignores every signal that
// it has no handler for.
func TestFirstProcessOfAPidNamespaceIsHeld(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	m := undecided()
	lab, sel, s := armed(t, m)
	cmd := exec.Command("unshare", "--net", "--pid", "--fork", self(t))
	cmd.Env = helperEnviron("stay")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	lab.StartCommand(sel.Command(cmd))
	labtest.Eventually(t, 10*time.Second, func() bool {
		all := s.Snapshot().Namespaces
		return len(all) == 1 && s.Counters().Held == 1 && childState(all[0].PID) == 'T'
	}, "it is stopped")
	if err := s.Admit(s.Snapshot().Namespaces[0].Ref, cgroupsel.Admission{}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if n, err := out.Read(buf); string(buf[:n]) != "there\n" {
		t.Errorf("it says %q, %v", buf[:n], err)
	}
}

// childState is the state of a process, or of its child if it has one.
func childState(pid int) byte {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	var child int
	if _, errScan := fmt.Sscan(string(text), &child); err == nil && errScan == nil {
		return state(child)
	}
	return state(pid)
}

// Processes in unselected cgroups are neither held nor dropped, in any
// namespace; selected ones are not in home.
func TestOthersAreLeftAlone(t *testing.T) {
	lab, sel, s := armed(t, undecided())
	space, meter := newSpace(lab, "s")
	other := lab.Cgroup("other")
	if got := first(t, other, exec.Command("nsenter", "--net="+space.Path, self(t))); got != "sent" {
		t.Errorf("an unselected process: %s", got)
	}
	if n := meter.Packets(); n != 1 {
		t.Errorf("%d packets", n)
	}
	if out, err := sel.Command(exec.Command("true")).CombinedOutput(); err != nil {
		t.Errorf("a selected process in home: %v: %s", err, out)
	}
	if n := s.Counters(); n != (cgroupsel.Counters{}) || len(s.Snapshot().Namespaces) != 0 {
		t.Errorf("counters %+v, namespaces %+v", n, s.Snapshot().Namespaces)
	}
}

// Who is let go between the kernel's note of a hold and its signal is not
// stopped by that for good.
func TestWhoIsLetGoBeforeTheSignalGoesOn(t *testing.T) {
	lab, sel, s := armed(t, undecided())
	space, _ := newSpace(lab, "s")
	cmd := exec.Command(self(t), space.Path)
	cmd.Env = helperEnviron("open")
	p := lab.StartCommand(sel.Command(cmd))
	end := make(chan struct{})
	var letting sync.WaitGroup
	defer letting.Wait()
	defer close(end)
	letting.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
				s.LetGo(p.Pid)
			}
		}
	})
	says(t, p, "opened")
	// How many were let go before, and did not stop at all, is a matter of chance.
	if n := s.Counters().Held; n < 50 {
		t.Errorf("it was stopped %d times at 1000 sockets", n)
	}
}

// What is read late of a hold that is over continues nobody whom somebody else
// has stopped meanwhile.
func TestStoppedByOthersStaysStopped(t *testing.T) {
	m := undecided()
	lab, sel, s := armed(t, m)
	space, _ := newSpace(lab, "s")
	next, _ := newSpace(lab, "n")
	goOn := sync.OnceFunc(s.Stall())
	defer goOn()
	p := startBehind(t, lab, space, sel, []string{"sh", "-c", `exec "$0"`}, "stay")
	labtest.Eventually(t, 10*time.Second, func() bool { return state(p.proc.Pid) == 'T' }, "the task is held")
	if got := p.line(); got != "there" { // it is let go in time
		t.Fatal(got)
	}
	p.proc.Signal(syscall.SIGSTOP)
	labtest.Eventually(t, 10*time.Second, func() bool { return state(p.proc.Pid) == 'T' }, "the task is stopped")
	goOn()
	startHelper(t, lab, next, sel, "stay") // read after what is of the first
	labtest.Eventually(t, 10*time.Second, func() bool { _, ok := m.find(next); return ok }, "the records are read")
	if got := state(p.proc.Pid); got != 'T' {
		t.Errorf("the process that was stopped by others is in state %c", got)
	}
	p.proc.Signal(syscall.SIGCONT)
}

// forks starts a helper in a process group and a namespace of its own, admits it, and
// lets it be in doubt. What is forked there is held until the returned admit.
func forks(t *testing.T, without, script string, words ...string) (s *cgroupsel.Selector, p *helper, admit func()) {
	t.Helper()
	m := undecided()
	lab, _, _ := newLab(t)
	sel := lab.Cgroup("sel")
	s = newSelector(t, cgroupsel.Options{Selections: one(sel.Path), Without: []string{without}})
	manage(t, s, m).arm()
	space, _ := newSpace(lab, "s")
	cmd := space.Command(t.Context(), self(t), words...)
	if script != "" {
		cmd = space.Command(t.Context(), "sh", append([]string{"-c", script, self(t)}, words...)...)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p = startCommand(t, lab, cmd, sel, "fork")
	labtest.Eventually(t, 10*time.Second, func() bool { _, ok := m.find(space); return ok })
	ns, _ := m.find(space)
	admit = func() {
		t.Helper()
		if err := s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
			t.Fatal(err)
		}
	}
	admit()
	if got := p.line(); got != "there" {
		t.Fatal(got)
	}
	if err := s.Doubt(ns.Ref, cgroupsel.V4); err != nil {
		t.Fatal(err)
	}
	return s, p, admit
}

// Who is held outlives the end of who forked it, as it does without a hold: the
// kernel sends SIGHUP to a process group that is orphaned while one of it is stopped.
func TestHeldTaskOutlivesItsParent(t *testing.T) {
	labtest.Alone(t)
	for _, tt := range []struct {
		name, script string
		words        []string
		end          bool // the test ends the first process
	}{
		{"a daemon that is forked by who ends", "", []string{"job"}, false},
		{"the first of its group ends", `exec 3<&0; "$0" <&3 & wait`, nil, true},
		{"the first of its group ends, and the parent has ended", `exec 3<&0; ("$0" stay <&3 &); exec sleep 300`, nil, true},
	} {
		for _, without := range []string{"", cgroupsel.FeatureLetGo} {
			t.Run(fmt.Sprintf("%s, without %q", tt.name, without), func(t *testing.T) {
				s, p, admit := forks(t, without, tt.script, tt.words...)
				before := s.Counters().Held
				p.tell("fork")
				if without == "" {
					labtest.Eventually(t, 5*time.Second, func() bool { return s.Counters().Held == before+1 }, "it is held")
				}
				if tt.end {
					p.proc.Signal(syscall.SIGKILL)
				}
				_ = p.proc.Wait()
				admit()
				// Who is not held, or not any more, can send before the admission.
				if got := p.line(); got != "sent" && got != denied {
					t.Error(got)
				}
			})
		}
	}
}

// The same where the parent is about to end, and was looked at before, when the hold
// comes.
func TestHeldWhileItsParentEnds(t *testing.T) {
	labtest.Alone(t)
	m := undecided()
	lab, sel, s := armed(t, m)
	next, _ := newSpace(lab, "n")
	p := startCommand(t, lab, exec.CommandContext(t.Context(), self(t), "crowd", next.Path), sel, "fork")
	if got := p.line(); got != "there" {
		t.Fatal(got)
	}
	p.tell("fork")
	_ = p.proc.Wait()
	labtest.Eventually(t, 10*time.Second, func() bool {
		text, err := os.ReadFile(filepath.Join(sel.Dir, "cgroup.procs"))
		return err == nil && !slices.ContainsFunc(strings.Fields(string(text)), func(pid string) bool {
			n, _ := strconv.Atoi(pid)
			return state(n) != 'T'
		})
	}, "all are held or have ended")
	ns, _ := m.find(next)
	if err := s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d were held", s.Counters().Held, crowd)
	for range crowd {
		if got := p.line(); got != "sent" && got != denied {
			t.Error(got)
		}
	}
}
