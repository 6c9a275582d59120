package steer_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
	"cgtun/steer"
)

// routers is a world with another network, in which there are two routers.
// Both serve the address that everybody asks for, each with its own name.
//
//	first (10.6.0.1, fd06::1) ─┬─ switch ─── home (10.6.0.9, fd06::9) ─── router ─── far
//	second (10.6.0.2, fd06::2) ╯
type routers struct {
	*world
	sw, first, second *labtest.Host
	dev               string // home's device to them
	port              string // the switch's to first
}

func newRouters(t *testing.T) *routers {
	w := &routers{world: newWorld(t)}
	w.sw, w.first, w.second = w.lab.Host("switch"), w.lab.Host("first"), w.lab.Host("second")
	link := w.lab.Link(w.home, w.sw, "10.6.0.9/24", "", "fd06::9/64", "")
	one := w.lab.Link(w.first, w.sw, "10.6.0.1/24", "", "fd06::1/64", "")
	two := w.lab.Link(w.second, w.sw, "10.6.0.2/24", "", "fd06::2/64", "")
	w.dev, w.port = link.A, one.B
	w.sw.Run("ip", "link", "add", "br0", "type", "bridge")
	w.sw.Run("ip", "link", "set", "br0", "up")
	for _, port := range []string{link.B, one.B, two.B} {
		w.sw.Run("ip", "link", "set", port, "master", "br0")
	}
	for h, name := range map[*labtest.Host]string{w.first: "first", w.second: "second"} {
		serveName(h, name)
		// The way back to sockets that had their source before their mark.
		h.Run("ip", "route", "add", "10.9.0.0/24", "via", "10.6.0.9")
		h.Run("ip", "route", "add", "fd09::/64", "via", "fd06::9")
	}
	return w
}

func (w *routers) plan(via steer.Via) steer.Plan {
	p := w.world.plan()
	p.Device, p.Via = "", via
	p.Bypass = append(p.Bypass, netip.MustParsePrefix("10.6.0.0/24"), netip.MustParsePrefix("fd06::/64"))
	return p
}

var addr = netip.MustParseAddr

// The way may be a router, or whoever is behind a device; nobody else is
// reached by it, and nothing else by who is selected.
func TestSelectedTakeTheRouter(t *testing.T) {
	t.Parallel()
	gw4, gw6 := []netip.Addr{addr("10.6.0.1")}, []netip.Addr{addr("fd06::1")}
	tests := []struct {
		name   string
		via    func(dev string) steer.Via
		answer string
	}{
		{"gateway", func(dev string) steer.Via { return steer.Via{Gateway: gw4, Gateway6: gw6, Dev: dev} }, "first first first first"},
		{"gateway without device", func(string) steer.Via { return steer.Via{Gateway: gw4, Gateway6: gw6} }, "first first first first"},
		{"v4 gateway", func(dev string) steer.Via { return steer.Via{Gateway: gw4, Dev: dev} }, "first first"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newRouters(t)
			s := w.steer(w.plan(tt.via(w.dev)))
			if err := s.Down(); err != nil {
				t.Errorf("Down: %v", err)
			}
			for _, mark := range []string{"mark=0", "mark=101"} {
				got := asks(func(args ...string) string { return w.in(append(args, mark)...) })
				if !strings.HasPrefix(got, tt.answer) || strings.Contains(got, "uplink") || strings.Count(got, "first") != strings.Count(tt.answer, "first") {
					t.Errorf("%s: %s, want %s", mark, got, tt.answer)
				}
				if got := w.in("ask", "tcp4", server4+":7000", "dev="+w.uplink, mark, "wait=300"); got == "uplink" {
					t.Errorf("%s, bound to the uplink: %s", mark, got)
				}
			}
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets by the uplink", n)
			}
			if got := asks(w.out); got != allUplink {
				t.Errorf("others: %s", got)
			}
		})
	}
}

// The device of a way may come later, go, and come back. Meanwhile nothing
// leaves.
func TestWayComesAndGoes(t *testing.T) {
	w := newWorld(t)
	vm := w.lab.Host("vm")
	serveName(vm, "vm")
	p := w.plan()
	p.Device, p.Via = "", steer.Via{Dev: "vmnet"}
	s := w.steer(p)
	said := kept(t, s)
	for range 2 {
		if s.Down() == nil {
			t.Error("Down() is nil without the device")
		}
		if got := asks(briefly(w.in)); strings.Contains(got, "uplink") {
			t.Errorf("without the device: %s", got)
		}
		w.home.Run("ip", "link", "add", "vmnet", "type", "veth", "peer", "name", "eth0", "netns", vm.Name)
		vm.Run("ip", "link", "set", "eth0", "up")
		vm.Run("ip", "addr", "add", server6+"/128", "dev", "eth0", "nodad")
		vm.Run("ip", "route", "add", "default", "dev", "eth0")
		vm.Run("ip", "addr", "add", "fd05::2/64", "dev", "eth0", "nodad")
		vm.Run("ip", "route", "add", "default", "via", "fd05::1")
		w.home.Run("ip", "link", "set", "vmnet", "up")
		w.home.Run("ip", "addr", "add", "fd05::1/64", "dev", "vmnet", "nodad")
		labtest.Eventually(t, 10*time.Second, func() bool { return s.Down() == nil }, "the device is seen")
		if got := asks(w.in); got != "vm vm vm vm" {
			t.Errorf("with the device: %s", got)
		}
		w.home.Run("ip", "link", "del", "vmnet")
		labtest.Eventually(t, 10*time.Second, func() bool { return s.Down() != nil }, "the device is missed")
	}
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets by the uplink", n)
	}
	if got := said(); got != "" {
		t.Errorf("Repair said %q: nobody took anything away", got)
	}
}

// Of several gateways the first that answers is taken, and taken again when it
// is back.
func TestFirstGatewayThatIsAlive(t *testing.T) {
	t.Parallel()
	w := newRouters(t)
	s := w.steer(w.plan(steer.Via{
		Gateway: []netip.Addr{addr("10.6.0.1"), addr("10.6.0.2")}, Gateway6: []netip.Addr{addr("fd06::1"), addr("fd06::2")}, Dev: w.dev,
	}))
	kept(t, s)
	until := func(want string) {
		t.Helper()
		labtest.Eventually(t, 40*time.Second, func() bool {
			return w.in("ask", "udp4", server4+":7000") == want && w.in("ask", "udp6", "["+server6+"]:7000") == want
		}, want+" answers")
	}
	until("first")
	w.sw.Run("ip", "link", "set", w.port, "down")
	until("second")
	w.sw.Run("ip", "link", "set", w.port, "up")
	until("first")
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets by the uplink", n)
	}
}

// Two routes side by side, each with its own mark, table and way: none takes
// the other's packets, nor unmarks them.
func TestTwoRoutesWithTwoWays(t *testing.T) {
	for _, masks := range [][2]uint32{{0xffffffff, 0xffffffff}, {0xff, 0xffff}} {
		w := newRouters(t)
		other := w.lab.Cgroup("other")
		p1 := w.world.plan()
		p1.Mask = masks[0]
		// What the first leaves alone, the second does not.
		p1.Bypass = append(p1.Bypass, netip.MustParsePrefix("203.0.113.128/25"))
		p2 := w.plan(steer.Via{Gateway: []netip.Addr{addr("10.6.0.1")}, Gateway6: []netip.Addr{addr("fd06::1")}, Dev: w.dev})
		p2.Mark, p2.Mask, p2.Table, p2.Priority = 102, masks[1], 102, 10102
		p2.Cgroups = []steer.Cgroup{cgroupOf(other)}
		w.first.Run("ip", "addr", "add", "203.0.113.200/32", "dev", "lo")
		w.steer(p1)
		w.steer(p2)
		second := func(args ...string) string { return output(other.Command(w.command(w.home, args...))) }
		if got := asks(w.in); got != allBeyond {
			t.Errorf("%x, first route: %s", masks, got)
		}
		if got := asks(second); got != "first first first first" {
			t.Errorf("%x, second route: %s", masks, got)
		}
		for _, mark := range []string{"mark=0", "mark=102"} {
			if got := second("ask", "tcp4", "203.0.113.200:7000", mark); got != "first" {
				t.Errorf("%x, second route to what the first leaves alone, %s: %s", masks, mark, got)
			}
		}
		if n := w.leaks.Packets(); n != 0 {
			t.Errorf("%x: %d packets by the uplink", masks, n)
		}
		if got := asks(w.out); got != allUplink {
			t.Errorf("%x, others: %s", masks, got)
		}
	}
}

// The way may be somebody else's transparent proxy: here shadowsocks' one,
// whose server is far. What it does not listen for is refused, and answered by
// nobody else: all addresses are local on this way, and home has a service on
// the port that is asked.
func TestSelectedTakeTheTransparentProxy(t *testing.T) {
	t.Parallel()
	labtest.Need(t, labtest.Tool("ss-redir"), labtest.Tool("ss-server"))
	for _, tt := range []struct {
		via, listen string
		rpFilter    string
		serves      string
	}{
		{"127.0.0.1:12345", "127.0.0.1", "0", "tcp4 udp4"},
		{"127.0.0.1:12345", "127.0.0.1", "1", "tcp4 udp4"},
		{"[::1]:12345", "::1", "1", "tcp6 udp6"},
		{"0.0.0.0:12345", "0.0.0.0", "0", "tcp4 udp4"},
		// It hears udp4, too, but cannot answer: TestListenerOfBothFamilies.
		{"[::]:12345", "::", "1", "tcp4 tcp6 udp6"},
		{"127.0.0.1:12345", "127.0.0.2", "0", ""}, // it is not there
	} {
		t.Run(fmt.Sprintf("%s to %s, rp_filter %s", tt.via, tt.listen, tt.rpFilter), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.home.Sysctl("net.ipv4.conf.all.rp_filter", tt.rpFilter)
			config := filepath.Join(t.TempDir(), "ss.json")
			text := fmt.Sprintf(`{"server":"10.8.0.2","server_port":8388,"local_address":%q,"local_port":12345,`+
				`"password":"lab","method":"aes-256-gcm","timeout":60}`, tt.listen)
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			w.far.Start("ss-server", "-s", "10.8.0.2", "-p", "8388", "-k", "lab", "-m", "aes-256-gcm", "-u")
			w.home.Start("ss-redir", "-c", config, "-u", "-T")
			for _, network := range []string{"tcp", "udp"} {
				labtest.Eventually(t, 20*time.Second, func() bool {
					return strings.Contains(w.home.Run("ss", "-ln", "--"+network), ":12345")
				}, "the proxy listens")
			}
			w.home.Serve(":7001", func(c *net.TCPConn) error { _, err := c.Write([]byte("home\n")); return err })
			w.home.ServeUDPEcho(":7001")
			w.leaks = w.router.Meter(nil, []string{server4, server6}) // but for what the proxy sends to its server
			p := w.plan()
			p.Device, p.Via = "", steer.Via{TProxy: netip.MustParseAddrPort(tt.via)}
			w.steer(p)
			for _, way := range ways {
				for _, mark := range []string{"mark=0", "mark=101"} {
					if strings.Contains(tt.serves, way.network) {
						labtest.Eventually(t, 20*time.Second, func() bool {
							return w.in("ask", way.network, way.server, mark) == "uplink"
						}, "%s, %s through the proxy", way.network, mark)
						continue
					}
					got := w.in("ask", way.network, strings.Replace(way.server, ":7000", ":7001", 1), mark)
					if told := strings.Contains(got, "refused") || strings.Contains(got, "no route"); !told && mark == "mark=101" && way.network[:3] == "tcp" {
						t.Errorf("%s, which the proxy does not serve, is not told: %s", way.network, got)
					}
					if !strings.HasPrefix(got, "dial") && !strings.HasPrefix(got, "write") && !strings.HasPrefix(got, "read") {
						t.Errorf("%s, %s, which the proxy does not serve, was answered: %s", way.network, mark, got)
					}
				}
			}
			for _, server := range []string{server4, server6} { // pings are nobody's to answer
				if got := output(w.selected.Command(w.home.Command(t.Context(), "ping", "-c1", "-W1", server))); strings.Contains(got, "1 received") {
					t.Errorf("ping was answered: %s", got)
				}
			}
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets by the uplink", n)
			}
			if got := asks(w.out); got != allUplink || w.leaks.Packets() == 0 {
				t.Errorf("others: %s, %d packets by the uplink", got, w.leaks.Packets())
			}
		})
	}
}

// A listener without an address of its own hears both families, if it listens
// for both.
func TestListenerOfBothFamilies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	heard := make(chan string, 100)
	var pc net.PacketConn
	err := w.home.Do(func() (err error) {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			ctlErr := c.Control(func(fd uintptr) {
				err = errors.Join(
					unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1),
					unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1))
			})
			return errors.Join(ctlErr, err)
		}}
		pc, err = lc.ListenPacket(context.Background(), "udp", "[::]:12345")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		for buf := make([]byte, 100); ; {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			heard <- from.String()
		}
	}()
	for _, via := range []string{"0.0.0.0:12345", "[::]:12345"} {
		p := w.plan()
		p.Device, p.Via = "", steer.Via{TProxy: netip.MustParseAddrPort(via)}
		s := w.steer(p)
		for network, from := range map[string]string{"udp4": "10.9.0.2:", "udp6": "[fd09::2]:"} {
			server := map[string]string{"udp4": server4 + ":7000", "udp6": "[" + server6 + "]:7000"}[network]
			w.in("ask", network, server) // nobody answers
			select {
			case got := <-heard:
				if !strings.HasPrefix(got, from) {
					t.Errorf("%s, %s: heard %s", via, network, got)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("%s, %s: not heard", via, network)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets by the uplink", n)
	}
}
