package main_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

func init() {
	probes["mutter"] = mutter
	probes["sizes"] = sizes
	probes["again"] = again
	probes["inject"] = inject
	probes["fling"] = fling
}

// Datagrams of every size, the empty one too, come back as they were sent.
func TestDatagramsOfEverySize(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		w.probeOutput(inside, probe{Do: "sizes", To: port(far, 7000)})
	}
	w.noLeak("datagrams")
}

// Whose a datagram is nobody can tell when its socket is closed before it comes here:
// to close it at once is no way around a rule that rejects its cgroup.
func TestDatagramsOfClosedSocketsAreRejected(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(w.config(fmt.Sprintf("[[rule]]\ncgroup = [%q]\nport = 7000\nuse = \"reject\"\n%s", w.sel.Path, second)))
	const n = 50
	reached := w.router.MeterMatch(`ip daddr `+far4+` udp dport 7000`, `ip6 daddr `+far6+` udp dport 7000`)
	others := w.router.MeterMatch(`ip daddr `+far4+` udp dport 7001`, `ip6 daddr `+far6+` udp dport 7001`)
	for _, far := range []string{far4, far6} { // what is to be there comes last
		w.probeOutput(inside, probe{Do: "fling", To: port(far, 7000), N: n})
		w.probeOutput(inside, probe{Do: "fling", To: port(far, 7001), N: n})
	}
	// Some of the sockets can have the same port.
	labtest.Eventually(t, 10*time.Second, func() bool { return w.status().Counters.DeniedTotal > n && others.Packets() > n },
		"they are decided about, from the first to the last")
	if got := reached.Packets(); got != 0 {
		t.Errorf("%d of %d datagrams left", got, 2*n)
	}
}

// fling sends each of N datagrams from a socket of its own, which it closes at once.
func fling(q probe) error {
	for range q.N {
		c, err := net.Dial("udp", q.To)
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("x"))
		if err = errors.Join(err, c.Close()); err != nil {
			return err
		}
	}
	return nil
}

// sizes sends datagrams to an echo, of N bytes at most where that is not 0.
func sizes(q probe) error {
	c, err := probeDialer(q).Dial("udp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, 1<<16)
	last := 0
	for _, size := range []int{0, 1, 512, 1232, 1452, 1472, 1473, 4000, 9000, 30000, 65487, 65507} {
		if size == 65507 && c.RemoteAddr().(*net.UDPAddr).IP.To4() == nil {
			continue // the same in sum: a header is longer
		}
		if q.N > 0 && size > q.N {
			break
		}
		out := make([]byte, size)
		for i := range out {
			out[i] = byte(i * size)
		}
		ok := false
		for try := 0; try < 5 && !ok; try++ { // a fragment may be lost
			if _, err := c.Write(out); err != nil {
				return fmt.Errorf("send %d bytes: %w", size, err)
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			for {
				n, err := c.Read(buf)
				if err == nil && n == last && size != last {
					continue // the one before was late, and was sent again
				}
				if ok = err == nil && string(buf[:n]) == string(out); !ok && err == nil {
					return fmt.Errorf("%d bytes came back as %d, or others", size, n)
				}
				break
			}
		}
		last = size
		if !ok {
			return fmt.Errorf("%d bytes did not come back", size)
		}
	}
	return nil
}

// One source port, used again for the same server at once, a hundred times,
// whoever closes first.
func TestSamePortAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.Serve(":7000", func(c *net.TCPConn) error { _, err := c.Write([]byte("bye")); return err })
	w.server.ServeEcho(":7001")
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		for _, to := range []int{7000, 7001} {
			if out, err := w.try(inside, "env", probeArgs(probe{Do: "again", To: port(far, to), N: 100})...); err != nil {
				t.Errorf("%s: %v %s", port(far, to), err, out)
			}
		}
	}
}

func again(q probe) error {
	to, err := netip.ParseAddrPort(q.To)
	if err != nil {
		return err
	}
	d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{Port: 40001}, Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), err)
	}}
	for i := range q.N {
		began := time.Now()
		c, err := d.Dial("tcp", q.To)
		if errors.Is(err, unix.EADDRNOTAVAIL) { // the kernel's own TIME_WAIT: the client closed first
			return nil
		}
		if err != nil {
			return fmt.Errorf("connection %d after %v: %w", i, time.Since(began), err)
		}
		_ = c.SetDeadline(time.Now().Add(3 * time.Second))
		buf := make([]byte, 3)
		if to.Port() == 7001 {
			if _, err := c.Write([]byte("bye")); err != nil {
				return err
			}
		}
		for n := 0; n < 3; {
			m, err := c.Read(buf[n:])
			if err != nil {
				return fmt.Errorf("connection %d: read: %w", i, err)
			}
			n += m
		}
		if to.Port() == 7000 { // the server closes first
			if _, err := c.Read(buf); err == nil {
				return fmt.Errorf("connection %d: more than was sent", i)
			}
		}
		c.Close()
	}
	return nil
}

// Packets made by hand: into lo, as if the far side had asked; with a source
// that is not of this host. What answers, or is sent so, leaves by no uplink.
func TestPacketsMadeByHandDoNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		w.startProbe(inside, probe{Do: "serve", Network: "udp", To: port(map[string]string{far4: "10.1.0.2", far6: "fd01::2"}[far], 7777)})
		before, _ := w.device()
		w.probeOutput(inside, probe{Do: "inject", Network: "lo", To: far, N: 5})
		labtest.Eventually(t, 5*time.Second, func() bool { sent, _ := w.device(); return sent >= before+5 }, "the answers to %s are captured", far)
		w.noLeak("answers to what was forged on lo, " + far)
		w.probeOutput(inside, probe{Do: "inject", Network: "raw", To: far, N: 5})
		w.noLeak("sources of others, " + far)
	}
	spoofed := w.machine.Run("nft", "list", "counter", "inet", fmt.Sprintf("cgtun_%d", w.number), "spoof")
	if !strings.Contains(spoofed, "packets 10 ") {
		t.Errorf("10 packets had a source of others: %s", spoofed)
	}
}

// inject sends N hand-made datagrams: into lo by AF_PACKET, from the far side to
// port 7777 of here; or to the far side, by a raw socket, from somebody else.
func inject(q probe) error {
	far := netip.MustParseAddr(q.To)
	own, other := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.66.0.1")
	if far.Is6() {
		own, other = netip.MustParseAddr("fd01::2"), netip.MustParseAddr("fd66::1")
	}
	if q.Network == "raw" {
		return injectRaw(datagram(other, far, 8888, 7777), far, q.N)
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	proto := uint16(unix.ETH_P_IP)
	if far.Is6() {
		proto = unix.ETH_P_IPV6
	}
	proto = proto<<8 | proto>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(proto))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range q.N {
		err := unix.Sendto(fd, datagram(far, own, 8888, 7777), 0, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: lo.Index, Halen: 6})
		if err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond) // the answer of a server beside
	}
	return nil
}

func injectRaw(packet []byte, far netip.Addr, n int) error {
	family, level, opt, to := unix.AF_INET, unix.IPPROTO_IP, unix.IP_HDRINCL, unix.Sockaddr(nil)
	if far.Is6() {
		family, level, opt, to = unix.AF_INET6, unix.IPPROTO_IPV6, 36, &unix.SockaddrInet6{Addr: far.As16()} // IPV6_HDRINCL
	} else {
		to = &unix.SockaddrInet4{Addr: far.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, level, opt, 1); err != nil {
		return err
	}
	for range n {
		if err := unix.Sendto(fd, packet, 0, to); err != nil && !errors.Is(err, unix.EPERM) {
			return err
		}
	}
	return nil
}

// datagram builds an IP packet with a UDP datagram that says "forged".
func datagram(from, to netip.Addr, fromPort, toPort uint16) []byte {
	data := []byte("forged")
	udp := binary.BigEndian.AppendUint16(nil, fromPort)
	udp = binary.BigEndian.AppendUint16(udp, toPort)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(data)))
	udp = append(append(udp, 0, 0), data...)
	pseudo := append(append(from.AsSlice(), to.AsSlice()...), 0, unix.IPPROTO_UDP, 0, byte(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	if from.Is6() {
		ip := []byte{0x60, 0, 0, 0, 0, byte(len(udp)), unix.IPPROTO_UDP, 64}
		return append(append(append(ip, from.AsSlice()...), to.AsSlice()...), udp...)
	}
	ip := []byte{0x45, 0, 0, byte(20 + len(udp)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, udp...)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// mutter sends a datagram every now and then from one socket, until it is ended.
func mutter(q probe) error {
	c, err := net.Dial("udp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("ready")
	for {
		_, _ = c.Write([]byte("x")) // an error is of one before
		time.Sleep(20 * time.Millisecond)
	}
}

// The machine loses the address that an outbound's datagrams leave from: the same
// client's next ones leave from another.
func TestDatagramsOutliveAnAddress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, s := range []string{
		// The way is known by the source address alone.
		"route del default via 10.2.0.1 metric 2000", "-6 route del default via fd02::1 metric 2000",
		"addr add 10.2.0.3/32 dev eth1", "rule add from 10.2.0.3 lookup 102 priority 20000",
		"addr add fd02::3/128 dev eth1 nodad", "-6 rule add from fd02::3 lookup 102 priority 20000",
	} {
		w.machine.Run("ip", strings.Fields(s)...)
	}
	w.start(w.config(second))
	for _, tt := range []struct{ far, was, is string }{{far4, "10.2.0.2", "10.2.0.3"}, {far6, "fd02::2", "fd02::3"}} {
		echo := w.server.ServeUDPEcho(port(tt.far, 7000))
		from := func(want string) func() bool {
			return func() bool {
				seen := echo.Clients()
				return len(seen) > 0 && seen[len(seen)-1].Addr() == netip.MustParseAddr(want)
			}
		}
		w.startProbe(inside, probe{Do: "mutter", To: port(tt.far, 7000)})
		first := tt.was
		labtest.Eventually(t, 5*time.Second, func() bool {
			if from(tt.is)() { // the kernel lists addresses in an order of its own
				first, tt.is = tt.is, tt.was
			}
			return from(first)()
		}, "datagrams from %s", first)
		bits := map[string]string{"10.2.0.2": "/24", "fd02::2": "/64", "10.2.0.3": "/32", "fd02::3": "/128"}
		w.machine.Run("ip", "addr", "del", first+bits[first], "dev", "eth1")
		labtest.Eventually(t, 5*time.Second, from(tt.is), "datagrams from %s", tt.is)
	}
}
