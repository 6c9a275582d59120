package main_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

func init() {
	probes["converse"] = converse
	probes["pour"] = pour
}

// pour keeps N connections on which it sends all the time, until it is killed: one
// that ends is dialled again.
func pour(q probe) error {
	var open sync.WaitGroup
	open.Add(q.N)
	for range q.N {
		opened := sync.OnceFunc(open.Done)
		go func() {
			for ; ; time.Sleep(20 * time.Millisecond) {
				c, err := net.Dial("tcp", q.To)
				if err != nil {
					continue
				}
				opened()
				for err == nil {
					_, err = c.Write([]byte("x"))
					time.Sleep(20 * time.Millisecond)
				}
				c.Close()
			}
		}()
	}
	open.Wait()
	fmt.Println("ready")
	select {}
}

// closedConfig is config with on_exit = "closed".
func (w *world) closedConfig() string {
	return strings.Replace(w.config(second), "[route]", "[route]\non_exit = \"closed\"", 1)
}

// blocked wants that nothing selected reaches anything, and nobody else is
// touched.
func (w *world) blocked(when string) {
	w.t.Helper()
	for _, far := range []string{far4, far6} {
		for _, network := range []string{"tcp", "udp"} {
			q := probe{Do: "dial", Network: network, To: port(far, 7000), Say: "x", Wait: time.Second}
			if a := w.probe(inside, q); a.Errno == "" {
				w.t.Errorf("%s: %s to %s was answered: %+v", when, network, far, a)
			}
		}
		w.probeOutput(inside, probe{Do: "frames", Device: "eth0", To: far})
	}
	w.noLeak(when)
	// A datagram: nothing of it is under way after its answer, as the end of a
	// connection would be.
	if a := w.probe(outside, probe{Do: "dial", Network: "udp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		w.t.Errorf("%s: who is not selected: %+v", when, a)
	}
	w.leaks.Reset()
}

// With on_exit = "closed" nothing selected gets out while cgtun is not there:
// after SIGTERM and SIGKILL, between starts, after the firewall was flushed, in
// a cgroup that was made again. The next start takes over; cleanup opens.
func TestClosedStaysClosed(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	before := w.lab.Snapshot(w.machine)
	sender := w.lab.StartCommand(w.command(t.Context(), inside, "env", probeArgs(probe{Do: "stream", To: port(far4, 7000)})...))

	d := w.start(w.closedConfig())
	flows := w.startProbe(inside, probe{Do: "pour", To: port(far4, 7000), N: 100})
	w.leaks.Reset() // what was sent before the first start
	d.stop()
	if said := d.Output(); !strings.Contains(said, "cgtun cleanup") {
		t.Errorf("a stop does not say how to open: %s", said)
	}
	w.blocked("after SIGTERM")
	flows.Signal(syscall.SIGKILL)
	_ = flows.Wait()
	w.noLeak("a hundred flows at SIGTERM")
	if _, errs, code := w.cgtun("status"); code != 1 || !strings.Contains(errs, "cleanup") {
		t.Errorf("status while it is down: %d %s", code, errs)
	}
	rounds := 3
	switch {
	case labtest.Soak():
		rounds = 20
	case testing.Short():
		rounds = 1
	}
	for range rounds {
		began := time.Now()
		d = w.start(w.closedConfig())
		whole := time.Since(began)
		d.kill()
		w.noLeak("after SIGKILL")
		half := w.lab.StartCommand(w.daemonCommand(w.closedConfig()))
		time.Sleep(rand.N(whole)) // the point of death: not a wait
		half.Signal(syscall.SIGKILL)
		_ = half.Wait()
		w.noLeak("killed while starting")
	}
	w.blocked("after SIGKILL")
	w.machine.Run("nft", "flush", "ruleset")
	w.blocked("after a flush")
	w.noLeak("a sender that never stopped")
	sender.Signal(syscall.SIGKILL)
	_ = sender.Wait()

	d = w.start(w.closedConfig())
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Errorf("after the next start: %+v", a)
	}
	d.kill()
	if out, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s %s", code, out, errs)
	}
	w.leaks.Reset()
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Errorf("after cleanup: %+v", a)
	}
	if w.leaks.Packets() == 0 {
		t.Error("after cleanup nothing went by the uplink")
	}
	if diff := before.Diff(w.lab.Snapshot(w.machine)); diff != "" {
		t.Errorf("the machine is not as it was:\n%s", diff)
	}
}

// Connections that are older than cgtun go on through starts, kills and stops: those
// that came in to a selected server, and those of who is not selected. That of a
// selected client goes on by the old way, or is cut where on_exit is "closed".
func TestConnectionsOlderThanCgtun(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	for name, closed := range map[string]bool{"open": false, "closed": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.server.ServeEcho(":7000")
			w.startProbe(inside, probe{Do: "serve", Network: "tcp", To: port("10.1.0.2", 7100)})
			older := w.startProbe(inside, probe{Do: "converse", Network: "tcp", To: port(far4, 7000)})
			alive := map[string]net.Conn{}
			for name, dial := range map[string]func() (net.Conn, error){
				"came in":      func() (net.Conn, error) { return w.server.Dial("tcp", port("10.1.0.2", 7100)) },
				"not selected": func() (net.Conn, error) { return w.machine.Dial("tcp", port(far4, 7000)) },
			} {
				c, err := dial()
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				alive[name] = c
			}
			goOn := func(when string) {
				t.Helper()
				for name, c := range alive {
					if err := echoOnce(c, "hello"); err != nil {
						t.Errorf("%s, %s: %v", when, name, err)
					}
				}
			}
			text := w.config(second)
			if closed {
				text = w.closedConfig()
			}
			goOn("before")
			d := w.start(text)
			goOn("started")
			if closed {
				labtest.Eventually(t, patience(), func() bool { return strings.Contains(older.Output(), "cut") }, "it is cut")
			}
			d.kill()
			goOn("killed")
			d = w.start(text)
			goOn("started again")
			if !closed && strings.Contains(older.Output(), "cut") {
				t.Errorf("the older connection was cut: %s", older.Output())
			}
			d.stop()
			goOn("stopped")
			if out, errs, code := w.cgtun("cleanup"); code != 0 {
				t.Errorf("cleanup: %d %s%s", code, out, errs)
			}
			goOn("cleaned up")
		})
	}
}

// converse speaks on one connection until that fails.
func converse(q probe) error {
	c, err := dialTCP(q)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("ready")
	for err == nil {
		time.Sleep(10 * time.Millisecond)
		err = echoOnce(c, "hello")
	}
	fmt.Println("cut:", err)
	return nil
}

// A way by the kernel with on_exit = "closed" goes on after a kill, also of a
// cgroup that is made again, and nothing selected leaves by another one: not when
// the firewall was flushed, not when the way is gone. After a stop it blocks.
func TestClosedWayByTheKernelGoesOn(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	text := strings.Replace(w.closedConfig(), "[route]", "[route]\nvia = {gateway = \"10.2.0.1\", gateway6 = \"fd02::1\", dev = \"eth1\"}", 1)
	goesOn := func(when string) {
		t.Helper()
		for _, far := range []string{far4, far6} {
			for _, network := range []string{"tcp", "udp"} {
				q := probe{Do: "dial", Network: network, To: port(far, 7000), Say: "x"}
				if a := w.probe(inside, q); a.Heard != "x" {
					t.Errorf("%s: %s to %s: %+v", when, network, far, a)
				}
				q.Device, q.Wait = "eth0", time.Second
				if a := w.probe(inside, q); a.Heard != "" {
					t.Errorf("%s: %s to %s, bound to the uplink, was answered", when, network, far)
				}
			}
		}
		w.noLeak(when)
	}
	d := w.start(text)
	goesOn("while it runs")
	d.kill()
	goesOn("after SIGKILL")
	labtest.Eventually(t, patience(), func() bool { return os.Remove(w.sel.Dir) == nil }, "the cgroup is removed")
	w.sel = w.lab.Cgroup("sel")
	goesOn("in a cgroup that was made again")
	w.machine.Run("nft", "flush", "ruleset")
	goesOn("after a flush")
	w.machine.Run("ip", "link", "set", "eth1", "down")
	w.blocked("without the way")

	d = w.start(text)
	for _, state := range []string{"up", "down", "up"} {
		w.machine.Run("ip", "link", "set", "eth1", state)
		want := map[string]string{"up": attach.StateUp, "down": attach.StateFailed}[state]
		if state == "up" {
			w.machine.Run("ip", "addr", "add", "fd02::2/64", "dev", "eth1", "nodad")
		}
		labtest.Eventually(t, patience(), func() bool { return w.status().Attachments[0].State == want }, "the way is %s", state)
		if state == "up" {
			goesOn("when the way has come")
		}
	}
	d.stop()
	w.blocked("after SIGTERM")
	if out, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s %s", code, out, errs)
	}
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" || w.leaks.Packets() == 0 {
		t.Errorf("after cleanup: %+v, %d packets by the uplink", a, w.leaks.Packets())
	}
}

// Each route has its own on_exit: after a death what the open one selected goes
// the ordinary way, in home and elsewhere, and what the closed one did reaches
// nothing, nor in a namespace that nobody knew.
func TestEachRouteHasItsOwnExit(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	shut := w.lab.Cgroup("shut")
	inner, later := w.lab.Host("inner"), w.lab.Host("later")
	for i, h := range []*labtest.Host{inner, later} {
		w.lab.Link(h, w.machine, fmt.Sprintf("10.50.%d.2/24", i), fmt.Sprintf("10.50.%d.1/24", i))
		h.Run("ip", "route", "add", "default", "via", fmt.Sprintf("10.50.%d.1", i))
	}
	text := fmt.Sprintf(`
[[route]]
name = "open"
mark = %[1]d
table = %[1]d
priority = 10101
[route.select]
cgroups = [%[2]q]
[route.tun]
name = "tun0"

[[route]]
name = "closed"
mark = %[3]d
table = %[3]d
priority = 10102
on_exit = "closed"
[route.select]
cgroups = [%[4]q]
netns = ["comes-later"]
[route.tun]
name = "tun1"

[control]
socket = %[5]q
`, w.number, w.sel.Path, w.number+1_000_000_000, shut.Path, w.socket)
	hears := func(c *labtest.Cgroup, h *labtest.Host, wait time.Duration) bool {
		t.Helper()
		q := probe{Do: "dial", Network: "udp", To: port(far4, 7000), Say: "x", Wait: wait}
		out, err := c.In(t.Context(), h, "env", probeArgs(q)...).Output()
		if err != nil {
			t.Error(err)
		}
		return strings.Contains(string(out), `"Heard":"x"`)
	}
	// An answer can take its time on a busy machine, to be sure of none takes some.
	heard := func(c *labtest.Cgroup, h *labtest.Host) bool { t.Helper(); return hears(c, h, 5*time.Second) }
	reaches := func(c *labtest.Cgroup, h *labtest.Host) bool { t.Helper(); return hears(c, h, time.Second) }
	for _, how := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		d := w.start(text)
		for _, c := range []*labtest.Cgroup{w.sel, shut} {
			for _, h := range []*labtest.Host{w.machine, inner} {
				if !heard(c, h) {
					t.Errorf("%s in %s: no answer while it runs", c.Path, h.Name)
				}
			}
		}
		d.Signal(how)
		_ = d.Wait()
		for _, h := range []*labtest.Host{w.machine, inner, later} {
			if !heard(w.sel, h) {
				t.Errorf("after %v, open, in %s: no answer", how, h.Name)
			}
			if reaches(shut, h) {
				t.Errorf("after %v, closed, in %s: an answer", how, h.Name)
			}
		}
	}
	if out, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s%s", code, out, errs)
	}
	if !heard(shut, later) {
		t.Error("after cleanup: no answer")
	}
}

// With on_exit = "open" new connections go the ordinary way at once, also after
// a kill.
func TestOpenIsOpenAtOnce(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	for _, how := range []string{"SIGTERM", "SIGKILL"} {
		d := w.start(w.config(second))
		if how == "SIGTERM" {
			d.stop()
		} else {
			d.kill()
		}
		w.leaks.Reset()
		for _, far := range []string{far4, far6} {
			if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "x"}); a.Heard != "x" || a.Took > 10*time.Second {
				t.Errorf("after %s to %s: %+v", how, far, a)
			}
		}
		if w.leaks.Packets() == 0 {
			t.Errorf("after %s nothing went by the uplink", how)
		}
	}
	if _, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s", code, errs)
	}
}
