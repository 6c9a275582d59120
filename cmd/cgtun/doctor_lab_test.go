package main_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"cgtun/doctor"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/steer"
)

const shapeDoctor = `{"checks":[{"name":"s","state":"s","what":"s","fix":"s"}]}`

// doctorOf runs doctor in the machine and returns what it found by its name,
// the worst of each.
func (w *world) doctorOf(wantCode int, before []string, args ...string) map[string]doctor.Result {
	w.t.Helper()
	words := append(append(before, w.program(), "-s", w.socket, "doctor", "--json"), args...)
	out, errs, code := result(w.t, w.machine.Command(context.Background(), words[0], words[1:]...))
	if code != wantCode || errs != "" {
		w.t.Errorf("doctor: exit code %d, want %d: %s%s", code, wantCode, out, errs)
	}
	hasShape(w.t, out, shapeDoctor)
	var found struct{ Checks []doctor.Result }
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		w.t.Fatalf("doctor: %v in %s", err, out)
	}
	byName := map[string]doctor.Result{}
	for _, r := range found.Checks {
		if had, ok := byName[r.Name]; !ok || had.State == doctor.OK {
			byName[r.Name] = r
		}
		if (r.State == doctor.OK) != (r.Fix == "") || r.What == "" {
			w.t.Errorf("a result that is well has no fix, and another one has: %+v", r)
		}
	}
	return byName
}

// is fails the test unless a check found a state, with a fix that has a text
// in it.
func is(t *testing.T, found map[string]doctor.Result, name string, state doctor.State, fix string) {
	t.Helper()
	if r := found[name]; r.State != state || fix != "" && !strings.Contains(r.Fix, fix) {
		t.Errorf("%s: %+v, want %s and a fix with %q", name, r, state, fix)
	}
}

// doctor before the start, beside a daemon, after its death, and after cleanup.
func TestDoctorThroughTheLifeOfADaemon(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	text := w.config(second)
	file := w.write(text)
	found := w.doctorOf(0, nil, "-c", file)
	for _, name := range []string{"configuration", "daemon", "kernel", "cgroup2", "selected cgroups", "tun", "device tun0", "nft", "firewall", "ip rules", "rp_filter", "forwarding", "ping", "leftovers"} {
		is(t, found, name, doctor.OK, "")
	}
	d := w.start(text)
	found = w.doctorOf(0, nil, "-c", file)
	is(t, found, "daemon", doctor.OK, "")
	if r := found["daemon"]; !strings.Contains(r.What, "is ready") {
		t.Errorf("daemon: %+v", r)
	}
	if r := found["device tun0"]; r.State != doctor.OK || !strings.Contains(r.What, "own") {
		t.Errorf("device tun0: %+v", r)
	}
	is(t, found, "leftovers", doctor.OK, "")
	// The trials of doctor are gone and have taken nothing of the daemon's along.
	w.run(inside, "true")
	if s := w.status(); s.State != "ready" || !s.Cgroups[0].Held {
		t.Errorf("after doctor: %+v", s)
	}
	d.kill()
	found = w.doctorOf(0, nil, "-c", file)
	is(t, found, "leftovers", doctor.Warn, "cgtun cleanup")
	w.cgtun("cleanup")
	is(t, w.doctorOf(0, nil, "-c", file), "leftovers", doctor.OK, "")
}

// What a dead instance blocks on purpose is said, and how to open it.
func TestClosedBlockIsSaid(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	ns, err := netns.Named(w.machine.Path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := steer.Open(ns, fmt.Sprint(w.number))
	if err != nil {
		t.Fatal(err)
	}
	w.machine.Run("ip", "link", "add", "gone", "type", "veth", "peer", "name", "far")
	w.machine.Run("ip", "link", "set", "gone", "up")
	plan := steer.Plan{Mark: uint32(w.number), Mask: ^uint32(0), Table: w.number, Priority: 10001, Device: "gone", Closed: true}
	if err := errors.Join(s.Apply(plan), s.Close()); err != nil {
		t.Fatal(err)
	}
	block := fmt.Sprintf(`instance %d does not run, and as its on_exit is "closed" what it selected reaches nothing`, w.number)
	for _, args := range [][]string{{"status"}, {"flows"}, {"status", "--json", "1"}} {
		if _, errs, code := w.cgtun(args...); code != 1 || !strings.Contains(errs, "no daemon answers") || !strings.Contains(errs, block) || !strings.Contains(errs, "cgtun cleanup") {
			t.Errorf("%v: %d %q", args, code, errs)
		}
	}
	found := w.doctorOf(1, nil)
	is(t, found, "leftovers", doctor.Error, "cgtun cleanup")
	if r := found["leftovers"]; r.What != block {
		t.Errorf("leftovers: %+v", r)
	}
	w.machine.Run("ip", "link", "del", "gone")
	w.cgtun("cleanup")
	is(t, w.doctorOf(0, nil), "leftovers", doctor.OK, "")
	if _, errs, _ := w.cgtun("status"); strings.Contains(errs, "closed") {
		t.Errorf("after cleanup: %s", errs)
	}
}

// Questions about what is not there, or is cgtun itself, have answers.
func TestQuestionsAboutNobodyAndItself(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(w.config(second))
	ended := w.machine.Command(context.Background(), "true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	pid := ended.Process.Pid
	if _, errs, code := w.cgtun("status", fmt.Sprint(pid)); code != 1 || errs != fmt.Sprintf("cgtun: there is no process %d\n", pid) {
		t.Errorf("status of a process that has ended: %d %q", code, errs)
	}
	out, errs, code := w.cgtun("explain", far4, "-cgroup", w.self.Path)
	if code != 0 || !strings.Contains(out, "no: this is cgtun's own cgroup, which is never captured") {
		t.Errorf("explain of its own cgroup: %d %s%s", code, out, errs)
	}
}

// Where no cgroup is selected by its path, explain says so, or speaks of what is
// selected otherwise.
func TestExplainWithoutCgroups(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	lab1 := w.lab.Host("lab1")
	for selected, want := range map[string]string{
		``:                                     "no: [select] cgroups has no plain path to speak of; name a cgroup with -cgroup",
		fmt.Sprintf("netns = [%q]", lab1.Name): fmt.Sprintf("yes: all of network namespace %q is selected, and %s is not bypassed", lab1.Name, far4),
		`interfaces = ["vnet0"]`:               fmt.Sprintf("yes: what comes in through \"vnet0\" is selected, and %s is not bypassed", far4),
	} {
		text := strings.Replace(w.config(second), fmt.Sprintf("cgroups = [%q]", w.sel.Path), "cgroups = []\n"+selected, 1)
		text = strings.Replace(text, "[[rule]]", fmt.Sprintf("[[rule]]\nnetns = [%q]\nuse = \"reject\"\n[[rule]]", lab1.Name), 1)
		d := w.start(text)
		out, errs, code := w.cgtun("explain", far4+":80")
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: %d %s%s, want %s", selected, code, out, errs, want)
		}
		if rejected := strings.Contains(out, "reject"); rejected != strings.Contains(selected, "netns") {
			t.Errorf("%s: which rule: %s", selected, out)
		}
		if selected != "" && strings.Contains(out, "needs") {
			t.Errorf("%s: %s", selected, out)
		}
		d.stop()
	}
}

// What stops cgtun is an error, and says what mends it.
func TestDoctorFindsWhatStopsIt(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	labtest.Need(t, labtest.Tool("unshare"))
	w := newWorld(t)
	file := w.write(w.config(second))
	w.machine.Run("ip", "link", "add", "tun0", "type", "veth", "peer", "name", "other")
	is(t, w.doctorOf(1, nil, "-c", file), "device tun0", doctor.Error, "[tun]")
	w.machine.Run("ip", "link", "del", "tun0")

	w.machine.Run("nft", "add table inet fw; add chain inet fw out { type filter hook output priority 0; policy drop; }")
	is(t, w.doctorOf(0, nil, "-c", file), "firewall", doctor.Warn, `nft insert rule inet fw out oifname "tun0" accept`)
	w.machine.Run("nft", "delete table inet fw")
	w.machine.Run("ip", "rule", "add", "fwmark", fmt.Sprint(w.number), "lookup", "77", "priority", "15000")
	is(t, w.doctorOf(1, nil, "-c", file), "ip rules", doctor.Error, "ip rule del priority 15000")
	w.machine.Run("ip", "rule", "del", "priority", "15000")

	hidden := []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$@"`, "sh"}
	is(t, w.doctorOf(1, hidden, "-c", file), "tun", doctor.Error, "modprobe tun")

	none := w.write(`select.cgroups = "/no/such"` + "\nselect.create = false\n")
	is(t, w.doctorOf(0, nil, "-c", none), "selected cgroups", doctor.Warn, "create = true")

	few := []string{"sh", "-c", `ulimit -n 1000 && exec "$@"`, "sh"}
	is(t, w.doctorOf(0, few, "-c", file), "open files", doctor.Warn, "LimitNOFILE=")
}
