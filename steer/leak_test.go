package steer_test

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// TCP flags.
const (
	syn, rst, ecn = 0x02, 0x04, 0xc0
)

// ways are the client's networks and the server in them.
var ways = []struct{ network, server string }{
	{"tcp4", server4 + ":7000"}, {"udp4", server4 + ":7000"},
	{"tcp6", "[" + server6 + "]:7000"}, {"udp6", "[" + server6 + "]:7000"},
}

// Selected programs are answered from beyond the device, by whichever means
// they were marked, and others by the uplink, as ever.
func TestSelectedTakeTheDevice(t *testing.T) {
	tests := []struct {
		name      string
		rpFilter  string
		noDefault bool // no default route in main: marks must be there before connect
	}{
		{name: "usual", rpFilter: "0"},
		{name: "strict rp_filter", rpFilter: "1"},
		{name: "no default route", rpFilter: "0", noDefault: true},
		{name: "no default route, strict rp_filter", rpFilter: "1", noDefault: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.home.Sysctl("net.ipv4.conf.all.rp_filter", tt.rpFilter)
			w.home.Sysctl("net.ipv4.conf.default.rp_filter", tt.rpFilter)
			if tt.noDefault {
				w.home.Run("ip", "route", "del", "default")
				w.home.Run("ip", "-6", "route", "del", "default")
			}
			w.steer(w.plan())
			for _, way := range ways {
				// BPF sets the same mark at the same place as SO_MARK.
				if got := w.out("ask", way.network, way.server, "mark=101"); got != "beyond" {
					t.Errorf("%s, marked socket: %s", way.network, got)
				}
				if tt.noDefault {
					continue
				}
				if got := w.in("ask", way.network, way.server); got != "beyond" {
					t.Errorf("%s, selected: %s", way.network, got)
				}
			}
			if !tt.noDefault {
				for _, addr := range []string{server4, server6} {
					cmd := w.selected.Command(w.home.Command(t.Context(), "ping", "-c1", "-W2", addr))
					if got := output(cmd); !strings.Contains(got, "1 received") {
						t.Errorf("ping %s, selected: %s", addr, got)
					}
				}
			}
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets of selected programs by the uplink", n)
			}
			if tt.noDefault {
				return
			}
			before := w.pipe.packets()
			for _, way := range ways {
				if got := w.out("ask", way.network, way.server); got != "uplink" {
					t.Errorf("%s, not selected: %s", way.network, got)
				}
			}
			if n := w.pipe.packets() - before; n != 0 {
				t.Errorf("%d packets of other programs in the device", n)
			}
		})
	}
}

// SO_BINDTODEVICE needs no capability and no route.
func TestDeviceBindingIsDropped(t *testing.T) {
	w := newWorld(t)
	s := w.steer(w.plan())
	for _, way := range ways {
		for _, mark := range []string{"mark=0", "mark=101"} {
			got := w.in("ask", way.network, way.server, "dev="+w.uplink, mark, "wait=300")
			if got == "uplink" || got == "beyond" {
				t.Errorf("%s %s, bound to %s: answered by %s", way.network, mark, w.uplink, got)
			}
			if strings.HasPrefix(way.network, "udp") && !strings.Contains(got, "operation not permitted") {
				t.Errorf("%s %s, bound to %s: %s, want EPERM at once", way.network, mark, w.uplink, got)
			}
		}
	}
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets left by the uplink", n)
	}
	if c, err := s.Counters(); err != nil || c.Guard == 0 {
		t.Errorf("counters %+v, %v: the guard saw nothing", c, err)
	}
}

// A selected server answers those who come in from outside, the way they came.
func TestSelectedServerIsReached(t *testing.T) {
	for _, mark := range []string{"mark=0", "mark=101"} {
		t.Run(mark, func(t *testing.T) {
			w := newWorld(t)
			w.steer(w.plan())
			srv := w.lab.StartCommand(w.selected.Command(w.command(w.home, "serve", ":6000", mark)))
			labtest.Eventually(t, 5*time.Second, func() bool { return strings.Contains(srv.Output(), "ready") }, "server")
			before := w.pipe.packets()
			for _, network := range []string{"tcp", "udp"} {
				for _, addr := range []string{"10.9.0.2:6000", "[fd09::2]:6000"} {
					for name, from := range map[string]*labtest.Host{"on-link": w.router, "off-link": w.far} {
						if got := output(w.command(from, "ask", network, addr)); got != "selected" {
							t.Errorf("%s %s from %s: %s", network, addr, name, got)
						}
					}
				}
			}
			if n := w.pipe.packets() - before; n != 0 {
				t.Errorf("%d packets of a server in the device", n)
			}
		})
	}
}

// A client that is killed while it connects leaves no socket, and the answer
// that comes then is met with a RST, by the way of the connection.
func TestPacketsWithoutSocketTakeTheDevice(t *testing.T) {
	for _, mark := range []string{"mark=0", "mark=101"} {
		t.Run(mark, func(t *testing.T) {
			w := newWorld(t)
			p := w.plan()
			if mark != "mark=0" {
				p.Cgroups = nil // BPF alone has marked it
			}
			w.steer(p)
			release := w.holdAnswers()
			w.connectAndKill("connect", server4+":7000", mark)
			release()
			labtest.Eventually(t, 5*time.Second, func() bool { return w.pipe.tcpFlags(rst) > 0 || w.leaks.Packets() > 0 }, "RST")
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets left by the uplink", n)
			}
		})
	}
}

// connectAndKill runs a client in the selected cgroup until its SYN is in the
// device, and kills it.
func (w *world) connectAndKill(args ...string) {
	w.t.Helper()
	before := w.pipe.tcpFlags(syn) + w.pipe.tcpFlags(syn|ecn)
	client := w.lab.StartCommand(w.selected.Command(w.command(w.home, args...)))
	labtest.Eventually(w.t, 5*time.Second, func() bool {
		return w.pipe.tcpFlags(syn)+w.pipe.tcpFlags(syn|ecn) > before
	}, "SYN in the device")
	if err := syscall.Kill(client.Pid, syscall.SIGKILL); err != nil {
		w.t.Fatal(err)
	}
	client.Wait()
}

// What the kernel itself answers to somebody beyond the device goes back there.
func TestKernelAnswersIntoTheDevice(t *testing.T) {
	w := newWorld(t)
	w.steer(w.plan())
	for from, to := range map[string]string{server4: "10.9.0.2", server6: "fd09::2"} {
		if got, err := w.beyond.Try("ping", "-c1", "-W2", "-I", from, to); err != nil {
			t.Errorf("ping %s: %s", to, got)
		}
	}
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets left by the uplink", n)
	}
}

// A program that is not selected and happens to use the addresses and ports of
// a selected one's connection that came to nothing goes its own way.
func TestReusedPortIsNotCaptured(t *testing.T) {
	w := newWorld(t)
	w.steer(w.plan())
	w.holdAnswers()
	w.connectAndKill("connect", server4+":7000", "port=5555")
	if got := w.out("ask", "tcp4", server4+":7000", "port=5555"); got != "uplink" {
		t.Errorf("same ports, not selected: %s", got)
	}
}

// With IPV6_FREEBIND anybody can send to himself from a foreign address, and
// what he sends back then is an answer, but not to one from outside.
func TestForgedInboundIsNoWayOut(t *testing.T) {
	w := newWorld(t)
	w.steer(w.plan())
	if got := w.in("forge", "[fd09::2]:6001", "["+server6+"]:7000"); got != "sent" {
		t.Fatalf("forge: %s", got)
	}
	before := w.leaks.Packets()
	if before != 0 {
		t.Errorf("%d packets left by the uplink", before)
	}
	if w.pipe.packets() == 0 {
		t.Error("nothing came to the device: the test has shown nothing")
	}
}

// Into the device goes only what has a source of this namespace, and out of it
// comes nothing for anybody else, though home routes for others.
func TestNothingPassesThrough(t *testing.T) {
	w := newWorld(t)
	s := w.steer(w.plan())
	w.home.Forward()
	// A published port, as container engines have them.
	w.home.Run("nft", "add table ip nat; add chain ip nat pre { type nat hook prerouting priority -100; }; "+
		"add rule ip nat pre udp dport 8080 dnat to 10.9.0.1:99")
	published := w.router.MeterMatch("udp dport 99")
	before := w.pipe.packets()
	if got := w.in("spoof", "192.0.2.99", server4); got != "operation not permitted" {
		t.Fatalf("spoof: %s", got)
	}
	ap := netip.MustParseAddrPort
	w.pipe.home.Write(datagram(ap(server4+":7000"), ap("10.8.0.2:9"), "x"))
	w.pipe.home.Write(datagram(ap(server4+":7000"), ap("10.9.0.1:9"), "x"))
	w.pipe.home.Write(datagram(ap(server4+":7000"), ap("224.0.0.1:9"), "x"))
	w.pipe.home.Write(datagram(ap(server4+":7000"), ap("10.9.0.2:8080"), "x"))
	labtest.Eventually(t, 5*time.Second, func() bool {
		c, err := s.Counters()
		return err == nil && c.Spoof >= 1 && c.Stray >= 4
	}, "counters")
	if n := w.leaks.Packets() + published.Packets(); n != 0 {
		t.Errorf("%d packets went on from the device to the uplink", n)
	}
	if c, err := s.Counters(); err != nil || c.Guard != 0 {
		t.Errorf("%+v %v: what nat sent elsewhere came as far as the guard", c, err)
	}
	if n := w.pipe.packets() - before; n != 0 {
		t.Errorf("%d packets with a foreign source in the device", n)
	}
}

// What cgtun itself sends is not captured, though it was started inside of a
// selected cgroup.
func TestOwnCgroupIsNotCaptured(t *testing.T) {
	w := newWorld(t)
	self := w.lab.Cgroup("selected/cgtun")
	p := w.plan()
	p.Self = cgroupOf(self)
	w.steer(p)
	for _, way := range ways {
		if got := output(self.Command(w.command(w.home, "ask", way.network, way.server))); got != "uplink" {
			t.Errorf("%s, own cgroup: %s", way.network, got)
		}
		if got := w.in("ask", way.network, way.server); got != "beyond" {
			t.Errorf("%s, its parent: %s", way.network, got)
		}
	}
}

// A bypassed prefix goes the ordinary way, marked or not, until a reload takes
// it off the list.
func TestBypassIsLeftAlone(t *testing.T) {
	w := newWorld(t)
	p := w.plan()
	p.Bypass = append(p.Bypass, netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8::/32"))
	s := w.steer(p)
	want := "uplink"
	for range 2 {
		for _, way := range ways {
			for _, mark := range []string{"mark=0", "mark=101"} {
				if got := w.in("ask", way.network, way.server, mark); got != want {
					t.Errorf("%s %s: %s, want %s", way.network, mark, got, want)
				}
			}
		}
		if err := s.Apply(w.plan()); err != nil {
			t.Fatal(err)
		}
		want = "beyond"
	}
}

// While plans are applied one after another, no packet finds half of one.
func TestApplyHasNoGap(t *testing.T) {
	w := newWorld(t)
	s := w.steer(w.plan())
	other := w.lab.Cgroup("other")
	w.lab.StartCommand(w.selected.Command(w.command(w.home, "send", "udp4", server4+":7000")))
	w.lab.StartCommand(w.selected.Command(w.command(w.home, "send", "udp6", "["+server6+"]:7000")))
	labtest.Eventually(t, 5*time.Second, func() bool { return w.pipe.packets() > 100 }, "packets in the device")
	for i := range 100 {
		p := w.plan()
		if i%2 == 0 {
			p.Cgroups = append(p.Cgroups, cgroupOf(other))
			p.Bypass = append(p.Bypass, netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8:1::/48"))
		}
		if i%3 == 0 { // as a reload of a file with other numbers does
			p.Mark, p.Priority = 102, 10102
		}
		if err := s.Apply(p); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets left by the uplink", n)
	}
}
