package main_test

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/control"
	"cgtun/internal/labtest"
)

// and shows so; a stop gives it back as it was.
func TestOfflineNamespaceStaysOfflineUntilItHasAWayOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	d := w.start(w.config(second))
	p := w.wait()
	in := func(args ...string) string {
		out, err := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(p.pid), "-n"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
		return string(out)
	}
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(p.pid) == attach.StateOffline }, "it is offline")
	if links := in("ip", "-br", "link"); strings.Contains(links, "tun") {
		t.Errorf("an offline namespace got a device:\n%s", links)
	}
	s := ask[control.PIDStatus](w, "status", strconv.Itoa(p.pid))
	if s.Captured || !strings.Contains(s.Why, "no default route") {
		t.Errorf("offline: %+v", s)
	}
	w.join(1, p.pid)
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(p.pid) == attach.StateUp }, "it is up")
	s = ask[control.PIDStatus](w, "status", strconv.Itoa(p.pid))
	if !s.Captured || string(s.Attachment) != fmt.Sprintf("netns-%d", inodeOf(p.pid)) {
		t.Errorf("up: %+v", s)
	}
	d.stop()
	for _, what := range []string{in("ip", "rule"), in("ip", "-6", "rule"), in("nft", "list", "tables"), in("ip", "-br", "link"), in("ip", "route", "show", "table", "all")} {
		if strings.Contains(what, strconv.Itoa(w.number)) || strings.Contains(what, "tun0") || strings.Contains(what, "proto 197") {
			t.Errorf("left inside:\n%s", what)
		}
	}
}

// whether it has a way out now. What is sent by IPv4 meanwhile goes on.
func TestChangesOfANamespaceDropNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	w.start(w.config(second))
	p := w.wait()
	w.join(1, p.pid)
	in := func(args ...string) *exec.Cmd {
		return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(p.pid), "-n"}, args...)...)
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := in(args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	run("ip", "-6", "route", "del", "default")
	labtest.Eventually(t, patience(), func() bool {
		all := w.attachments()
		return len(all) == 1 && all[0].State == attach.StateUp && !all[0].V6
	}, "IPv6 is left alone")
	const changes = 10
	sender := w.lab.StartCommand(w.command(context.Background(), inside, "nsenter", append([]string{"-t", strconv.Itoa(p.pid), "-n", "env"}, probeArgs(probe{Do: "stammer", To: port(far4, 7000), N: 1000})...)...))
	sender.WaitOutput("ready", patience())
	for range changes {
		run("ip", "addr", "add", "10.60.0.1/32", "dev", "lo")
		time.Sleep(60 * time.Millisecond) // so that it is looked at each of them
		run("ip", "addr", "del", "10.60.0.1/32", "dev", "lo")
	}
	if err := sender.Wait(); err != nil {
		t.Errorf("a datagram was refused: %v: %s", err, sender.Output())
	}
	w.noLeak("changes")
	if n := w.status().Counters.GateDropsTotal; n != 0 {
		t.Errorf("%d packets were dropped by the gate", n)
	}
}

// cleanup opens it. Nobody else there is touched.
func TestOfflineNamespaceIsShutWhenItGetsAWayOutLater(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	in := func(p *waiting, at where, args ...string) *exec.Cmd {
		args = append([]string{"-t", strconv.Itoa(p.pid), "-n"}, args...)
		return w.command(context.Background(), at, "nsenter", args...)
	}
	run := func(p *waiting, args ...string) {
		t.Helper()
		if out, err := in(p, outside, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	neither, only4, only6 := w.wait(), w.wait(), w.wait()
	w.join(2, only4.pid)
	run(only4, "ip", "-6", "route", "del", "default")
	w.join(3, only6.pid)
	run(only6, "ip", "route", "del", "default")
	d := w.start(w.closedConfig())
	for _, p := range []*waiting{neither, only4, only6} {
		for _, far := range []string{far4, far6} {
			w.lab.StartCommand(in(p, inside, append([]string{"env"}, probeArgs(probe{Do: "stream", To: port(far, 7000)})...)...))
		}
	}
	labtest.Eventually(t, patience(), func() bool {
		return w.stateOf(neither.pid) == attach.StateOffline && w.stateOf(only4.pid) == attach.StateUp && w.stateOf(only6.pid) == attach.StateUp
	}, "one is offline, two have a family")
	d.kill()
	w.join(1, neither.pid)
	run(only4, "ip", "route", "add", "default", "via", "fd50:2::1")
	run(only6, "ip", "route", "add", "default", "via", "10.50.3.1")
	// Others get out, and so there is a way.
	for _, p := range []*waiting{neither, only4, only6} {
		for _, far := range []string{far4, far6} {
			out, err := in(p, outside, append([]string{"env"}, probeArgs(probe{Do: "dial", Network: "udp", To: port(far, 7000), Say: "x"})...)...).CombinedOutput()
			if err != nil || !strings.Contains(string(out), `"Heard":"x"`) {
				t.Errorf("who is not selected, to %s: %v %s", far, err, out)
			}
		}
	}
	w.leaks.Reset()
	out, err := in(neither, inside, append([]string{"env"}, probeArgs(probe{Do: "dial", Network: "tcp", To: port(far6, 7000), Device: "eth0", Wait: time.Second})...)...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Errno") {
		t.Errorf("bound to the device: %v %s", err, out)
	}
	time.Sleep(300 * time.Millisecond) // eighteen hundred datagrams
	w.noLeak("killed")
	d = w.start(w.closedConfig())
	labtest.Eventually(t, patience(), func() bool {
		all := w.attachments()
		return len(all) == 3 && !slices.ContainsFunc(all, func(a control.Attachment) bool {
			return a.State != attach.StateUp || !a.V4 || !a.V6 || a.UpBytes == 0
		})
	}, "all are up")
	w.noLeak("started again")
	d.kill()
	if out, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s%s", code, out, errs)
	}
	labtest.Eventually(t, patience(), func() bool { return w.leaks.Packets() > 0 }, "opened, all goes by the uplink")
}
