package main_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

func init() { probes["hold"] = hold }

// hold opens N connections, has each of them echo, and keeps them until its
// stdin, or its life, ends.
func hold(q probe) error {
	d := probeDialer(q)
	kept := make([]net.Conn, 0, q.N)
	defer runtime.KeepAlive(&kept)
	for i := range q.N {
		c, err := d.Dial(q.Network, q.To)
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		if err := echoOnce(c, "hello"); err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		kept = append(kept, c)
	}
	fmt.Println("ready")
	time.Sleep(10 * time.Minute)
	return nil
}

// created is a configuration that has a cgroup made, under one of the lab's.
func (w *world) created(name string) (text, path string) {
	path = w.sel.Path + "/" + name
	return strings.Replace(w.config(second), fmt.Sprintf("[%q]", w.sel.Path), fmt.Sprintf("[%q]", path), 1), path
}

func (w *world) unchanged(before labtest.State, what string) {
	w.t.Helper()
	if d := before.Diff(w.lab.Snapshot(w.machine)); d != "" {
		w.t.Errorf("%s: the system is another one than before:\n%s", what, d)
	}
	if _, err := os.Lstat(w.socket); err == nil {
		w.t.Errorf("%s: the socket is still there", what)
	}
}

// SIGTERM and SIGINT, with a thousand flows open: gone within two seconds, and
// nothing is left. A cgroup that was made goes with it.
func TestStopWithManyFlows(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	fastest := time.Hour
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		d := w.start(w.config(second))
		held := w.startProbe(inside, probe{Do: "hold", Network: "tcp", To: port(far4, 7000), N: 1000})
		if n := w.status().Counters.FlowsLive; n != 1000 {
			t.Errorf("%d flows live, want 1000", n)
		}
		began := time.Now()
		d.Signal(sig)
		if err := d.Wait(); err != nil {
			t.Errorf("%v: %v", sig, err)
		}
		fastest = min(fastest, time.Since(began))
		w.unchanged(before, sig.String())
		held.Signal(syscall.SIGKILL)
		_ = held.Wait()
	}
	if fastest > 2*time.Second && !raceEnabled { // other tests run beside this one
		t.Errorf("the faster of two took %v", fastest)
	}
	text, path := w.created("made")
	w.start(text).stop()
	w.unchanged(before, "made "+path)
}

// Killed at any point of the start, cgtun leaves nothing that steers; cleanup
// takes the rest away.
func TestKilledWhileStarting(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	echo := w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	text, _ := w.created("made")
	began := time.Now()
	w.start(text).kill()
	whole := time.Since(began)
	kills := 11
	if labtest.Soak() {
		kills = 50
	}
	var longest time.Duration
	for i := range kills {
		if i > 0 {
			d := w.lab.StartCommand(w.daemonCommand(text))
			time.Sleep(rand.N(whole)) // the point of death: not a wait
			d.Signal(syscall.SIGKILL)
			_ = d.Wait()
		}
		if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
			t.Errorf("kill %d: a process in the cgroup has no network: %+v", i, a)
		}
		cleans := time.Now()
		if out, errs, code := w.cgtun("cleanup"); code != 0 {
			t.Fatalf("kill %d: cleanup: %d: %s%s", i, code, out, errs)
		}
		longest = max(longest, time.Since(cleans))
		w.unchanged(before, fmt.Sprintf("kill %d and cleanup", i))
	}
	t.Logf("a cleanup took %v at most", longest)
	if slices.ContainsFunc(echo.Clients(), isSecond) {
		t.Error("a connection was carried by a dead instance")
	}
	if out, _, code := w.cgtun("cleanup"); code != 0 || strings.Contains(out, w.sel.Path) || strings.Contains(out, fmt.Sprint(w.number)) {
		t.Errorf("cleanup of nothing: %d %q", code, out)
	}
}

// Killed in the middle of its work, and started with another configuration:
// the old things go, the new ones come, and go when it stops.
func TestKilledThenStartedOtherwise(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	text, _ := w.created("made")
	d := w.start(text)
	d.kill()
	other := strings.ReplaceAll(w.config(second), fmt.Sprint(w.number), fmt.Sprint(w.number+50_000_000))
	other = strings.Replace(other, `"tun0"`, `"tun7"`, 1)
	other = strings.Replace(other, "[tun]", "priority = 4711\n[tun]", 1)
	next := w.start(other)
	for _, gone := range []struct{ where, what string }{
		{w.machine.Run("nft", "list", "tables"), fmt.Sprintf("cgtun_%d\n", w.number)},
		{w.machine.Run("ip", "rule"), "10101:"},
		{w.machine.Run("ip", "link"), "tun0"},
	} {
		if strings.Contains(gone.where, gone.what) {
			t.Errorf("%s of the dead instance is still there:\n%s", gone.what, gone.where)
		}
	}
	if _, err := os.Stat(filepath.Join(w.sel.Dir, "made")); err == nil {
		t.Error("the cgroup that the dead instance made is still there")
	}
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Errorf("captured by the new one: %+v", a)
	}
	w.noLeak("new instance")
	next.stop()
	w.unchanged(before, "stopped")
}

// What others have is never touched: the start is refused and says who has it.
func TestTakenIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	table := fmt.Sprint(w.number)
	tests := []struct {
		name        string
		make, undo  []string
		text, holds string // the configuration; what the message must name
	}{
		{"priority", []string{"rule", "add", "from", "10.1.0.2", "lookup", "main", "priority", "10101"}, []string{"rule", "del", "priority", "10101"}, "", "10101"},
		{"priority v6", []string{"-6", "rule", "add", "from", "fd01::2", "lookup", "main", "priority", "10101"}, []string{"-6", "rule", "del", "priority", "10101"}, "", "10101"},
		{"mark", []string{"rule", "add", "fwmark", table, "lookup", "main", "priority", "99"}, []string{"rule", "del", "priority", "99"}, "", "99"},
		{"mark under a mask", []string{"rule", "add", "fwmark", fmt.Sprintf("%#x/%#x", w.number&0xff, 0xff), "lookup", "main", "priority", "99"}, []string{"rule", "del", "priority", "99"}, "", "99"},
		{"table", []string{"route", "add", "192.0.2.0/24", "dev", "eth0", "table", table}, []string{"route", "flush", "table", table}, "", table},
		{"table v6", []string{"-6", "route", "add", "2001:db8:9::/48", "dev", "eth0", "table", table}, []string{"-6", "route", "flush", "table", table}, "", table},
		{"device", []string{"link", "add", "tun0", "type", "veth", "peer", "name", "tun0p"}, []string{"link", "del", "tun0"}, "", "tun0"},
		{"address", []string{"addr", "add", "10.66.0.1/24", "dev", "lo"}, []string{"addr", "del", "10.66.0.1/24", "dev", "lo"}, "10.66.0.9/24", "10.66.0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w.machine.Run("ip", tt.make...)
			defer w.machine.Run("ip", tt.undo...)
			text := w.config(second)
			if tt.text != "" {
				text = strings.Replace(text, `name = "tun0"`, fmt.Sprintf("name = \"tun0\"\naddress = [%q]", tt.text), 1)
			}
			before := w.lab.Snapshot(w.machine)
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			daemon := w.daemonCommand(text)
			cmd := w.self.Command(exec.CommandContext(ctx, daemon.Args[0], daemon.Args[1:]...))
			out, errs, code := result(t, cmd)
			if code != 1 || !strings.Contains(errs, tt.holds) {
				t.Errorf("exit code %d, want 1, and %q named:\n%s%s", code, tt.holds, out, errs)
			}
			if d := before.Diff(w.lab.Snapshot(w.machine)); d != "" {
				t.Errorf("changed:\n%s", d)
			}
		})
	}
}

// A second instance on the first one's things is refused; one with its own runs
// beside it, each with its cgroup; cleanup leaves both alone.
func TestTwoInstances(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	echo := w.server.ServeEcho(":7000")
	sel2, self2 := w.lab.Cgroup("sel2"), w.lab.Cgroup("daemon2")
	before := w.lab.Snapshot(w.machine)
	one := w.start(w.config(second))
	own := strings.NewReplacer(fmt.Sprint(w.number), fmt.Sprint(w.number+50_000_000), w.sel.Path, sel2.Path,
		`"tun0"`, `"tun1"`, w.socket, w.socket+"2", "[tun]", "priority = 10102\n[tun]").Replace(w.config(""))
	replaced := func(from, to string) string { return strings.Replace(own, from, to, 1) }
	for name, text := range map[string]string{
		"cgroup": replaced(sel2.Path, w.sel.Path), "nested cgroup": replaced(sel2.Path, w.sel.Path+"/below"),
		"device": replaced(`"tun1"`, `"tun0"`), "socket": replaced(w.socket+"2", w.socket),
		"priority": replaced("10102", "10101"), "mark": replaced(fmt.Sprintf("mark = %d", w.number+50_000_000), fmt.Sprintf("mark = %d", w.number)),
		"table": replaced(fmt.Sprintf("table = %d", w.number+50_000_000), fmt.Sprintf("table = %d", w.number)),
	} {
		state := w.lab.Snapshot(w.machine)
		_, errs, code := result(t, self2.Command(exec.Command("ip", "netns", "exec", w.machine.Name, w.program(), "-c", w.write(text))))
		if code != 1 || !strings.Contains(errs, "level=ERROR") {
			t.Errorf("same %s: exit code %d, want 1:\n%s", name, code, errs)
		}
		if d := state.Diff(w.lab.Snapshot(w.machine)); d != "" {
			t.Errorf("same %s: changed:\n%s", name, d)
		}
	}
	two := w.startCommand(self2.Command(exec.Command("ip", "netns", "exec", w.machine.Name, w.program(), "-c", w.write(own))))
	if _, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d: %s", code, errs)
	}
	first, err1 := w.sel.In(t.Context(), w.machine, "env", probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"})...).Output()
	then, err2 := sel2.In(t.Context(), w.machine, "env", probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"})...).Output()
	if seen := echo.Clients(); err1 != nil || err2 != nil || len(seen) != 2 || !isSecond(seen[0]) || isSecond(seen[1]) {
		t.Errorf("by the one %v %s, by the other %v %s; the server saw %v", err1, first, err2, then, seen)
	}
	if out, errs, code := result(t, w.machine.Command(t.Context(), w.program(), "-s", w.socket+"2", "flows", "--json")); code != 0 || strings.Count(out, `"id":`) != 1 {
		t.Errorf("flows of the other one: %d\n%s%s", code, out, errs)
	}
	one.kill()
	if a, err := sel2.In(t.Context(), w.machine, "env", probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"})...).Output(); err != nil || !strings.Contains(string(a), `"Heard":"x"`) {
		t.Errorf("the one is dead, by the other: %v %s", err, a)
	}
	if out, errs, code := w.cgtun("cleanup"); code != 0 || !strings.Contains(out, "left alone") {
		t.Errorf("cleanup beside a live one: %d: %s%s", code, out, errs)
	}
	two.stop()
	w.unchanged(before, "both gone")
}

// Two instances with the same numbers, each in a machine (a network namespace) of its
// own, do not know of each other: neither captures, ends or cleans up what is the
// other's.
func TestSameNumbersInTwoMachines(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	one, two := newWorld(t), newWorld(t)
	two.number = one.number
	for _, w := range []*world{one, two} {
		w.server.ServeEcho(":7000")
	}
	before := two.lab.Snapshot(two.machine)
	works := func(w *world, when string) {
		t.Helper()
		for _, far := range []string{far4, far6} {
			if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "x"}); a.Heard != "x" {
				t.Errorf("%s: %+v", when, a)
			}
		}
		w.noLeak(when)
	}
	first, other := one.start(one.config(second)), two.start(two.config(second))
	works(one, "the first of two")
	works(two, "the second of two")
	// A namespace of the one's processes is not the other's to judge.
	one.routed()
	p := one.wait()
	one.join(1, p.pid)
	labtest.Eventually(t, patience(), func() bool { return one.stateOf(p.pid) == attach.StateUp }, "the first attaches")
	if list := two.attachments(); len(list) != 0 {
		t.Errorf("the second has %+v", list)
	}
	other.kill()
	if out, errs, code := two.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d: %s%s", code, out, errs)
	}
	works(one, "the second is dead and cleaned up")
	if one.stateOf(p.pid) != attach.StateUp {
		t.Error("cleanup of the second has taken an attachment of the first away")
	}
	again := two.start(two.config(second))
	first.stop()
	works(two, "the first has stopped")
	again.stop()
	two.unchanged(before, "both gone")
}

// Started inside of the cgroup that it selects, cgtun does not capture itself.
func TestStartedInsideTheSelectedCgroup(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"alone", "with the processes"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t)
			w.server.ServeEcho(":7000")
			before := w.lab.Snapshot(w.machine)
			if how != "alone" {
				w.lab.StartCommand(w.command(context.Background(), inside, "sleep", "600"))
			}
			text := w.config("")
			cmd := w.daemonCommand(text)
			d := w.startCommand(w.sel.Command(cmd))
			for range 5 {
				for _, far := range []string{far4, far6} {
					if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "x"}); a.Heard != "x" {
						t.Errorf("%+v", a)
					}
				}
			}
			if n := w.status().Counters.FlowsTotal; n != 10 {
				t.Errorf("%d flows for 10 connections", n)
			}
			d.stop()
			w.unchanged(before, "stopped")
		})
	}
}
