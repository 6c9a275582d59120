package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// The JSON of CONTRACT, as examples: each key and the type of its value. A list
// has the shape of its elements; "?" in front of a type: it may be null.
const (
	shapeStatus = `{"version":"s","pid":"n","instance":"n","config":"?s","state":"s","since":"t",
		"routes":[{"name":"s","mark":"n","mask":"n","table":"n","priority":"n","via":"s","on_exit":"s"}],
		"cgroups":[{"path":"s","id":"?n","present":"b","held":"b"}],
		"attachments":[{"id":"s","netns_ino":"n","netns":"?s","container":"?s","route":"s","device":"s","address":["s"],"capture":"s",
			"state":"s","error":"?s","v4":"b","v6":"b","flows":"n","up_bytes":"n","down_bytes":"n","since":"t"}],
		"outbounds":[{"name":"s","type":"s","state":"s","score":"?n","connect_ms":"?n","mptcp":"b","dials_total":"n","failures_total":"n",
			"hidden_total":"n","up_bytes":"n","down_bytes":"n"}],
		"groups":[{"name":"s","type":"s","outbounds":["s"],"order":["s"]}],
		"counters":{"flows_total":"n","flows_live":"n","refused_total":"n","denied_total":"n","gate_drops_total":"n","accepted_first_total":"n",
			"hidden_total":{"dial":"n","reset":"n","close":"n","stall":"n","dns":"n","resume":"n"}},
		"limits":{"nofile":"n","memory_bytes":"n"}}`
	shapeFlow = `{"id":"n","proto":"s","src":"s","dst":"s","name":"?s","name_from":"?s","attachment":"s","cgroup":"?s","pid":"?n","process":"?s",
		"uid":"?n","rule":"?n","use":"?s","path":["s"],"state":"s","reason":"?s","replays":"n","up_bytes":"n","down_bytes":"n","start":"t","age_ms":"n"}`
	shapePID     = `{"pid":"n","cgroup":"?s","netns_ino":"?n","attachment":"?s","captured":"b","why":"s"}`
	shapeExplain = `{"host":"s","port":"?n","proto":"s","cgroup":"?s","addresses":["s"],"captured":"b","why":"s","rule":"?n","line":"?n",
		"use":"?s","path":["s"],"needs":"?s"}`
)

// hasShape fails the test where a JSON value is not of a shape.
func hasShape(t *testing.T, text, shape string) {
	t.Helper()
	var got, want any
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Errorf("%v in %s", err, text)
		return
	}
	if err := json.Unmarshal([]byte(shape), &want); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range differ("", got, want) {
		t.Errorf("%s: %s", wrong, text)
	}
}

func differ(at string, got, want any) (wrong []string) {
	switch want := want.(type) {
	case map[string]any:
		object, ok := got.(map[string]any)
		if !ok {
			return []string{fmt.Sprintf("%s is %T, want an object", at, got)}
		}
		for key, w := range want {
			if g, ok := object[key]; ok {
				wrong = append(wrong, differ(at+"."+key, g, w)...)
			} else {
				wrong = append(wrong, at+"."+key+" is missing")
			}
		}
		return wrong
	case []any:
		list, ok := got.([]any)
		if !ok {
			return []string{fmt.Sprintf("%s is %T, want a list", at, got)}
		}
		for i, g := range list {
			wrong = append(wrong, differ(fmt.Sprintf("%s[%d]", at, i), g, want[0])...)
		}
		return wrong
	}
	kind, null := strings.CutPrefix(want.(string), "?")
	text, _ := got.(string)
	_, errTime := time.Parse(time.RFC3339, text)
	ok := map[string]bool{
		"s": reflect.TypeOf(got) == reflect.TypeOf(""), "n": reflect.TypeOf(got) == reflect.TypeOf(0.0),
		"b": reflect.TypeOf(got) == reflect.TypeOf(true), "t": errTime == nil && strings.HasSuffix(text, "Z"),
	}[kind]
	if !ok && (got != nil || !null) {
		return []string{fmt.Sprintf("%s is %v, want a %s", at, got, want)}
	}
	return nil
}

// What is said about flows is of the shape that scripts rely on, and true.
func TestWhatIsSaidOfFlows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	text := w.config(`
[[outbound]]
name = "second"
type = "direct"
interface = "eth1"

[[rule]]
cidr = ["203.0.113.200/32"]
use = "reject"

[[rule]]
cidr = ["203.0.113.201/32"]
use = "drop"

[[rule]]
process = "no-such-program"
user = "0"
use = "drop"

[[rule]]
process = "cgtun.test"
user = "root"
use = "second"
`)
	w.start(text)
	before, _, _ := w.cgtun("flows", "--json")
	if strings.TrimSpace(before) != `{"flows":[]}` {
		t.Errorf("no flows: %q", before)
	}
	follow := w.lab.StartCommand(w.machine.Command(context.Background(), w.program(), "-s", w.socket, "flows", "--json", "-f"))
	p := w.startProbe(inside, probe{Do: "hold", Network: "tcp", To: port(far4, 7000), N: 1})
	w.probe(inside, probe{Do: "dial", Network: "udp", To: port(far4, 7000), Say: "hello"})
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: "203.0.113.200:80"}); a.Errno != "ECONNREFUSED" {
		t.Errorf("reject: %+v, want ECONNREFUSED", a)
	}
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: "203.0.113.201:80", Wait: time.Second}); a.Errno != "timeout" && !strings.Contains(a.Errno, "timeout") {
		t.Errorf("drop: %+v, want silence", a)
	}
	status, _, _ := w.cgtun("status", "--json")
	hasShape(t, status, shapeStatus)
	if s := w.status(); s.State != "ready" || s.Instance != w.number || len(s.Attachments) != 1 || s.Attachments[0].ID != "home" || s.Attachments[0].State != "up" ||
		len(s.Cgroups) != 1 || uint64(s.Cgroups[0].ID) != w.sel.ID || !s.Cgroups[0].Present || s.Counters.DeniedTotal != 2 || s.Counters.FlowsTotal != 4 {
		t.Errorf("status: %s", status)
	}
	flows, _, _ := w.cgtun("flows", "--json")
	hasShape(t, flows, `{"flows":[`+shapeFlow+`]}`)
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	live := 0
	for _, f := range w.flows() {
		if f.Proto == "tcp" && f.State == "open" {
			live++
			if f.Dst.String() != port(far4, 7000) || f.UpBytes != 5 || f.DownBytes != 5 || f.Cgroup == nil || *f.Cgroup != w.sel.Path || f.UID == nil || *f.UID != 0 ||
				f.PID == nil || *f.PID != p.Pid || f.Process == nil || *f.Process != exe ||
				!slices.Equal(f.Path, []string{"second"}) || f.Rule == nil || *f.Rule != 4 || *f.Use != "second" || f.Reason != nil {
				t.Errorf("the flow that lives: %s", flows)
			}
		}
	}
	if live != 1 {
		t.Errorf("%d flows live, want 1: %s", live, flows)
	}
	p.Signal(syscall.SIGKILL)
	_ = p.Wait()
	follow.WaitOutput(`"event":"close"`, 5*time.Second)
	follow.Signal(syscall.SIGTERM)
	_ = follow.Wait()
	for line := range strings.Lines(follow.Output()) {
		hasShape(t, line, `{"event":"s","flow":`+shapeFlow+`}`)
	}
	for _, e := range []string{"open", "close"} {
		if !strings.Contains(follow.Output(), `"event":"`+e+`"`) {
			t.Errorf("flows -f said nothing of %s:\n%s", e, follow.Output())
		}
	}
	for _, args := range [][]string{{"explain", far4 + ":80"}, {"explain", "203.0.113.200:80"}, {"explain", near4}, {"explain", "[" + far6 + "]:443", "-proto", "udp"}, {"explain", far4, "-cgroup", "/elsewhere"}} {
		out, errs, code := w.cgtun(append(args, "--json")...)
		if code != 0 {
			t.Errorf("%v: %d %s", args, code, errs)
			continue
		}
		hasShape(t, out, shapeExplain)
	}
	if out, _, _ := w.cgtun("explain", "--json", "203.0.113.200:80"); !strings.Contains(out, `"rule":1,`) || !strings.Contains(out, `"use":"reject"`) {
		t.Errorf("explain: %s", out)
	}
	sleeper := w.lab.StartCommand(w.command(context.Background(), inside, "sleep", "60"))
	labtest.Eventually(t, patience(), func() bool {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", sleeper.Pid))
		return err == nil && string(comm) == "sleep\n"
	}, "it is on its way into the cgroup")
	for pid, want := range map[int]bool{sleeper.Pid: true, os.Getpid(): false} {
		out, _, _ := w.cgtun("status", "--json", fmt.Sprint(pid))
		hasShape(t, out, shapePID)
		if !strings.Contains(out, fmt.Sprintf(`"captured":%v`, want)) {
			t.Errorf("process %d: %s", pid, out)
		}
	}
}

// run passes exit codes on, is captured from the first instruction, and never
// runs anything uncaptured.
func TestRunOfTheRealDaemon(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	echo := w.server.ServeEcho(":7000")
	mark := filepath.Join(w.dir, "ran")
	touch := []string{"run", "--", "touch", mark}
	refused := func(what string, cmd *exec.Cmd) {
		t.Helper()
		if out, errs, code := result(t, cmd); code != 1 || errs == "" {
			t.Errorf("%s: exit code %d, want 1: %s%s", what, code, out, errs)
		}
		if _, err := os.Lstat(mark); err == nil {
			t.Fatalf("%s: it was run", what)
		}
	}
	in := func(h *labtest.Host, args ...string) *exec.Cmd {
		return h.Command(context.Background(), w.program(), append([]string{"-s", w.socket}, args...)...)
	}
	refused("no daemon", in(w.machine, touch...))
	d := w.start(w.config(second))
	refused("from a namespace that is not attached", in(w.router, touch...))
	refused("in a cgroup that is not selected", in(w.machine, "run", "-cgroup", w.self.Path, "--", "touch", mark))
	for script, want := range map[string]int{"true": 0, "exit 7": 7, "exit 126": 126, "kill -TERM $$": -1} {
		if _, errs, code := w.cgtun("run", "--", "sh", "-c", script); code != want {
			t.Errorf("run %q: exit code %d, want %d: %s", script, code, want, errs)
		}
	}
	for name, want := range map[string]int{"/etc/passwd": 126, "no-such-program": 127} {
		if _, _, code := w.cgtun("run", "--", name); code != want {
			t.Errorf("run %s: exit code %d, want %d", name, code, want)
		}
	}
	cgroupOf := func(args ...string) string {
		out, errs, code := w.cgtun(append(args, "--", "grep", "^0::", "/proc/self/cgroup")...)
		if code != 0 {
			t.Errorf("%v: %d %s", args, code, errs)
		}
		return strings.TrimSpace(strings.TrimPrefix(out, "0::"))
	}
	if got := cgroupOf("run"); got != w.sel.Path {
		t.Errorf("run is in %s, want %s", got, w.sel.Path)
	}
	if err := os.Mkdir(filepath.Join(w.sel.Dir, "child"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := cgroupOf("run", "-cgroup", w.sel.Path+"/child"); got != w.sel.Path+"/child" {
		t.Errorf("run -cgroup is in %s", got)
	}
	// One that is not there is made, and goes when cgtun does.
	if got := cgroupOf("run", "-cgroup", w.sel.Path+"/new/below"); got != w.sel.Path+"/new/below" {
		t.Errorf("run -cgroup of a new one is in %s", got)
	}
	direct := w.sel.In(context.Background(), w.machine, w.program(), append([]string{"-s", w.socket, "run", "-direct", "--", "env"},
		probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"})...)...)
	if out, errs, code := result(t, direct); code != 0 || !strings.Contains(out, `"Heard":"x"`) {
		t.Errorf("run -direct: %d %s%s", code, out, errs)
	}
	if seen := echo.Clients(); len(seen) != 1 || isSecond(seen[0]) {
		t.Errorf("run -direct: the server saw %v", seen)
	}
	d.Signal(syscall.SIGSTOP)
	// A thread that is running on another processor stops a little later.
	labtest.Eventually(t, 5*time.Second, func() bool { return allStopped(t, d.Pid) }, "the daemon is stopped")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	frozen := w.machine.Command(ctx, w.program(), append([]string{"-s", w.socket}, touch...)...)
	_ = frozen.Run()
	if _, err := os.Lstat(mark); err == nil {
		t.Error("with a daemon that does not answer: it was run")
	}
	d.Signal(syscall.SIGCONT)
	d.stop()
	refused("stopped", in(w.machine, touch...))
	if _, err := os.Stat(filepath.Join(w.sel.Dir, "new")); err == nil {
		t.Error("the cgroup that run had made is still there")
	}
}

// allStopped tells whether every thread of a process is stopped (proc_pid_stat(5)).
func allStopped(t *testing.T, pid int) bool {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/stat", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of process %d: %v, %v", pid, files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), ") T ") {
			return false
		}
	}
	return true
}

// A bad file changes nothing; SIGHUP, which is for later, changes nothing either.
func TestBadFilesAndSignals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	good := w.config(second)
	for name, bad := range map[string]string{
		"misspelt key":     strings.Replace(good, "cgroups =", "cgroup =", 1),
		"wrong type":       strings.Replace(good, fmt.Sprintf("mark = %d", w.number), `mark = "x"`, 1),
		"duplicate name":   good + "\n[[outbound]]\nname = \"second\"\ntype = \"direct\"\n",
		"bad CIDR":         good + "\n[[rule]]\ncidr = \"10.0.0.0/33\"\nuse = \"direct\"\n",
		"unknown outbound": good + "\n[[rule]]\nport = 80\nuse = \"nobody\"\n",
		"later version":    good + "\n[[outbound]]\nname = \"m\"\ntype = \"direct\"\nmptcp = true\n",
		"syntax":           good + "\n[[rule\n",
	} {
		_, errs, code := result(t, w.daemonCommand(bad))
		first, _, _ := strings.Cut(errs, "\n")
		if code != 2 || !strings.Contains(first, ".toml:") {
			t.Errorf("%s: exit code %d, want 2 and a place: %s", name, code, errs)
		}
	}
	if _, errs, code := result(t, exec.Command(w.program(), "-c", filepath.Join(w.dir, "not there"))); code != 2 {
		t.Errorf("no file: %d %s", code, errs)
	}
	w.unchanged(before, "bad files")
	d := w.start(good)
	d.Signal(syscall.SIGHUP)
	d.WaitOutput("msg=reloaded", patience())
	if _, errs, code := w.cgtun("reload"); code != 0 {
		t.Errorf("reload: %d %s", code, errs)
	}
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Errorf("after SIGHUP: %+v", a)
	}
	d.stop()
	w.unchanged(before, "stopped")
}
