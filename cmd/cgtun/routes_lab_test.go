package main_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

// A namespace that is selected by its name: everything in it is captured, in
// whatever cgroup, from cgtun's start on and when it comes later; what is
// forwarded in through an interface that is selected, too. One without an uplink is
// captured as well, and one with two, whichever of them is there.
//
//	lab1 eth0 (10.60.0.2, fd60::2) ──── eth2 (10.60.0.1, fd60::1) machine
//	     eth1 (10.61.0.2, fd61::2) ──── eth3 (10.61.0.1, fd61::1) router
//	lab2 (lo alone)
func TestLabsAreCaptured(t *testing.T) {
	t.Parallel()
	for name, choice := range map[string]string{
		"netns":      "netns = [\"%s\"]",
		"interfaces": "interfaces = [\"%s\"]",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "traceroute")
			w.router.Sysctl("net.ipv4.icmp_ratelimit", "0")
			w.router.Sysctl("net.ipv6.icmp.ratelimit", "0")
			echo := w.server.ServeEcho(":7000")
			w.server.ServeUDPEcho(port(far4, 7000))
			w.server.ServeUDPEcho(port(far6, 7000))
			w.machine.Forward()
			lab1 := w.lab.Host("lab1")
			link := w.lab.Link(w.machine, lab1, "10.60.0.1/24", "10.60.0.2/24", "fd60::1/64", "fd60::2/64")
			lab1.Run("ip", "route", "add", "default", "via", "10.60.0.1")
			lab1.Run("ip", "-6", "route", "add", "default", "via", "fd60::1")
			other := w.lab.Link(lab1, w.router, "10.61.0.2/24", "10.61.0.1/24", "fd61::2/64", "fd61::1/64")
			lab1.Run("ip", "route", "add", "default", "via", "10.61.0.1", "metric", "2000")
			lab1.Run("ip", "-6", "route", "add", "default", "via", "fd61::1", "metric", "2000")
			beside := w.router.MeterMatch(fmt.Sprintf(`iifname %q meta l4proto { tcp, udp }`, other.B))
			lab2 := w.lab.Host("lab2")
			chosen := fmt.Sprintf(choice, map[string]string{"netns": lab1.Name + `", "` + lab2.Name, "interfaces": link.A}[name])
			w.start(strings.Replace(w.config(second), "[select]", "[select]\n"+chosen, 1))
			for _, far := range []string{far4, far6} {
				for _, network := range []string{"tcp", "udp"} {
					labtest.Eventually(t, patience(), func() bool { return askEcho(lab1, network, port(far, 7000)) == nil }, "%s to %s", network, far)
				}
			}
			if name == "netns" {
				asksAll := func(lab *labtest.Host, when string) {
					t.Helper()
					for _, to := range []string{port(far4, 7000), port(far6, 7000)} {
						for _, network := range []string{"tcp", "udp"} {
							labtest.Eventually(t, patience(), func() bool { return askEcho(lab, network, to) == nil }, "%s: %s to %s", when, network, to)
						}
					}
				}
				down := func(device, net4, net6 string) {
					t.Helper()
					lab1.Run("ip", "link", "set", device, "down")
					labtest.Eventually(t, patience(), func() bool {
						table := fmt.Sprint(w.number)
						return !strings.Contains(lab1.Run("ip", "route", "show", "table", table), "src "+net4) &&
							!strings.Contains(lab1.Run("ip", "-6", "route", "show", "table", table), "src "+net6)
					}, "nothing is sent from %s any more", device)
				}
				asksAll(lab2, "without an uplink")
				down(link.B, "10.60.", "fd60:")
				asksAll(lab1, "without the first uplink")
				down(other.A, "10.61.", "fd61:")
				asksAll(lab1, "without both")
				if n := beside.Packets(); n != 0 {
					t.Errorf("%d packets left by the second uplink", n)
				}
			}
			if name == "interfaces" {
				// What cgtun says itself, and what others say, comes through too.
				for far, hops := range map[string][]string{
					far4: {"10.60.0.1", w.tunAddress(false), "10.2.0.1", far4},
					far6: {"fd60::1", w.tunAddress(true), "fd02::1", far6},
				} {
					out, err := lab1.Try("traceroute", "-n", "-q", "1", "-w", "3", "-I", far)
					if err != nil || !seesHops(out, hops) {
						t.Errorf("traceroute: %v: want %v\n%s", err, hops, out)
					}
				}
			}
			w.noLeak(name)
			for _, seen := range echo.Clients() {
				if !isSecond(seen) {
					t.Errorf("the server saw %v", seen)
				}
			}
			// Who is not meant, is not touched.
			w.run(outside, "env", probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"})...)
			if n := w.leaks.Packets(); n == 0 {
				t.Error("who is not selected was captured")
			}
			if name == "netns" {
				list := w.attachments()
				if len(list) != 2 || list[0].ID != lab1.Name || string(list[0].Netns) != lab1.Name || list[0].State != attach.StateUp ||
					list[1].ID != lab2.Name || list[1].State != attach.StateUp {
					t.Errorf("attachments %+v", list)
				}
			}
		})
	}
}

// Two routes at once, each with its own cgroup, mark, table and way: one by the
// stack, one by a router that the kernel is told. Neither touches the other's,
// nor who is not selected.
func TestSeveralRoutes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	echo := w.server.ServeEcho(":7000")
	by := w.lab.Cgroup("by")
	d := w.start(fmt.Sprintf(`
[[route]]
name = "stack"
mark = %[1]d
table = %[1]d
priority = 10101
[route.select]
cgroups = [%[2]q]
[route.tun]
name = "tun0"

[[route]]
name = "router"
mark = %[3]d
table = %[3]d
priority = 10102
via = {gateway = "10.2.0.1", gateway6 = "fd02::1", dev = "eth1"}
[route.select]
cgroups = [%[4]q]

[control]
socket = %[5]q
[log]
level = "debug"
`, w.number, w.sel.Path, w.number+1_000_000_000, by.Path, w.socket))
	s := w.status()
	if len(s.Routes) != 2 || len(s.Attachments) != 2 || s.Attachments[0].Capture != "tun" || s.Attachments[1].Capture != "kernel" ||
		s.Attachments[1].Route != "router" || s.Attachments[1].State != attach.StateUp {
		t.Fatalf("status %+v", s)
	}
	dial := probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"})
	for _, far := range []string{far4, far6} {
		dial = probeArgs(probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "x"})
		if out, err := by.In(t.Context(), w.machine, "env", dial...).Output(); err != nil {
			t.Fatalf("by the router: %v %s", err, out)
		}
		w.noLeak("by the router, to " + far)
	}
	sent, _ := w.device()
	w.run(inside, "env", dial...)
	if now, _ := w.device(); now == sent {
		t.Error("who is selected by the first route did not go into tun0")
	}
	w.leaks.Reset()
	w.run(outside, "env", dial...)
	if w.leaks.Packets() == 0 {
		t.Error("who is not selected did not go by the uplink")
	}
	if n := len(echo.Clients()); n != 4 {
		t.Errorf("the server saw %d connections", n)
	}
	// The way goes away, and comes back.
	w.machine.Run("ip", "link", "set", "eth1", "down")
	labtest.Eventually(t, patience(), func() bool { return w.status().Attachments[1].State == attach.StateFailed }, "the way is down")
	w.leaks.Reset()
	if out, err := by.In(t.Context(), w.machine, "env", dial...).Output(); err != nil || !strings.Contains(string(out), "Errno") || strings.Contains(string(out), `"Heard":"x"`) {
		t.Errorf("without its way: %v %s", err, out)
	}
	w.noLeak("without its way")
	w.machine.Run("ip", "link", "set", "eth1", "up")
	w.machine.Run("ip", "addr", "add", "fd02::2/64", "dev", "eth1", "nodad")
	labtest.Eventually(t, patience(), func() bool { return w.status().Attachments[1].State == attach.StateUp }, "the way is back")
	labtest.Eventually(t, patience(), func() bool {
		out, err := by.In(t.Context(), w.machine, "env", probeArgs(probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x", Wait: time.Second})...).Output()
		return err == nil && strings.Contains(string(out), `"Heard":"x"`)
	}, "it is gone again")
	d.stop()
}
