package steer_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
	"cgtun/steer"
)

// vms is a world in which home routes for others, too. What comes in from vm
// is selected; what comes from other is not. Behind vm there is a network of
// its own.
//
//	vm (10.77.0.2; 10.78.0.1 and fd78::1 behind it) ── home ── router ── far
//	other (10.79.0.2) ─────────────────────────────────╯ ╰═tun═ beyond
type vms struct {
	*world
	vm, other *labtest.Host
	dev       string // home's device to vm
}

func newVMs(t *testing.T) *vms {
	w := &vms{world: newWorld(t)}
	w.vm, w.other = w.lab.Host("vm"), w.lab.Host("other")
	w.dev = w.lab.Link(w.home, w.vm, "10.77.0.1/24", "10.77.0.2/24", "fd77::1/64", "fd77::2/64").A
	w.lab.Link(w.home, w.other, "10.79.0.1/24", "10.79.0.2/24", "fd79::1/64", "fd79::2/64")
	w.vm.Run("ip", "addr", "add", "10.78.0.1/32", "dev", "lo")
	w.vm.Run("ip", "addr", "add", "fd78::1/128", "dev", "lo", "nodad")
	w.home.Forward()
	w.home.Run("ip", "route", "add", "10.78.0.0/24", "via", "10.77.0.2")
	w.home.Run("ip", "route", "add", "fd78::/64", "via", "fd77::2")
	for h, n := range map[*labtest.Host]string{w.vm: "77", w.other: "79"} {
		h.Run("ip", "route", "add", "default", "via", "10."+n+".0.1")
		h.Run("ip", "route", "add", "default", "via", "fd"+n+"::1")
		w.router.Run("ip", "route", "add", "10."+n+".0.0/24", "via", "10.9.0.2")
		w.router.Run("ip", "route", "add", "fd"+n+"::/64", "via", "fd09::2")
	}
	return w
}

func (w *vms) plan() steer.Plan {
	p := w.world.plan()
	p.Interfaces = []string{w.dev}
	for _, prefix := range []string{"10.77.0.0/24", "fd77::/64", "10.79.0.0/24", "fd79::/64"} {
		p.Bypass = append(p.Bypass, netip.MustParsePrefix(prefix))
	}
	return p
}

func (w *vms) from(h *labtest.Host) func(...string) string {
	return func(args ...string) string { return output(w.command(h, args...)) }
}

// What comes in through an interface takes the device with the address of who
// sent it, also where the machine masquerades, where rp_filter is strict, and
// from a network behind the next one. Nobody else's does.
func TestForwardedTakesTheDevice(t *testing.T) {
	for _, rpFilter := range []string{"0", "1"} {
		t.Run("rp_filter "+rpFilter, func(t *testing.T) {
			w := newVMs(t)
			w.home.Sysctl("net.ipv4.conf.all.rp_filter", rpFilter)
			w.home.Run("nft", "add table ip nat; add chain ip nat post { type nat hook postrouting priority 100; }; "+
				"add rule ip nat post ip saddr 10.77.0.0/24 oifname != "+w.dev+" masquerade")
			s := w.steer(w.plan())
			if got := asks(w.from(w.vm)); got != allBeyond {
				t.Errorf("vm: %s", got)
			}
			for network, src := range map[string]string{"tcp4": "10.78.0.1", "udp4": "10.78.0.1", "tcp6": "fd78::1", "udp6": "fd78::1"} {
				server := server4
				if strings.HasSuffix(network, "6") {
					server = "[" + server6 + "]"
				}
				if got := w.from(w.vm)("ask", network, server+":7000", "src="+src); got != "beyond" {
					t.Errorf("behind vm, %s: %s", network, got)
				}
			}
			if got, err := w.vm.Try("ping", "-c1", "-W2", server4); err != nil {
				t.Errorf("ping: %s", got)
			}
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets by the uplink", n)
			}
			if n := w.pipe.from("10.77.0.2"); n == 0 {
				t.Error("the device saw no packet with vm's address")
			}
			// Stray is what comes too late for who asked.
			if c, err := s.Counters(); err != nil || c.Spoof+c.Guard != 0 {
				t.Errorf("dropped: %+v %v", c, err)
			}
			// What is answered to these is nobody's.
			w.from(w.vm)("broken", "10.77.0.2", server4)
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets that are no connection's by the uplink", n)
			}
			before := w.pipe.packets()
			if got := asks(w.from(w.other)); got != allUplink {
				t.Errorf("other: %s", got)
			}
			if n := w.pipe.packets() - before; n != 0 {
				t.Errorf("%d packets of other in the device", n)
			}
			if got := asks(w.in); got != allBeyond {
				t.Errorf("selected program: %s", got)
			}
		})
	}
}

// Servers behind an interface answer the way that the question came, and are
// reached from there and from home as before.
func TestServerBehindAnInterfaceIsReached(t *testing.T) {
	w := newVMs(t)
	w.steer(w.plan())
	srv := w.lab.StartCommand(w.command(w.vm, "serve", ":6000"))
	labtest.Eventually(t, 10*time.Second, func() bool { return strings.Contains(srv.Output(), "ready") }, "server")
	before := w.pipe.packets()
	for _, network := range []string{"tcp", "udp"} {
		for _, addr := range []string{"10.77.0.2:6000", "[fd77::2]:6000"} {
			for name, from := range map[string]*labtest.Host{"far": w.far, "other": w.other, "home": w.home} {
				if got := w.from(from)("ask", network, addr); got != "selected" {
					t.Errorf("%s %s from %s: %s", network, addr, name, got)
				}
			}
		}
	}
	if n := w.pipe.packets() - before; n != 0 {
		t.Errorf("%d packets of a server in the device", n)
	}
}

// Out of the device something comes for those behind the interfaces, and for
// nobody else; into it goes only what has their addresses.
func TestForwardedKeepsToItsInterface(t *testing.T) {
	w := newVMs(t)
	s := w.steer(w.plan())
	before := w.pipe.packets()
	spoofed := w.home.MeterMatch("ip saddr 192.0.2.99")
	labtest.Eventually(t, 10*time.Second, func() bool {
		w.from(w.vm)("spoof", "192.0.2.99", server4)
		c, err := s.Counters()
		return err == nil && c.Spoof > 0 && spoofed.Packets() > 0
	}, "spoofed packet counted")
	if n := w.pipe.packets() - before + int(w.leaks.Packets()); n != 0 {
		t.Errorf("%d packets with a foreign source went on", n)
	}
	ap := netip.MustParseAddrPort
	there := w.vm.MeterMatch("udp dport 9")
	elsewhere := w.other.MeterMatch("udp dport 9")
	labtest.Eventually(t, 10*time.Second, func() bool {
		w.pipe.home.Write(datagram(ap(server4+":7000"), ap("10.77.0.2:9"), "x"))
		w.pipe.home.Write(datagram(ap(server4+":7000"), ap("10.78.0.1:9"), "x"))
		w.pipe.home.Write(datagram(ap(server4+":7000"), ap("10.79.0.2:9"), "x"))
		c, err := s.Counters()
		return err == nil && there.Packets() >= 2 && c.Stray > 0
	}, "packet for vm delivered, one for other dropped")
	if n := elsewhere.Packets(); n != 0 {
		t.Errorf("%d packets out of the device reached other", n)
	}
}

// Interfaces come and go with a new plan, and the ip rules are in order then.
func TestInterfacesAreAddedLater(t *testing.T) {
	w := newVMs(t)
	s := w.steer(w.world.plan())
	if got := asks(w.from(w.vm)); got != allUplink {
		t.Errorf("before: %s", got)
	}
	for range 2 {
		if err := s.Apply(w.plan()); err != nil {
			t.Fatal(err)
		}
		rules := w.home.Run("ip", "rule")
		back := strings.Index(rules, "10101:\tfrom all fwmark 0x65 iif tun0 lookup main proto 197")
		if ours := strings.Index(rules, "lookup 101 proto 197"); back < 0 || back > ours {
			t.Errorf("ip rules:\n%s", rules)
		}
	}
	if got := asks(w.from(w.vm)); got != allBeyond {
		t.Errorf("with interfaces: %s", got)
	}
	if err := s.Apply(w.world.plan()); err != nil {
		t.Fatal(err)
	}
	if rules := w.home.Run("ip", "rule"); strings.Contains(rules, "iif") {
		t.Errorf("ip rules:\n%s", rules)
	}
}
