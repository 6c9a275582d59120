package attach_test

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

// What the steps of a build wait for.

// A way out that is taken away when the process has ended is the end of the
// namespace, which takes all with it: nothing is undone before, but a little later
// where it does not end.
func TestNothingIsUndoneInANamespaceThatEnds(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		stays := exec.Command("nsenter", "-t", strconv.Itoa(i.pid), "-n", "sleep", "300")
		if err := stays.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = stays.Process.Kill(); _ = stays.Wait() }()
		labtest.Eventually(t, soon, func() bool {
			n, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", stays.Process.Pid))
			return err == nil && n == fmt.Sprintf("net:[%d]", i.ref.Inode())
		}, "another process is inside")
		first, err := os.FindProcess(i.pid)
		if err != nil {
			t.Fatal(err)
		}
		i.pid = stays.Process.Pid
		_ = first.Kill()
		_, _ = first.Wait()
		begin := time.Now()
		i.ip("-6 route del default")
		i.ip("route del default")
		labtest.Eventually(t, soon, func() bool { return i.steered() == "" }, "it is undone")
		if took := time.Since(begin); took < 500*time.Millisecond {
			t.Errorf("it was undone after %v", took)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A namespace ends soon after its last process, though a device of ours was made in
// it, and not before.
func TestNamespaceIsLetGo(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		time.Sleep(500 * time.Millisecond)
		if got := i.steered(); got != allInside {
			t.Errorf("while there is a process: %s", got)
		}
		begin := time.Now()
		i.end()
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("it ended after %v", took)
		}
		labtest.Eventually(t, soon, func() bool { return g.last(i.ref) == "forgotten" }, "it is forgotten")
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// Who is held at his first instruction goes on at once, whatever has changed just
// before.
func TestWhoIsHeldDoesNotWaitForCalm(t *testing.T) {
	atHome(t, func(t *testing.T) {
		const calm = 4 * time.Second // what a busy machine does not take for anything else
		attach.Calm(calm)
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		forked := i.namespace()
		forked.Running = false
		r.shows(forked)
		labtest.Eventually(t, soon, func() bool { return i.steered() == allInside }, "steered: %s", i.steered())
		begin := time.Now()
		i.ip("addr add 10.55.0.1/32 dev lo") // something changes, and is gathered from now on
		time.Sleep(50 * time.Millisecond)
		r.shows(i.namespace())
		for g.last(i.ref) != "admitted" {
			if took := time.Since(begin); took > calm/2 {
				t.Fatalf("it has waited %v; gate: %s", took, g.last(i.ref))
			}
			time.Sleep(time.Millisecond)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A way out that comes while a namespace is judged to have none: who is held in it
// is not let go as in one that is offline.
func TestWayOutThatComesMeanwhileIsSeen(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		g.onLetGo = sync.OnceFunc(func() { i.connect(1) })
		g.onOffline = func() { t.Error("it is admitted as offline") }
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}
