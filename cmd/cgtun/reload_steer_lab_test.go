package main_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// steered are configurations that select, mark and steer each in another way; the
// first is that of config.
func (w *world) steered() []string {
	base := w.config(second)
	with := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(base) }
	mark, table := fmt.Sprintf("mark = %d", w.number), fmt.Sprintf("table = %d", w.number)
	cgroups := fmt.Sprintf("[%q]", w.sel.Path)
	return []string{
		base,
		with(mark, "mark = 0x777"),
		with(table, fmt.Sprintf("table = %d", w.number+50_000_000)),
		with(cgroups, fmt.Sprintf("[%q, %q]", w.sel.Path, w.sel.Path+"-more")),
		with(mark, "mark = 0x1200\nmask = 0xff00\npriority = 9999", table, fmt.Sprintf("table = %d", w.number+60_000_000)),
		with(cgroups, fmt.Sprintf("[%q]", w.sel.Path+"*")),
	}
}

// reloadTo writes a file and has it read again.
func (w *world) reloadTo(file, text string) (said string, code int) {
	w.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	_, said, code = w.cgtun("reload")
	return said, code
}

// count is how many lines of a command's output in the machine have a word.
func (w *world) count(word, name string, args ...string) (n int) {
	w.t.Helper()
	for line := range strings.Lines(w.run(outside, name, args...)) {
		if strings.Contains(line, word) {
			n++
		}
	}
	return n
}

// Selections, marks, masks, priorities and tables change while a thousand
// datagrams a second are sent and a download runs: not one packet leaves another
// way, the download is whole, and nothing is left of what was before.
func TestReloadSteersOtherwise(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "nc")
	more := w.lab.Cgroup("sel-more")
	stop := make(chan struct{})
	sent := make(chan int, 1)
	w.server.Serve("0.0.0.0:80", func(c *net.TCPConn) error {
		b := make([]byte, 1000)
		_, _ = c.Read(b)
		_, err := io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n")
		for n := 0; err == nil; n += len(b) {
			select {
			case <-stop:
				sent <- n
				return nil
			case <-time.After(time.Millisecond):
				_, err = c.Write(b)
			}
		}
		sent <- -1
		return err
	})
	w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	cmd := w.daemonCommand(w.config(second))
	file := cmd.Args[len(cmd.Args)-1]
	d := w.startCommand(cmd)
	// fds are the open descriptors but for those of flows.
	fds := func() int {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(open) - int(w.status().Counters.FlowsLive)
	}
	open := fds()
	sender := w.lab.StartCommand(w.command(t.Context(), inside, "env", probeArgs(probe{Do: "stream", To: port(far4, 7001)})...))
	download := w.lab.StartCommand(w.command(t.Context(), inside, "sh", "-c", "curl -sS http://"+far4+"/ | wc -c"))
	labtest.Eventually(t, patience(), func() bool { return len(w.flows()) > 1 }, "two flows")
	all := w.steered()
	rounds := 2
	switch {
	case labtest.Soak():
		rounds = 17 // 102 reloads
	case testing.Short():
		rounds = 1
	}
	for range rounds {
		for i := range all {
			i = (i + 1) % len(all)
			if said, code := w.reloadTo(file, all[i]); code != 0 {
				t.Fatalf("reload to %d: exit code %d: %s", i, code, said)
			}
			if _, err := w.try(inside, "nc", "-z", "-w", "3", far4, "7000"); err != nil {
				t.Errorf("after a reload to %d: %v", i, err)
			}
			w.noLeak(fmt.Sprintf("reload to %d", i))
			selected := i == 3 || i == 5
			if err := more.In(t.Context(), w.machine, "bash", "-c", "echo more >/dev/udp/"+far4+"/7001").Run(); err != nil {
				t.Errorf("sel-more after a reload to %d: %v", i, err)
			}
			if leaked := w.leaks.Packets() > 0; leaked == selected {
				t.Errorf("after a reload to %d: sel-more is selected %t", i, !leaked)
			}
			w.leaks.Reset()
		}
	}
	if n := w.count("tun0", "ip", "-o", "link"); n != 1 {
		t.Errorf("%d devices", n)
	}
	if n := w.count("lookup "+strconv.Itoa(w.number), "ip", "rule"); n == 0 || n != w.count("proto 197", "ip", "rule") {
		t.Errorf("rules of a table that is not in force are left, or there are none of that which is:\n%s", w.run(outside, "ip", "rule"))
	}
	if n := w.count("cgtun_", "nft", "list", "tables"); n != 1 {
		t.Errorf("%d tables of nft", n)
	}
	close(stop)
	if err := download.Wait(); err != nil {
		t.Error(err)
	}
	if got, want := strings.TrimSpace(download.Output()), strconv.Itoa(<-sent); got != want {
		t.Errorf("the download has %s bytes, want %s", got, want)
	}

	w.refusesToSteer(file)
	w.noLeak("reloads that are refused")
	sender.Signal(syscall.SIGKILL)
	_ = sender.Wait()
	labtest.Eventually(t, patience(), func() bool { return fds() <= open+2 }, "descriptors are given back")
	d.stop()
	w.unchanged(before, "reloads")
}

// refusesToSteer reloads what is taken, or cannot change: nothing does.
func (w *world) refusesToSteer(file string) {
	w.t.Helper()
	w.machine.Run("ip", "rule", "add", "lookup", "main", "pref", "9000")
	w.machine.Run("ip", "rule", "add", "fwmark", "0x4000", "lookup", "main", "pref", "21000")
	w.machine.Run("ip", "route", "add", "192.0.2.0/24", "via", near4, "table", "4242")
	defer func() {
		w.machine.Run("ip", "rule", "del", "pref", "9000")
		w.machine.Run("ip", "rule", "del", "pref", "21000")
		w.machine.Run("ip", "route", "flush", "table", "4242")
	}()
	base := w.config(second)
	rules, tables := w.run(outside, "ip", "rule"), w.run(outside, "nft", "-s", "list", "ruleset")
	for key, tc := range map[string]struct{ old, with, says string }{
		"priority": {"[route]", "[route]\npriority = 9000", "ip rule priority 9000 is taken by"},
		"mark":     {fmt.Sprintf("mark = %d", w.number), "mark = 0x4000", "mark 0x4000/0xffffffff is taken by"},
		"table":    {fmt.Sprintf("table = %d", w.number), "table = 4242", "table 4242 is taken by"},
		"self":     {fmt.Sprintf("[%q]", w.sel.Path), fmt.Sprintf("[%q]", w.self.Path), "cgtun itself is in it"},
		"on_exit":  {"[route]", "[route]\non_exit = \"closed\"", "route.on_exit cannot change while cgtun runs"},
		"via":      {"[route]", "[route]\nvia = {dev = \"eth0\"}", "route.via"},
		"mtu":      {"[tun]", "[tun]\nmtu = 1400", "[tun] cannot change while cgtun runs"},
		"socket":   {"[control]", "[control]\nmetrics = \"127.0.0.1:9\"", "[control] cannot change while cgtun runs"},
		"format":   {"[log]", "[log]\nformat = \"json\"", "log.format cannot change while cgtun runs"},
		"netns":    {"[select]", "[select]\nnetns = \"nobody\"", "cannot change while cgtun runs"},
	} {
		said, code := w.reloadTo(file, strings.Replace(base, tc.old, tc.with, 1))
		if code != 1 || !strings.Contains(said, "nothing is changed") || !strings.Contains(said, tc.says) {
			w.t.Errorf("%s: exit code %d, %q; want %q", key, code, said, tc.says)
		}
	}
	if now := w.run(outside, "ip", "rule"); now != rules {
		w.t.Errorf("reloads that are refused change rules:\n%s\nwere\n%s", now, rules)
	}
	if now := w.run(outside, "nft", "-s", "list", "ruleset"); now != tables {
		w.t.Error("reloads that are refused change tables of nft")
	}
}

// Killed at any point of a reload, cgtun leaves nothing that steers, and cleanup
// takes the rest away; the next start has what its file says.
func TestKilledWhileReloading(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t, "nc")
	w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	all := w.steered()
	kills := 6
	switch {
	case labtest.Soak():
		kills = 60
	case testing.Short():
		kills = 3
	}
	took := 200 * time.Millisecond
	for i := range kills {
		cmd := w.daemonCommand(all[i%len(all)])
		d := w.startCommand(cmd)
		w.leaks.Reset()
		if _, err := w.try(inside, "nc", "-z", "-w", "3", far4, "7000"); err != nil {
			t.Errorf("after kill %d: %v", i, err)
		}
		w.noLeak("started after a kill")
		file := cmd.Args[len(cmd.Args)-1]
		if err := os.WriteFile(file, []byte(all[(i+1)%len(all)]), 0o600); err != nil {
			t.Fatal(err)
		}
		d.Signal(syscall.SIGHUP)
		time.Sleep(rand.N(took)) // the point of death: not a wait
		d.kill()
	}
	if _, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: exit code %d: %s", code, errs)
	}
	w.unchanged(before, "kills while it reloads")
}

// The unit of the repository reloads.
func TestUnitReloads(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "nc")
	w.server.ServeEcho(":7000")
	cmd := w.daemonCommand(w.config(second))
	file := cmd.Args[len(cmd.Args)-1]
	w.startCommand(cmd)
	unit, err := os.ReadFile(filepath.Join("..", "..", "init", "cgtun.service"))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(unit), "\nExecReload=")
	line, _, _ = strings.Cut(line, "\n")
	words := strings.Fields(strings.Replace(line, "/etc/cgtun/config.toml", file, 1))
	if len(words) < 2 {
		t.Fatalf("ExecReload is %q", line)
	}
	text := strings.Replace(w.config(second), "[[rule]]", "[[rule]]\nport = 7000\nuse = \"reject\"\n[[rule]]", 1)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := result(t, w.machine.Command(t.Context(), w.program(), words[1:]...)); code != 0 {
		t.Errorf("%s: exit code %d: %s", line, code, errs)
	}
	if _, err := w.try(inside, "nc", "-z", "-w", "3", far4, "7000"); err == nil {
		t.Error("the new rule does not hold")
	}
}
