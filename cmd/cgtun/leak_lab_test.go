package main_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

func init() {
	probes["forge"] = forge
	probes["late"] = late
	probes["every"] = every
	probes["snap"] = snap
}

// A socket that is bound to the uplink: no packet of it comes out there, not
// even a question for a far address's neighbour. No capability is needed for
// SO_BINDTODEVICE; the guard stops it.
func TestSocketBoundToTheUplinkDoesNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	w.start(w.config(second))
	w.router.Run("nft", "add", "table", "netdev", "asks")
	w.router.Run("nft", "add", "chain", "netdev", "asks", "in", "{ type filter hook ingress device eth0 priority 0; }")
	w.router.Run("nft", "add", "rule", "netdev", "asks", "in", "arp", "daddr", "ip", "203.0.113.0/24", "counter")
	for _, far := range []string{far4, far6} {
		for _, network := range []string{"tcp", "udp"} {
			a := w.probe(inside, probe{Do: "dial", Network: network, To: port(far, 7000), Say: "x", Device: "eth0", Wait: time.Second})
			if a.Errno == "" {
				t.Errorf("%s to %s by eth0 was answered: %+v", network, far, a)
			}
			w.noLeak("bound " + network + " " + far)
		}
		w.probe(inside, probe{Do: "raw", To: far, Proto: 132, Say: "x", Device: "eth0"})
		w.noLeak("bound raw " + far)
	}
	if rules := w.router.Run("nft", "list", "table", "netdev", "asks"); !strings.Contains(rules, "packets 0 ") {
		t.Errorf("the uplink was asked for a far address:\n%s", rules)
	}
	// And who is not selected may.
	if a := w.probe(outside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x", Device: "eth0"}); a.Heard != "x" {
		t.Errorf("outside: %+v", a)
	}
}

// Servers inside of the cgroup keep answering whoever asks, near and far, by
// the way that the question came.
func TestSelectedServerIsReached(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(w.config(second))
	addrs := map[string]netip.Addr{"v4": netip.MustParseAddr("10.1.0.2"), "v6": netip.MustParseAddr("fd01::2")}
	for family, addr := range addrs {
		for _, network := range []string{"tcp", "udp"} {
			for i, listen := range []string{addr.String(), map[string]string{"v4": "0.0.0.0", "v6": "::"}[family]} {
				to := 7100 + i
				w.startProbe(inside, probe{Do: "serve", Network: network, To: port(listen, to)})
				for name, from := range map[string]*labtest.Host{"near": w.router, "far": w.server} {
					if err := askEcho(from, network, port(addr.String(), to)); err != nil {
						t.Errorf("%s server at %s, asked from %s: %v", network, port(listen, to), name, err)
					}
				}
			}
		}
	}
	if sent, _ := w.device(); sent > 8 { // router solicitations and the like, but no answers
		t.Errorf("%d packets went into tun0", sent)
	}
}

func askEcho(from *labtest.Host, network, to string) error {
	c, err := from.Dial(network, to)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	for range 3 {
		if _, err := c.Write([]byte("hello")); err != nil {
			return err
		}
		buf := make([]byte, 5)
		if _, err := c.Read(buf); err != nil {
			return err
		}
	}
	return nil
}

// An MPTCP socket is made by the kernel on the process's behalf; one that sets
// the mark itself, to nothing or to somebody's, was never exempt.
func TestOddSocketsDoNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		for name, q := range map[string]probe{
			"mptcp":   {MPTCP: true},
			"SO_MARK": {Mark: 4711},
		} {
			q.Do, q.Network, q.To, q.Say = "dial", "tcp", port(far, 7000), "hello"
			if a := w.probe(inside, q); a.Heard != "hello" {
				t.Errorf("%s to %s: %+v", name, far, a)
			}
			w.noLeak(name + " " + far)
		}
	}
}

// A client that is killed before the SYN-ACK: the answer to that has no socket
// behind it any more.
func TestKilledClientDoesNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// The server's answer is held back until the client is gone.
	w.server.Run("nft", "add", "table", "inet", "hold")
	w.server.Run("nft", "add", "chain", "inet", "hold", "in", "{ type filter hook input priority 0; }")
	w.server.Run("nft", "add", "rule", "inet", "hold", "in", "tcp dport 7000 drop")
	w.server.ServeEcho(":7000")
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		ctx, cancel := context.WithCancel(context.Background())
		p := w.lab.StartCommand(w.command(ctx, inside, "env", probeArgs(probe{Do: "dial", Network: "tcp", To: port(far, 7000), Wait: time.Minute})...))
		labtest.Eventually(t, 5*time.Second, func() bool { return w.status().Counters.FlowsLive > 0 }, "the flow is being dialled")
		cancel()
		_ = p.Wait()
		w.server.Run("nft", "flush", "table", "inet", "hold")
		labtest.Eventually(t, 20*time.Second, func() bool { return w.status().Counters.FlowsLive == 0 }, "the flow of a client that is gone ends")
		w.server.Run("nft", "add", "rule", "inet", "hold", "in", "tcp dport 7000 drop")
		w.noLeak("killed client " + far)
	}
}

// Clients that reset as soon as they are connected: what netstack still sends
// to them is answered by a kernel that knows neither socket nor connection any
// more.
func TestResetAtOnceDoesNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeExchange(":7000")
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		w.probeOutput(inside, probe{Do: "snap", Network: "tcp", To: port(far, 7000), N: 1500})
		w.noLeak("reset at once " + far)
	}
}

// snap connects N times, asks for much, and resets at different moments.
func snap(q probe) error {
	var work sync.WaitGroup
	defer work.Wait()
	slots := make(chan struct{}, 16)
	for i := range q.N {
		slots <- struct{}{}
		work.Go(func() {
			defer func() { <-slots }()
			c, err := dialTCP(q)
			if err != nil {
				return // of so many some may be refused
			}
			_ = binary.Write(c, binary.BigEndian, labtest.Transfer{Down: 1 << 20}) // of the ServeExchange
			if i%3 == 1 {
				_, _ = io.ReadFull(c, make([]byte, 1))
			}
			if i%3 == 2 {
				time.Sleep(time.Duration(i) * time.Microsecond)
			}
			_ = c.SetLinger(0)
			_ = c.Close()
		})
	}
	return nil
}

// An IPV6_FREEBIND socket forges, over lo, a connection that looks as if the
// far side had opened it; what it sends afterwards would be the "answer".
func TestForgedInboundEntryDoesNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(w.config(second))
	w.probeOutput(inside, probe{Do: "forge", N: 10})
	w.noLeak("forged")
}

// forge has a socket bound to the far side's address ask one of our own over
// lo, and answers it from there.
func forge(q probe) error {
	own := &unix.SockaddrInet6{Port: 7777, Addr: netip.MustParseAddr("fd01::2").As16()}
	far := &unix.SockaddrInet6{Port: 8888, Addr: netip.MustParseAddr(far6).As16()}
	victim, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	forger, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	for _, err := range []error{
		unix.Bind(victim, own), unix.SetsockoptInt(forger, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1),
		unix.Bind(forger, far), unix.Sendto(forger, []byte("in"), 0, own),
	} {
		if err != nil {
			return err
		}
	}
	for range q.N {
		_ = unix.Sendto(victim, []byte("an answer, it says"), 0, far) // may be refused
	}
	return nil
}

// With v6 only as a destination and no v6 way out, the client is told at once, but for an
// ICMP error that finds connect() holding its socket: that is a soft one, and that of the next
// SYN counts.
func TestNoWayOutIsUnreachableAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(w.config("\n[[outbound]]\nname = \"only4\"\ntype = \"direct\"\nsource = \"10.2.0.2\"\n\n[[rule]]\nuse = \"only4\"\n"))
	const soon = 300 * time.Millisecond
	a := w.promptly(inside, probe{Do: "dial", Network: "tcp", To: port(far6, 7000), Wait: 20 * time.Second}, soon, 5)
	if (a.Errno != "ENETUNREACH" && a.Errno != "EHOSTUNREACH") || a.Took > soon {
		t.Errorf("tcp: %+v, want unreachable within %v", a, soon)
	}
	w.noLeak("v6 without a way out")
	a = w.probe(inside, probe{Do: "dial", Network: "udp", To: port(far6, 7000), Say: "x"})
	if a.Errno == "" || a.Errno == "timeout" {
		t.Errorf("udp: %+v, want an error", a)
	}
	w.noLeak("v6 datagrams without a way out")
}

// A socket that is older than its process's move keeps its way: the kernel's
// rule, as documented. Its new connections are captured, and run moves first.
func TestOlderSocketKeepsItsWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeUDPEcho(port(far4, 7000))
	echo := w.server.ServeEcho(":7000")
	w.start(w.config(second))
	p := w.startProbe(outside, probe{Do: "late", To: port(far4, 7000)})
	if err := w.sel.Add(p.Pid); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatalf("%v: %s", err, p.Output())
	}
	seen := echo.Clients()
	if len(seen) != 2 || seen[0].Addr() != netip.MustParseAddr("10.1.0.2") || seen[1].Addr() != netip.MustParseAddr("10.2.0.2") {
		t.Errorf("the server saw %v: want the older connection from 10.1.0.2, the newer one from 10.2.0.2", seen)
	}
}

// late connects, waits until it has been moved, speaks, and connects again.
func late(q probe) error {
	q.Network, q.Say = "tcp", ""
	d := probeDialer(q)
	old, err := d.Dial("tcp", q.To)
	if err != nil {
		return err
	}
	defer old.Close()
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if now, err := os.ReadFile("/proc/self/cgroup"); err != nil || string(now) != string(before) {
			break
		}
		if time.Since(start) > 20*time.Second {
			return fmt.Errorf("was not moved")
		}
	}
	q.Say = "hello"
	if err := echoOnce(old, q.Say); err != nil {
		return fmt.Errorf("older connection: %w", err)
	}
	a, err := q.dial()
	if err == nil && a.Heard != q.Say {
		err = fmt.Errorf("newer connection heard %q", a.Heard)
	}
	return err
}

// Flushing all rules, as a firewall's restart does, opens nothing: what is
// taken away is back within a second, and nothing leaks meanwhile.
func TestFlushedRulesetLeaksNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.start(w.config(second))
	p := w.startProbe(inside, probe{Do: "every", Network: "tcp", To: port(far4, 7000)})
	table := fmt.Sprintf("cgtun_%d", w.number)
	fastest := time.Hour
	for _, break_ := range [][]string{
		{"nft", "flush", "ruleset"},
		{"nft", "delete", "table", "inet", table}, // refused while it is owned
		{"ip", "rule", "del", "priority", "10101"},
		{"ip", "-6", "rule", "del", "priority", "10101"},
		{"ip", "route", "flush", "table", fmt.Sprint(w.number)},
		{"ip", "-6", "route", "flush", "table", fmt.Sprint(w.number)},
	} {
		_, _ = w.machine.Try(break_[0], break_[1:]...)
		began := time.Now()
		labtest.Eventually(t, patience(), func() bool {
			return strings.Contains(w.machine.Run("nft", "list", "tables"), table) &&
				strings.Contains(w.machine.Run("ip", "rule"), "10101:") && strings.Contains(w.machine.Run("ip", "-6", "rule"), "10101:") &&
				strings.Contains(w.machine.Run("ip", "route", "show", "table", fmt.Sprint(w.number)), "default dev tun0") &&
				strings.Contains(w.machine.Run("ip", "-6", "route", "show", "table", fmt.Sprint(w.number)), "default dev tun0")
		}, "all is back after %v", break_)
		if break_[0] == "ip" { // the table is its owner's alone
			fastest = min(fastest, time.Since(began))
		}
		for _, far := range []string{far4, far6} {
			if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "x"}); a.Heard != "x" {
				t.Errorf("after %v: %+v", break_, a)
			}
		}
		w.noLeak(strings.Join(break_, " "))
	}
	if fastest > time.Second { // the machine may be busy
		t.Errorf("the fastest was back after %v", fastest)
	}
	p.Signal(unix.SIGTERM)
	_ = p.Wait()
	w.noLeak("connections all the time")
}

// every connects every few milliseconds until it is killed.
func every(q probe) error {
	fmt.Println("ready")
	q.Say, q.Wait = "x", 200*time.Millisecond
	for {
		_, _ = q.dial() // may fail; where it goes is what counts
		time.Sleep(3 * time.Millisecond)
	}
}

// Without a default route in main, a selected process still gets out.
func TestHostWithoutDefaultRoute(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	// cgtun's own way out is known to a policy table alone.
	for _, family := range []string{"-4", "-6"} {
		for range 2 {
			w.machine.Run("ip", family, "route", "del", "default")
		}
	}
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		for _, network := range []string{"tcp", "udp"} {
			if a := w.probe(inside, probe{Do: "dial", Network: network, To: port(far, 7000), Say: "hello"}); a.Heard != "hello" {
				t.Errorf("%s to %s: %+v", network, far, a)
			}
		}
	}
	w.noLeak("without a default route")
	if a := w.probe(outside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000)}); a.Errno != "ENETUNREACH" {
		t.Errorf("outside: %+v, want ENETUNREACH", a)
	}
}

// The default route moves to another uplink while connections are made: own
// sockets follow it, and none comes back through the tun.
func TestDefaultRouteMoves(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	echo := w.server.ServeEcho(":7000")
	w.start(w.config(""))
	for i := range 24 {
		switch i % 8 {
		case 4:
			w.machine.Run("ip", "route", "del", "default", "via", "10.1.0.1")
		case 0:
			w.machine.Run("ip", "route", "replace", "default", "via", "10.1.0.1")
		}
		if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "hello"}); a.Heard != "hello" {
			t.Errorf("connection %d: %+v", i, a)
		}
	}
	count := map[string]int{}
	for _, c := range echo.Clients() {
		count[c.Addr().String()]++
	}
	if count["10.1.0.2"] != 12 || count["10.2.0.2"] != 12 {
		t.Errorf("the server saw %v, want 12 from each uplink", count)
	}
	if n := w.status().Counters.FlowsTotal; n != 24 {
		t.Errorf("%d flows for 24 connections: own sockets came back", n)
	}
}
