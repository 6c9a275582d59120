package main_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

// natLab is a world with a namespace of which everything is captured:
//
//	client eth0 (10.60.0.2, fd60::2) ──── eth2 machine ──── router ──── server
//
// and two addresses of the server for each family.
type natLab struct {
	*world
	client *labtest.Host
	daemon *daemon
}

// The second addresses of the server.
const other4, other6 = "203.0.113.11", "2001:db8::11"

func newNATLab(t *testing.T) *natLab {
	w := newWorld(t, "traceroute")
	for _, h := range []*labtest.Host{w.machine, w.router, w.server} {
		h.Sysctl("net.ipv4.icmp_ratelimit", "0")
		h.Sysctl("net.ipv6.icmp.ratelimit", "0")
	}
	w.machine.Forward()
	w.server.Run("ip", "addr", "add", other4+"/32", "dev", "lo")
	w.server.Run("ip", "addr", "add", other6+"/128", "dev", "lo", "nodad")
	client := w.lab.Host("client")
	w.lab.Link(w.machine, client, "10.60.0.1/24", "10.60.0.2/24", "fd60::1/64", "fd60::2/64")
	client.Run("ip", "route", "add", "default", "via", "10.60.0.1")
	client.Run("ip", "-6", "route", "add", "default", "via", "fd60::1")
	text := fmt.Sprintf("[route]\nmark = %[1]d\ntable = %[1]d\n[select]\ncgroups = [%[2]q]\nnetns = [%[3]q]\n[control]\nsocket = %[4]q\n[log]\nlevel = \"debug\"\n",
		w.number, w.sel.Path, client.Name, w.socket)
	n := &natLab{world: w, client: client}
	n.daemon = w.start(text)
	labtest.Eventually(t, patience(), func() bool { return len(w.attachments()) == 1 && w.attachments()[0].State == "up" }, "the client is attached")
	return n
}

func TestNATBehaviour(t *testing.T) {
	t.Parallel()
	n := newNATLab(t)
	t.Run("4787 REQ-5: for want of room the longest idle mapping goes", func(t *testing.T) { natRoom(t, n) })
	for _, tt := range []struct {
		name string // RFC, requirements and what they ask
		test func(*testing.T, *natLab, string, string)
	}{
		{"4787 REQ-1 2 3 8: one address and port for all peers, which all may answer", natMapping},
		{"4787 REQ-9: hairpin", natHairpin},
		{"4787 REQ-12: ICMP ends no mapping", natMappingAfterICMP},
		{"4787 REQ-13: what is too large is told", natTooLarge},
		{"4787 REQ-14: fragments in any order", natFragments},
		{"5382 REQ-2: simultaneous open", natSimultaneousOpen},
		{"5382 REQ-10: ICMP ends no connection", natConnectionAfterICMP},
		{"5508 REQ-1: one identifier for all peers", natEcho},
		{"5508 REQ-10: traceroute", natTraceroute},
		{"RFC 1122, RFC 4443: other protocols, and errors within errors", natOtherProtocols},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.test(t, n, far4, other4)
			tt.test(t, n, far6, other6)
		})
	}
}

func deadline(t *testing.T, c interface{ SetDeadline(time.Time) error }) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
}

// natUDP opens a datagram socket of a host.
func natUDP(t *testing.T, h *labtest.Host, addr string) *net.UDPConn {
	t.Helper()
	c := h.ListenPacket("udp", addr).(*net.UDPConn)
	deadline(t, c)
	return c
}

func anyOf(addr string) string {
	if netip.MustParseAddr(addr).Is6() {
		return "[::]:0"
	}
	return "0.0.0.0:0"
}

// sends has a client socket send something to a server's, and returns from where
// the server saw it come.
func sends(t *testing.T, from, to *net.UDPConn) netip.AddrPort {
	t.Helper()
	what := fmt.Sprint("to ", to.LocalAddr(), " at ", time.Now().UnixNano())
	if _, err := from.WriteToUDPAddrPort([]byte(what), to.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2000)
	k, seen, err := to.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:k]) != what {
		t.Fatalf("server got %q: %v, want %q", buf[:k], err, what)
	}
	return netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
}

// hears has a socket get what another one sends to an address.
func hears(t *testing.T, to *net.UDPConn, at netip.AddrPort, from *net.UDPConn) netip.AddrPort {
	t.Helper()
	what := fmt.Sprint("from ", from.LocalAddr(), " at ", time.Now().UnixNano())
	if _, err := from.WriteToUDPAddrPort([]byte(what), at); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2000)
	k, seen, err := to.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:k]) != what {
		t.Fatalf("client got %q: %v, want %q", buf[:k], err, what)
	}
	return netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
}

func natMapping(t *testing.T, n *natLab, far, other string) {
	servers := []*net.UDPConn{natUDP(t, n.server, port(far, 7100)), natUDP(t, n.server, port(far, 7101)), natUDP(t, n.server, port(other, 7100))}
	stranger := natUDP(t, n.server, port(other, 7105))
	defer stranger.Close()
	var seen []netip.AddrPort
	for range 2 {
		c := natUDP(t, n.client, anyOf(far))
		defer c.Close()
		first := sends(t, c, servers[0])
		for _, s := range servers[1:] {
			if again := sends(t, c, s); again != first {
				t.Errorf("%s to one, %s to another: not endpoint-independent", first, again)
			}
		}
		if from := hears(t, c, first, stranger); from.Port() != 7105 || from.Addr().String() != other {
			t.Errorf("an answer of %s:7105 comes from %s", other, from)
		}
		seen = append(seen, first)
	}
	if seen[0].Addr() != seen[1].Addr() {
		t.Errorf("two external addresses: %v", seen)
	}
	if seen[0].Port() == seen[1].Port() {
		t.Errorf("two sockets share a port: %v", seen)
	}
	for _, s := range servers {
		s.Close()
	}
}

// More sources than one address may have: who is in use stays, who was silent for
// longest gets another port when he speaks again.
func natRoom(t *testing.T, n *natLab) {
	s := natUDP(t, n.server, port(far4, 7090))
	defer s.Close()
	dumb := natUDP(t, n.server, port(other4, 7091))
	defer dumb.Close()
	used, silent := natUDP(t, n.client, anyOf(far4)), natUDP(t, n.client, anyOf(far4))
	defer used.Close()
	defer silent.Close()
	idle, busy := sends(t, silent, s), sends(t, used, s)
	const together = 50   // more would wait for their turn, and some go before it
	for i := range 3200 { // a source has 3,072
		c := natUDP(t, n.client, port("0.0.0.0", 20000+i))
		if _, err := c.WriteToUDPAddrPort([]byte("one of many"), dumb.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if i%together == together-1 {
			deadline(t, dumb)
			for range together {
				if _, _, err := dumb.ReadFromUDPAddrPort(make([]byte, 100)); err != nil {
					t.Fatalf("after %d others: %v", i, err)
				}
			}
			deadline(t, s)
			deadline(t, used)
			if now := sends(t, used, s); now != busy {
				t.Fatalf("after %d others, mapped to %s, then to %s", i, busy, now)
			}
		}
	}
	deadline(t, silent)
	if now := sends(t, silent, s); now == idle {
		t.Error("the longest idle mapping is still there")
	}
	if n := n.status().Counters.TurnedAwayTotal["udp_sessions"]; n == 0 {
		t.Error("no mapping has made room")
	}
}

// What is sent to the external address of another client arrives. That address
// is the machine's own: such packets are bypassed, and have their own source.
func natHairpin(t *testing.T, n *natLab, far, _ string) {
	s := natUDP(t, n.server, port(far, 7110))
	defer s.Close()
	a, b := natUDP(t, n.client, anyOf(far)), natUDP(t, n.client, anyOf(far))
	defer a.Close()
	defer b.Close()
	_ = sends(t, a, s)
	hears(t, b, sends(t, b, s), a)
}

func natMappingAfterICMP(t *testing.T, n *natLab, far, other string) {
	s := natUDP(t, n.server, port(far, 7120))
	defer s.Close()
	c := natUDP(t, n.client, anyOf(far))
	defer c.Close()
	before := sends(t, c, s)
	told := errorQueue(t, c)
	if _, err := c.WriteToUDPAddrPort([]byte("nobody"), netip.MustParseAddrPort(port(other, 7121))); err != nil {
		t.Fatal(err)
	}
	if errno := told(); errno != unix.ECONNREFUSED {
		t.Errorf("a closed port is told as %v", errno)
	}
	if after := sends(t, c, s); after != before {
		t.Errorf("mapped to %s, then to %s", before, after)
	}
}

// setMTU sets what the server's link carries.
func (n *natLab) setMTU(mtu string) {
	n.router.Run("ip", "link", "set", "eth2", "mtu", mtu)
	n.server.Run("ip", "link", "set", "eth0", "mtu", mtu)
}

// A datagram of 1,472 bytes that nobody may cut up fits into a path of 1,500 and
// not into one of 1,280, which its sender is told; one that may be, arrives.
func natTooLarge(t *testing.T, n *natLab, far, _ string) {
	level, discover, mtu, do := unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU, unix.IP_PMTUDISC_DO
	whole := 1472
	if netip.MustParseAddr(far).Is6() {
		level, discover, mtu, do, whole = unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU, unix.IPV6_PMTUDISC_DO, 1452
	}
	s := natUDP(t, n.server, port(far, 7130))
	defer s.Close()
	open := func(how int) *net.UDPConn {
		t.Helper()
		c, err := n.client.Dial("udp", port(far, 7130))
		if err != nil {
			t.Fatal(err)
		}
		raw, _ := c.(*net.UDPConn).SyscallConn()
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), level, discover, how) })
		deadline(t, c)
		return c.(*net.UDPConn)
	}
	c := open(do)
	defer c.Close()
	arrives := func(c *net.UDPConn, size int) bool {
		data := bytes.Repeat([]byte{byte(size)}, size)
		if _, err := c.Write(data); err != nil { // may be that of one before
			if _, err := c.Write(data); err != nil {
				return false
			}
		}
		buf := make([]byte, 2000)
		_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
		k, _, err := s.ReadFromUDPAddrPort(buf)
		for err == nil && !bytes.Equal(buf[:k], data) {
			k, _, err = s.ReadFromUDPAddrPort(buf)
		}
		return err == nil
	}
	if !arrives(c, whole) {
		t.Errorf("%d bytes do not arrive by a path of 1,500", whole)
	}
	n.setMTU("1280")
	defer n.setMTU("1500")
	labtest.Eventually(t, 10*time.Second, func() bool {
		_, err := c.Write(make([]byte, whole))
		return errors.Is(err, unix.EMSGSIZE)
	}, "%d bytes by a path of 1,280 are refused", whole)
	told := 0
	raw, _ := c.SyscallConn()
	_ = raw.Control(func(fd uintptr) { told, _ = unix.GetsockoptInt(int(fd), level, mtu) })
	if told != 1280 {
		t.Errorf("the client is told of an MTU of %d", told)
	}
	if !arrives(c, 1200) {
		t.Error("1,200 bytes do not arrive")
	}
	// The client's kernel knows the path now: it cuts up.
	plain := open(unix.IP_PMTUDISC_WANT)
	defer plain.Close()
	if !arrives(plain, whole) {
		t.Errorf("%d bytes that may be cut up do not arrive", whole)
	}
	if netip.MustParseAddr(far).Is4() {
		// Who does not look for path MTUs sends without DF: routers cut up.
		dont := open(unix.IP_PMTUDISC_DONT)
		defer dont.Close()
		if !arrives(dont, whole) {
			t.Errorf("%d bytes without DF do not arrive", whole)
		}
	}
}

// Fragments of the client in reverse order are one datagram; so are the
// server's.
func natFragments(t *testing.T, n *natLab, far, _ string) {
	s := natUDP(t, n.server, port(far, 7140))
	defer s.Close()
	c := natUDP(t, n.client, anyOf(far))
	defer c.Close()
	src := netip.MustParseAddr("10.60.0.2")
	if netip.MustParseAddr(far).Is6() {
		src = netip.MustParseAddr("fd60::2")
	}
	at := sends(t, c, s)
	want := bytes.Repeat([]byte("fragments "), 200)
	dst := netip.MustParseAddr(far)
	for _, pkt := range fragmentsOf(src, dst, uint16(c.LocalAddr().(*net.UDPAddr).Port), 7140, want) {
		n.sendRaw(t, dst, pkt)
	}
	buf := make([]byte, 10000)
	k, seen, err := s.ReadFromUDPAddrPort(buf)
	if err != nil || !bytes.Equal(buf[:k], want) || seen.Port() != at.Port() {
		t.Errorf("%d bytes of %d from %s, before from %s: %v", k, len(want), seen, at, err)
	}
	big := bytes.Repeat([]byte("back"), 2000)
	if _, err := s.WriteToUDPAddrPort(big, at); err != nil {
		t.Fatal(err)
	}
	if k, _, err := c.ReadFromUDPAddrPort(buf); err != nil || !bytes.Equal(buf[:k], big) {
		t.Errorf("%d bytes of %d come back: %v", k, len(big), err)
	}
}

// sendRaw sends a whole packet from the client.
func (n *natLab) sendRaw(t *testing.T, dst netip.Addr, pkt []byte) {
	t.Helper()
	if err := n.client.Do(func() error { return injectRaw(pkt, dst, 1) }); err != nil {
		t.Fatal(err)
	}
}

// The server connects to the port that the client connects from, while both
// their SYNs are lost: they meet.
func natSimultaneousOpen(t *testing.T, n *natLab, far, _ string) {
	for _, s := range []string{"add table inet lose", "add chain inet lose in { type filter hook input priority 0; }", "add rule inet lose in tcp flags syn / syn,ack tcp dport 7150 drop"} {
		n.server.Run("nft", s)
	}
	defer n.server.Run("nft", "delete table inet lose")
	type result struct {
		c   net.Conn
		err error
	}
	client := make(chan result, 1)
	go func() {
		c, err := n.client.Dial("tcp", port(far, 7150))
		client <- result{c, err}
	}()
	outside := regexp.MustCompile(`SYN-SENT\s+\S+\s+\S+\s+(\S+):(\d+)\s+\S*:7150\s`)
	var at []string
	labtest.Eventually(t, 5*time.Second, func() bool {
		at = outside.FindStringSubmatch(n.machine.Run("ss", "-n", "-t", "state", "all", "dport = :7150"))
		return at != nil
	}, "cgtun connects")
	addr := regexp.MustCompile(`[\[\]]`).ReplaceAllString(at[1], "")
	d := &net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(port(far, 7150)))}
	s, err := n.server.DialWith(d, "tcp", net.JoinHostPort(addr, at[2]))
	if err != nil {
		t.Fatalf("the server's half: %v", err)
	}
	defer s.Close()
	r := <-client
	if r.err != nil {
		t.Fatalf("the client's half: %v", r.err)
	}
	defer r.c.Close()
	deadline(t, s)
	deadline(t, r.c)
	exchangeWords(t, r.c, s)
}

func exchangeWords(t *testing.T, a, b net.Conn) {
	t.Helper()
	for _, ends := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := ends[0].Write([]byte("word")); err != nil {
			t.Error(err)
		}
		buf := make([]byte, 4)
		if k, err := ends[1].Read(buf); err != nil || string(buf[:k]) != "word" {
			t.Errorf("got %q: %v", buf[:k], err)
		}
	}
}

// While a router says that there is no way, a connection stays, and goes on
// when there is; also one that was dialled as a probe.
func natConnectionAfterICMP(t *testing.T, n *natLab, far, _ string) {
	ln := n.server.Listen("tcp", port(far, 7160))
	defer ln.Close()
	for _, ttl := range []int{64, 20} {
		level, option := unix.SOL_IP, unix.IP_TTL
		if netip.MustParseAddr(far).Is6() {
			level, option = unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS
		}
		d := &net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), level, option, ttl) })
		}}
		c, err := n.client.DialWith(d, "tcp", port(far, 7160))
		if err != nil {
			t.Fatal(err)
		}
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		deadline(t, c)
		deadline(t, s)
		n.router.Run("nft", "add table inet deny; add chain inet deny through { type filter hook forward priority 0; }; "+
			"add rule inet deny through tcp dport 7160 counter reject with icmpx type host-unreachable")
		for range 3 {
			if _, err := c.Write([]byte("a")); err != nil {
				t.Errorf("TTL %d: write: %v", ttl, err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		denied := func() bool { return !strings.Contains(n.router.Run("nft", "list table inet deny"), "packets 0 ") }
		labtest.Eventually(t, 10*time.Second, denied, "one is denied")
		n.router.Run("nft", "delete table inet deny")
		if _, err := io.ReadFull(s, make([]byte, 3)); err != nil {
			t.Fatalf("TTL %d: after the errors: %v", ttl, err)
		}
		exchangeWords(t, c, s)
		c.Close()
		s.Close()
	}
}

// natICMP opens a socket for ICMP of a family.
func natICMP(t *testing.T, h *labtest.Host, far string) (c net.PacketConn) {
	t.Helper()
	network := "ip4:icmp"
	if netip.MustParseAddr(far).Is6() {
		network = "ip6:ipv6-icmp"
	}
	err := h.Do(func() (err error) {
		c, err = net.ListenPacket(network, "")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// An identifier of the client's is one outside, whoever is asked; another one of
// his is another one.
func natEcho(t *testing.T, n *natLab, far, other string) {
	request, reply := byte(8), byte(0)
	if netip.MustParseAddr(far).Is6() {
		request, reply = 128, 129
	}
	c, s := natICMP(t, n.client, far), natICMP(t, n.server, far)
	defer c.Close()
	defer s.Close()
	deadline(t, c)
	deadline(t, s)
	buf := make([]byte, 2000)
	// next waits for the message of a type that has a number.
	next := func(c net.PacketConn, kind byte, seq byte) (id uint16, from string) {
		t.Helper()
		for {
			k, addr, err := c.ReadFrom(buf)
			if err != nil {
				t.Fatal(err)
			}
			if k >= 8 && buf[0] == kind && buf[7] == seq {
				return binary.BigEndian.Uint16(buf[4:]), addr.String()
			}
		}
	}
	ask := func(id uint16, to string, seq byte) (outside uint16) {
		t.Helper()
		msg := []byte{request, 0, 0, 0, byte(id >> 8), byte(id), 0, seq}
		if request == 8 {
			binary.BigEndian.PutUint16(msg[2:], checksum(msg))
		}
		if _, err := c.WriteTo(msg, &net.IPAddr{IP: net.ParseIP(to)}); err != nil {
			t.Fatal(err)
		}
		outside, _ = next(s, request, seq)
		if back, from := next(c, reply, seq); back != id || from != to {
			t.Errorf("asked %s with %d, %s answers with %d", to, id, from, back)
		}
		return outside
	}
	one, again, two := ask(7001, far, 1), ask(7001, other, 2), ask(7002, far, 3)
	if one != again {
		t.Errorf("identifier %d to one, %d to another", one, again)
	}
	if one == two {
		t.Errorf("two identifiers have become one: %d", one)
	}
	for i := range 300 { // more than there are raw sockets
		ask(uint16(8000+i), far, byte(i))
	}
	ask(8000, other, 9)
}

// The client's own tun is a router, and the machine is none.
func natTraceroute(t *testing.T, n *natLab, far, _ string) {
	tun, router := "", near4
	v6 := netip.MustParseAddr(far).Is6()
	if v6 {
		router = near6
	}
	for _, a := range n.attachments() {
		for _, p := range a.Address {
			if addr := netip.MustParsePrefix(p).Addr(); addr.Is6() == v6 {
				tun = addr.String()
			}
		}
	}
	for _, how := range []string{"-I", "-U"} {
		labtest.Eventually(t, 20*time.Second, func() bool { // an answer has three seconds, which a busy machine may need
			out, err := n.client.Try("traceroute", "-n", "-q", "1", "-w", "3", how, far)
			return err == nil && seesHops(out, []string{tun, router, far})
		}, "traceroute "+how+" sees "+router)
	}
}

// What is no TCP, UDP or ICMP is answered with protocol unreachable; an ICMP error,
// about another one too, with silence.
func natOtherProtocols(t *testing.T, n *natLab, far, _ string) {
	kind, code := byte(3), byte(2)
	src, dst := netip.MustParseAddr("10.60.0.2"), netip.MustParseAddr(far)
	if dst.Is6() {
		kind, code = 4, 1
		src = netip.MustParseAddr("fd60::2")
	}
	c := natICMP(t, n.client, far)
	defer c.Close()
	turnedAway := n.status().Counters.TurnedAwayTotal["icmp"]
	n.sendRaw(t, dst, rawPacket(src, dst, 132, make([]byte, 12)))
	buf := make([]byte, 2000)
	heard := func(first, more time.Duration) (errs [][2]byte) {
		_ = c.SetReadDeadline(time.Now().Add(first))
		for {
			k, _, err := c.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return errs
			}
			if err != nil {
				t.Fatal(err)
			}
			if k >= 8 && (buf[0] < 8 && buf[0] > 0 || buf[0] == 11) {
				errs = append(errs, [2]byte{buf[0], buf[1]})
				_ = c.SetReadDeadline(time.Now().Add(more))
			}
		}
	}
	if got := heard(10*time.Second, 300*time.Millisecond); len(got) != 1 || got[0] != [2]byte{kind, code} {
		t.Errorf("protocol 132: heard %v, want %d/%d", got, kind, code)
	}
	inner := rawPacket(dst, src, 17, []byte{0, 7, 0, 7, 0, 8, 0, 0})
	proto, expired, unreachable := byte(1), byte(11), byte(3)
	if dst.Is6() {
		proto, expired, unreachable = 58, 3, 1
	}
	icmp := func(kind byte, quote []byte) []byte {
		msg := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, quote...)
		var pseudo []byte
		if dst.Is6() {
			pseudo = append(append(src.AsSlice(), dst.AsSlice()...), 0, 0, byte(len(msg)>>8), byte(len(msg)), 0, 0, 0, proto)
		}
		binary.BigEndian.PutUint16(msg[2:], checksum(append(pseudo, msg...)))
		return msg
	}
	first := icmp(unreachable, inner)
	n.sendRaw(t, dst, rawPacket(src, dst, proto, first))
	n.sendRaw(t, dst, rawPacket(src, dst, proto, icmp(expired, rawPacket(dst, src, proto, first))))
	if got := heard(300*time.Millisecond, 0); len(got) != 0 {
		t.Errorf("ICMP errors are answered with %v", got)
	}
	both := func() bool { return n.status().Counters.TurnedAwayTotal["icmp"] == turnedAway+2 }
	labtest.Eventually(t, 10*time.Second, both, "two ICMP errors are turned away")
}
