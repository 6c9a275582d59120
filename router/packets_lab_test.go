package router_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/router"
	"cgtun/rules"
	"cgtun/stack"
	"cgtun/tun"
)

// A client whose datagrams go through a stack, the router and real sockets:
//
//	client ── tun0 ── stack | router | direct ── gate ──── path ──── server
//	10.9.0.1                                10.7.0.1  10.7.0.2/10.8.0.1  10.8.0.2, .3
//	fd09::1                                 fd07::1   fd07::2/fd08::1    fd08::2, ::3
//
// 10.8.0.66 and fd08::66 are rejected by a rule, 10.8.0.99 is dropped.
type datagramLab struct {
	client, gate, path, server *labtest.Host
	toServer                   *labtest.Link
	router                     *router.Router
	stack                      *stack.Stack
}

// inside makes an outbound open its sockets in a namespace of the lab.
type inside struct {
	dialer.Outbound
	host *labtest.Host
}

func (o inside) OpenPackets(ctx context.Context, t dialer.Target) (c *dialer.PacketConn, err error) {
	err = o.host.Do(func() error {
		c, err = o.Outbound.OpenPackets(ctx, t)
		return err
	})
	return c, err
}

func (o inside) DialStream(ctx context.Context, t dialer.Target) (c *dialer.Conn, err error) {
	err = o.host.Do(func() error {
		c, err = o.Outbound.DialStream(ctx, t)
		return err
	})
	return c, err
}

func newDatagramLab(t testing.TB) *datagramLab {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	lab := labtest.New(t)
	l := &datagramLab{client: lab.Host("client"), gate: lab.Host("gate"), path: lab.Host("path"), server: lab.Host("server")}
	lab.Link(l.gate, l.path, "10.7.0.1/24", "10.7.0.2/24", "fd07::1/64", "fd07::2/64")
	l.toServer = lab.Link(l.path, l.server, "10.8.0.1/24", "10.8.0.2/24", "fd08::1/64", "fd08::2/64")
	l.path.Forward()
	l.server.Run("ip", "addr", "add", "10.8.0.3/24", "dev", l.toServer.B)
	l.server.Run("ip", "addr", "add", "fd08::3/64", "dev", l.toServer.B, "nodad", "preferred_lft", "0") // nobody's source by choice
	for _, route := range [][]string{{"10.8.0.0/24", "10.7.0.2"}, {"fd08::/64", "fd07::2"}} {
		l.gate.Run("ip", "route", "add", route[0], "via", route[1])
	}
	for _, route := range [][]string{{"10.7.0.0/24", "10.8.0.1"}, {"fd07::/64", "fd08::1"}} {
		l.server.Run("ip", "route", "add", route[0], "via", route[1])
	}
	ref, err := netns.Named(l.client.Path)
	if err != nil {
		t.Fatal(err)
	}
	device, err := tun.Open(ref, tun.Options{Name: "tun0", Table: 101, Addresses: []netip.Prefix{
		netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")}})
	if err != nil {
		t.Fatal(err)
	}
	l.client.DefaultDevice("tun0")

	set, err := rules.Compile([]rules.Config{
		{CIDR: []netip.Prefix{netip.MustParsePrefix("10.8.0.66/32"), netip.MustParsePrefix("fd08::66/128")}, Use: "reject"},
		{CIDR: []netip.Prefix{netip.MustParsePrefix("10.8.0.99/32")}, Use: "drop"},
	})
	if err != nil {
		t.Fatal(err)
	}
	direct, err := dialer.NewDirect(dialer.Config{Name: "direct"})
	if err != nil {
		t.Fatal(err)
	}
	l.router = router.New(router.Options{})
	l.router.Reload(set, map[string]dialer.Outbound{"direct": inside{direct, l.gate}})
	var queues []stack.Queue
	for _, q := range device.Queues() {
		queues = append(queues, q)
	}
	l.stack, err = stack.New(queues, l.router, stack.Options{Attachment: "home"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { device.Close() })
	labtest.Background(t, "the stack", l.stack.Run)
	return l
}

// udpClient opens a connected client socket.
func (l *datagramLab) udpClient(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	c, err := l.client.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	u := c.(*net.UDPConn)
	raw, err := u.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	level, option := unix.SOL_IP, unix.IP_RECVERR
	if strings.HasPrefix(addr, "[") {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	// Without it a socket is told of some ICMP errors only (ip(7)).
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) })
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// large gives a socket room for what the tests send in one go.
func large(t testing.TB, c *net.UDPConn) *net.UDPConn {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20))
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDatagramsOfEverySizeAreEchoed(t *testing.T) {
	l := newDatagramLab(t)
	for _, addr := range []string{"10.8.0.2:7", "[fd08::2]:7"} {
		l.server.ServeUDPEcho(addr)
		c := l.udpClient(t, addr)
		buf := make([]byte, 70000)
		total := 0
		for _, size := range []int{0, 1, 1200, 1452, 1472, 1473, 8000, 16384, 65000, 65507} {
			want := bytes.Repeat([]byte{byte(size + 1)}, size)
			if _, err := c.Write(want); err != nil {
				t.Fatalf("%s: send %d bytes: %v", addr, size, err)
			}
			n, err := c.Read(buf)
			if err != nil || !bytes.Equal(buf[:n], want) {
				t.Fatalf("%s: sent %d bytes, got %d: %v; %+v", addr, size, n, err, l.stack.Stats())
			}
			total += size
		}
		local := netip.MustParseAddrPort(c.LocalAddr().String())
		i := l.flow(t, local, netip.MustParseAddrPort(addr))
		if i.UpBytes != int64(total) || i.DownBytes != int64(total) || i.State != "open" || i.Proto != "udp" ||
			*i.Use != "direct" || i.Rule != nil || !slices.Equal(i.Path, []string{"direct"}) || i.Attachment != "home" {
			t.Errorf("%d bytes both ways: flow %+v", total, i)
		}
	}
}

// flow finds a live flow in the table.
func (l *datagramLab) flow(t testing.TB, src, dst netip.AddrPort) flow.Info {
	t.Helper()
	for _, i := range l.router.Flows() {
		if i.Src == src && i.Dst == dst {
			return i
		}
	}
	t.Fatalf("no flow from %v to %v in %+v", src, dst, l.router.Flows())
	return flow.Info{}
}

func TestOnePortForAllPeersAndFromAnyPeer(t *testing.T) {
	l := newDatagramLab(t)
	for _, hosts := range [][2]string{{"10.8.0.2", "10.8.0.3"}, {"fd08::2", "fd08::3"}} {
		one := l.server.ListenPacket("udp", net.JoinHostPort(hosts[0], "5000")).(*net.UDPConn)
		two := l.server.ListenPacket("udp", net.JoinHostPort(hosts[1], "6000")).(*net.UDPConn)
		one.SetDeadline(time.Now().Add(10 * time.Second))
		two.SetDeadline(time.Now().Add(10 * time.Second))
		network, any := "udp4", "0.0.0.0:0"
		if strings.Contains(hosts[0], ":") {
			network, any = "udp6", "[::]:0"
		}
		c := l.client.ListenPacket(network, any).(*net.UDPConn)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 2000)
		var mapped [2]netip.AddrPort
		for i, s := range []*net.UDPConn{one, two} {
			if _, err := c.WriteTo([]byte("x"), s.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			_, from, err := s.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			mapped[i] = from
		}
		if mapped[0] != mapped[1] {
			t.Errorf("two peers see %v and %v", mapped[0], mapped[1])
		}
		// A peer that was never written to answers.
		third := l.server.ListenPacket("udp", net.JoinHostPort(hosts[1], "7000")).(*net.UDPConn)
		if _, err := third.WriteToUDPAddrPort([]byte("hello"), mapped[0]); err != nil {
			t.Fatal(err)
		}
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "hello" || from != third.LocalAddr().(*net.UDPAddr).AddrPort() {
			t.Errorf("got %q from %v: %v", buf[:n], from, err)
		}
	}
}

// errorOf sends until the socket has an error to tell, or the deadline passes.
func errorOf(t *testing.T, c *net.UDPConn, wait time.Duration) error {
	t.Helper()
	if _, err := c.Write([]byte("anybody?")); err != nil {
		return err
	}
	c.SetReadDeadline(time.Now().Add(wait))
	_, err := c.Read(make([]byte, 100))
	return err
}

func TestClientHearsWhyADatagramFailed(t *testing.T) {
	l := newDatagramLab(t)
	l.gate.Run("ip", "route", "add", "unreachable", "10.99.0.0/24")
	tests := []struct {
		name, addr string
		want       error
		reason     string
	}{
		{"refused", "10.8.0.2:9", unix.ECONNREFUSED, ""},
		{"refused v6", "[fd08::2]:9", unix.ECONNREFUSED, ""},
		{"rule rejects", "10.8.0.66:9", unix.EHOSTUNREACH, "prohibited"},
		{"rule rejects v6", "[fd08::66]:9", unix.EACCES, "prohibited"},
		{"no route", "203.0.113.1:9", unix.ENETUNREACH, ""},
		{"no route v6", "[2001:db8::1]:9", unix.ENETUNREACH, ""},
		{"a route that says no", "10.99.0.1:9", unix.EHOSTUNREACH, ""},
		{"no such host", "10.8.0.77:9", unix.EHOSTUNREACH, ""},
		{"rule drops", "10.8.0.99:9", os.ErrDeadlineExceeded, "dropped"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := l.udpClient(t, tt.addr)
			wait := 10 * time.Second
			if errors.Is(tt.want, os.ErrDeadlineExceeded) {
				wait = 300 * time.Millisecond
			}
			if err := errorOf(t, c, wait); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			i := l.flow(t, netip.MustParseAddrPort(c.LocalAddr().String()), netip.MustParseAddrPort(tt.addr))
			if tt.reason == "" && i.State != "open" || tt.reason != "" && (i.Reason == nil || *i.Reason != tt.reason) {
				t.Errorf("flow is %s, want reason %q", i.State, tt.reason)
			}
		})
	}
}

// The error of one peer does not hurt the others of the same socket.
func TestRefusalOfOnePeerLeavesTheOthers(t *testing.T) {
	l := newDatagramLab(t)
	l.server.ServeUDPEcho("10.8.0.2:7")
	c := l.client.ListenPacket("udp4", "0.0.0.0:0").(*net.UDPConn)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	good, bad := netip.MustParseAddrPort("10.8.0.2:7"), netip.MustParseAddrPort("10.8.0.2:9")
	buf := make([]byte, 100)
	for i := range 200 {
		if _, err := c.WriteToUDPAddrPort([]byte("no"), bad); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprint("ping ", i)
		if _, err := c.WriteToUDPAddrPort([]byte(want), good); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Fatalf("round %d: got %q: %v", i, buf[:n], err)
		}
	}
}

func TestPathMTUReachesTheClient(t *testing.T) {
	l := newDatagramLab(t)
	l.path.Run("ip", "link", "set", l.toServer.A, "mtu", "1300")
	l.server.Run("ip", "link", "set", l.toServer.B, "mtu", "1300")
	for _, tt := range []struct {
		addr                 string
		level, option, probe int
	}{
		{"10.8.0.2:7", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO},
		{"[fd08::2]:7", unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO},
	} {
		l.server.ServeUDPEcho(tt.addr)
		c := l.udpClient(t, tt.addr)
		raw, _ := c.SyscallConn()
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), tt.level, tt.option, tt.probe) })
		labtest.Eventually(t, 10*time.Second, func() bool {
			_, err := c.Write(make([]byte, 1400))
			return errors.Is(err, unix.EMSGSIZE)
		}, tt.addr, ": 1,400 bytes are not refused by a path of 1,300")

		// One that lets the kernel cut datagrams up gets all through.
		plain := l.udpClient(t, tt.addr)
		buf := make([]byte, 70000)
		for _, size := range []int{1400, 1400, 9000, 65507} {
			labtest.Eventually(t, 10*time.Second, func() bool {
				if _, err := plain.Write(make([]byte, size)); err != nil {
					return false
				}
				plain.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				n, err := plain.Read(buf)
				return err == nil && n == size
			}, tt.addr, ": ", size, " bytes do not pass")
		}
	}
}

// Joined on the way up and cut up by the end: every datagram arrives, whole and
// in order, and so it does on the way down.
func TestJoinedDatagramsArriveOneByOne(t *testing.T) {
	l := newDatagramLab(t)
	for _, addr := range []string{"10.8.0.2:7", "[fd08::2]:7"} {
		srv := large(t, l.server.ListenPacket("udp", addr).(*net.UDPConn))
		srv.SetDeadline(time.Now().Add(20 * time.Second))
		c := large(t, l.udpClient(t, addr))
		buf := make([]byte, 70000)
		const rounds, each, size = 50, 40, 1200
		var back netip.AddrPort
		for round := range rounds {
			var data []byte
			for i := range each {
				data = append(data, bytes.Repeat([]byte{byte(round), byte(i)}, size/2)...)
			}
			data = append(data, "tail"...)
			if err := sendJoined(c, data, size, netip.AddrPort{}); err != nil {
				t.Fatal(err)
			}
			for i := range each + 1 {
				n, from, err := srv.ReadFromUDPAddrPort(buf)
				want := data[i*size : min((i+1)*size, len(data))]
				if err != nil || !bytes.Equal(buf[:n], want) {
					t.Fatalf("%s: round %d: datagram %d has %d bytes or others: %v", addr, round, i, n, err)
				}
				back = from
			}
		}
		// Down: a server that joins, one that does not.
		for round := range rounds {
			data := bytes.Repeat([]byte{byte(round), 1, 2}, 10*size/3)
			if err := sendJoined(srv, data, size, back); err != nil {
				t.Fatal(err)
			}
			for i := range 10 {
				if _, err := srv.WriteToUDPAddrPort(data[i*size:(i+1)*size], back); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 20 {
				n, err := c.Read(buf)
				at := i % 10 * size
				if err != nil || !bytes.Equal(buf[:n], data[at:at+size]) {
					t.Fatalf("%s: round %d: datagram %d down has %d bytes or others: %v", addr, round, i, n, err)
				}
			}
		}
	}
}

// sendJoined sends data as datagrams of segment bytes in one call (UDP_SEGMENT).
func sendJoined(c *net.UDPConn, data []byte, segment uint16, to netip.AddrPort) error {
	oob := make([]byte, unix.CmsgSpace(2))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	*(*uint16)(unsafe.Pointer(&oob[unix.CmsgLen(0)])) = segment
	_, _, err := c.WriteMsgUDPAddrPort(data, oob, to) // to: zero for a connected socket
	return err
}

func TestDigIsAnsweredThroughDnsmasq(t *testing.T) {
	labtest.Need(t, labtest.Tool("dig"), labtest.Tool("dnsmasq"))
	l := newDatagramLab(t)
	dir := t.TempDir()
	dns := l.server.Start("dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null",
		"--pid-file="+filepath.Join(dir, "pid"), "--user=root", "--listen-address=10.8.0.2,fd08::2", "--bind-interfaces",
		"--address=/mirror.lab/192.0.2.7", "--txt-record=long.lab,"+strings.Repeat("x", 250), "--log-facility=-")
	for _, server := range []string{"10.8.0.2", "fd08::2"} {
		var out string
		labtest.Eventually(t, 15*time.Second, func() bool {
			var err error
			out, err = l.client.Try("dig", "+short", "+tries=1", "+time=2", "@"+server, "mirror.lab")
			return err == nil && strings.TrimSpace(out) == "192.0.2.7"
		}, "dig @", server, " is not answered: ", &out, dns.Output())
	}
}

// A scan from one port to everybody and a burst from every port stay within
// their bounds, and others are served right after.
func TestFloodLeavesRoomForOthers(t *testing.T) {
	l := newDatagramLab(t)
	l.server.ServeUDPEcho("10.8.0.2:7")
	l.gate.Run("ip", "route", "add", "blackhole", "10.66.0.0/16")
	scan := large(t, l.client.ListenPacket("udp4", "0.0.0.0:0").(*net.UDPConn))
	const peers, sources = 30000, 10000
	labtest.Eventually(t, time.Minute, func() bool { // a busy machine drops most of it in front of the router
		for n := range peers {
			to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 66, byte(n >> 8), byte(n)}), 9)
			if _, err := scan.WriteToUDPAddrPort([]byte("scan"), to); err != nil && !errors.Is(err, unix.EINVAL) {
				t.Fatal(err)
			}
		}
		return l.router.Counters().PeersEvicted > 0
	}, "a scan makes no room")
	for range sources {
		err := l.client.Do(func() error {
			c, err := net.Dial("udp", "10.66.0.1:9")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("burst"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	c := l.udpClient(t, "10.8.0.2:7")
	start := time.Now()
	labtest.Eventually(t, 20*time.Second, func() bool { // one may be lost in what the flood left in the queues
		if _, err := c.Write([]byte("hello")); err != nil {
			return false
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		_, err := c.Read(make([]byte, 10))
		return err == nil
	}, "an echo after the flood")
	st, n := l.stack.Stats().UDP, l.router.Counters()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	t.Logf("echo after %v; %+v; %d flows live of %d; %d goroutines, %d MiB of heap, %d of stacks",
		time.Since(start), st, n.FlowsLive, n.FlowsTotal, runtime.NumGoroutine(), mem.HeapInuse>>20, mem.StackInuse>>20)
	if st.Sessions > 3072 || n.FlowsLive > 16384 {
		t.Errorf("%d sessions, %d flows", st.Sessions, n.FlowsLive)
	}
	if mem.HeapInuse > 256<<20 {
		t.Errorf("%d MiB of heap: idle sessions hold buffers", mem.HeapInuse>>20)
	}
	if st.Evicted == 0 {
		t.Errorf("no session made room: %+v", st)
	}
}

// iperf sends datagrams of 1,200 bytes with iperf3, and returns what it counted.
func (l *datagramLab) iperf(t testing.TB, bits string, args ...string) (packets int, lostPercent float64) {
	t.Helper()
	args = append(args, "-u", "-b", bits, "-w", "4M", "-t", "1", "-l", "1200", "--json")
	out, err := l.client.Try("iperf3", args...)
	if err != nil {
		t.Fatalf("iperf3 %v: %v\n%s", args, err, out)
	}
	var report struct {
		End struct {
			Sum struct {
				Packets     int     `json:"packets"`
				LostPercent float64 `json:"lost_percent"`
			} `json:"sum"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	return report.End.Sum.Packets, report.End.Sum.LostPercent
}

// Both ways, through iperf3's own counting.
func TestIperfOverUDP(t *testing.T) {
	labtest.Need(t, labtest.Tool("iperf3"))
	l := newDatagramLab(t)
	l.server.Start("iperf3", "-s", "--forceflush").WaitOutput("listening", 10*time.Second)
	for _, args := range [][]string{{"-c", "10.8.0.2"}, {"-c", "10.8.0.2", "-R"}, {"-c", "fd08::2"}, {"-c", "fd08::2", "-R"}} {
		packets, lost := l.iperf(t, "20M", args...)
		t.Logf("iperf3 %v: %d datagrams, %.2f %% lost", args, packets, lost)
		if packets < 500 || lost > 50 {
			t.Errorf("iperf3 %v: %d datagrams, %.2f %% lost", args, packets, lost)
		}
	}
}

// BenchmarkRate offers 120,000 datagrams of 1,200 bytes a second each way, sent
// one by one by another process, and reports how many percent are lost.
func BenchmarkRate(b *testing.B) {
	labtest.Need(b, labtest.Tool("iperf3"))
	l := newDatagramLab(b)
	l.server.Start("iperf3", "-s", "--forceflush").WaitOutput("listening", 10*time.Second)
	for name, args := range map[string][]string{"up": {"-c", "10.8.0.2"}, "down": {"-c", "10.8.0.2", "-R"}} {
		b.Run(name, func(b *testing.B) {
			total, rounds := 0.0, 0
			packets := 0
			for b.Loop() {
				n, lost := l.iperf(b, "1152M", args...)
				total, rounds, packets = total+lost, rounds+1, packets+n
			}
			b.ReportMetric(total/float64(rounds), "%lost")
			b.ReportMetric(float64(packets)/float64(rounds), "datagrams/s")
		})
	}
}
