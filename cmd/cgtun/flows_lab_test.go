package main_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

func init() {
	probes["exchange"] = exchange
	probes["delayed"] = delayed
	probes["slow"] = slowReader
	probes["mix"] = mix
	probes["open"] = openSYN
	probes["urgent"] = urgent
	probes["options"] = ipOptions
}

// answerAfterEnd reads to the end and only then answers.
func answerAfterEnd(c *net.TCPConn) error {
	n, err := io.Copy(io.Discard, c)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c, "got %d bytes and the end", n)
	return err
}

func dialTCP(q probe) (*net.TCPConn, error) {
	c, err := probeDialer(q).Dial("tcp", q.To)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// exchange moves N bytes each way at once and checks them. If Late is not 0, one
// side ends that much after the other: the server, or the client if it is negative.
func exchange(q probe) error {
	c, err := dialTCP(q)
	if err != nil {
		return err
	}
	defer c.Close()
	return labtest.Exchange(c, labtest.Transfer{Up: int64(q.N), Down: int64(q.N), Late: q.Late.Abs(), Client: q.Late < 0})
}

// 64 MiB each way at once: every byte, in order, and both ends; also where the
// client, or the server, ends long before the other.
func TestBulkBothWays(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	server := w.server.ServeExchange(":7000")
	w.start(w.config(second))
	size, late := 64<<20, time.Second
	switch {
	case labtest.Soak():
		size, late = 1<<30, 10*time.Second
	case raceEnabled:
		size = 4 << 20
	}
	for _, far := range []string{far4, far6} {
		for _, late := range []time.Duration{late, -late} {
			w.probeOutput(inside, probe{Do: "exchange", To: port(far, 7000), N: size, Late: late})
		}
	}
	if err := server.Err(); err != nil {
		t.Error(err)
	}
	w.noLeak("bulk")
}

// The end of one side comes long before that of the other, and what is said
// after it is delivered.
func TestLateAnswerAfterTheEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	wait := 4 * time.Second
	if labtest.Soak() {
		wait = time.Minute
	}
	w.server.Serve(":7000", func(c *net.TCPConn) error {
		n, err := io.Copy(io.Discard, c)
		if err != nil || n != 100_000 {
			return fmt.Errorf("%d bytes, then %w", n, err)
		}
		time.Sleep(wait) // what is tested is time itself
		_, err = io.Copy(c, labtest.Pattern(1<<20))
		return err
	})
	w.start(w.config(second))
	for _, far := range []string{far4, far6} {
		w.probeOutput(inside, probe{Do: "delayed", To: port(far, 7000), N: 1 << 20})
	}
}

func delayed(q probe) error {
	c, err := dialTCP(q)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, 100_000)); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	return labtest.CheckPattern(c, int64(q.N))
}

// A reader that stops is waited for: the sender is held back, cgtun's memory
// stays, and all arrives.
func TestSlowReaderHoldsTheSenderBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	size, pause := 256<<20, 4*time.Second
	if labtest.Soak() {
		size, pause = 1<<30, 20*time.Second
	}
	w.server.Serve(":7000", func(c *net.TCPConn) error {
		_, err := io.Copy(c, labtest.Pattern(int64(size)))
		return err
	})
	d := w.start(w.config(second))
	before := resident(t, d.Pid)
	p := w.startProbe(inside, probe{Do: "slow", To: port(far4, 7000), N: size, Wait: pause})
	peak := before
	for !p.Exited() {
		peak = max(peak, resident(t, d.Pid))
		time.Sleep(50 * time.Millisecond) // a sample
	}
	if err := p.Wait(); err != nil {
		t.Errorf("%v: %s", err, p.Output())
	}
	t.Logf("cgtun grew by %d MiB", (peak-before)>>20)
	if grown := peak - before; grown > 64<<20 && !raceEnabled {
		t.Errorf("cgtun grew by %d MiB", grown>>20)
	}
}

// slowReader reads a little, nothing for a while, and then the rest.
func slowReader(q probe) error {
	c, err := dialTCP(q)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("ready")
	return labtest.CheckPattern(&pausing{r: c, after: 1 << 20, pause: q.Wait}, int64(q.N))
}

type pausing struct {
	r     io.Reader
	after int
	pause time.Duration
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.after <= 0 && p.pause > 0 {
		time.Sleep(p.pause)
		p.pause = 0
	}
	n, err := p.r.Read(b)
	p.after -= n
	return n, err
}

// The ways that a connection of the mix ends.
const (
	clientFirst = iota // half-closes at its end, the server later
	serverFirst
	clientResets // after its bytes have been acknowledged
	serverResets
	clientBreaks // as clientResets, while the server sends on and on
	serverBreaks
	endings
)

// order is what the client asks of the server.
type order struct {
	Ending, Up, Down uint32
}

// Hundreds of connections at once, of random sizes, that end in each way: all
// bytes sent before an end or a reset are delivered, and ends stay ends, resets
// stay resets.
func TestRandomEndings(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	server := w.serveOrders(":7000")
	d := w.start(w.config(second))
	n, seed := 300, rand.Int64()
	switch {
	case labtest.Soak():
		n = 5000
	case raceEnabled:
		n = 60
	}
	for _, far := range []string{far4, far6} {
		if out, err := w.try(inside, "env", probeArgs(probe{Do: "mix", To: port(far, 7000), N: n, Seed: seed})...); err != nil {
			t.Errorf("seed %d: %v %s", seed, err, out)
		}
	}
	if err := server.Err(); err != nil {
		t.Errorf("seed %d: server: %v", seed, err)
	}
	w.noLeak("random endings")
	labtest.Eventually(t, 10*time.Second, func() bool { return w.status().Counters.FlowsLive == 0 }, "all flows have ended")
	sockets := func() int { return openSockets(t, d.Pid) }
	labtest.Eventually(t, 10*time.Second, func() bool { return sockets() < 20 }, "cgtun's sockets are closed")
}

// serveOrders is the far end of mix.
func (w *world) serveOrders(addr string) *labtest.Server {
	w.t.Helper()
	return w.server.Serve(addr, func(c *net.TCPConn) error {
		var o order
		if err := binary.Read(c, binary.BigEndian, &o); err != nil {
			return fmt.Errorf("read order: %w", err)
		}
		// Until the client has this it does not reset: a reset that overtakes
		// the end of the handshake takes what was sent with it.
		if _, err := c.Write([]byte(".")); err != nil {
			return fmt.Errorf("answer order: %w", err)
		}
		if err := o.play(c, false); err != nil {
			return fmt.Errorf("%+v: %w", o, err)
		}
		return nil
	})
}

func mix(q probe) error {
	q.Wait = 20 * time.Second // as long as play: it is not about time
	r := rand.New(rand.NewPCG(uint64(q.Seed), 0))
	var work sync.WaitGroup
	errs := make(chan error, q.N)
	slots := make(chan struct{}, 50)
	for i := range q.N {
		o := order{Ending: uint32(r.IntN(endings)), Up: uint32(1 << r.IntN(20)), Down: uint32(1 << r.IntN(20))}
		o.Up, o.Down = o.Up+r.Uint32N(1000), o.Down+r.Uint32N(1000)
		slots <- struct{}{}
		work.Go(func() {
			defer func() { <-slots }()
			c, err := dialTCP(q)
			if err == nil {
				err = binary.Write(c, binary.BigEndian, o)
				if _, e := io.ReadFull(c, make([]byte, 1)); err == nil {
					err = e
				}
				err = errors.Join(err, o.play(c, true))
				c.Close()
			}
			if err != nil {
				errs <- fmt.Errorf("connection %d %+v: %w", i, o, err)
			}
		})
	}
	work.Wait()
	close(errs)
	var all error
	for err := range errs {
		all = errors.Join(all, err)
	}
	return all
}

// play plays one side of an order.
func (o order) play(c *net.TCPConn, client bool) error {
	_ = c.SetDeadline(time.Now().Add(25 * time.Second))
	send, receive, first, resets, breaks := int64(o.Up), int64(o.Down), clientFirst, clientResets, clientBreaks
	if !client {
		send, receive, first, resets, breaks = receive, send, serverFirst, serverResets, serverBreaks
	}
	switch ending := int(o.Ending); ending {
	case clientFirst, serverFirst:
		if ending == first {
			if _, err := io.Copy(c, labtest.Pattern(send)); err != nil {
				return fmt.Errorf("send: %w", err)
			}
			if err := c.CloseWrite(); err != nil {
				return fmt.Errorf("end: %w", err)
			}
			return labtest.CheckPattern(c, receive)
		}
		if err := labtest.CheckPattern(c, receive); err != nil {
			return err
		}
		_, err := io.Copy(c, labtest.Pattern(send))
		return errors.Join(err, c.CloseWrite())
	case resets, breaks:
		if ending == breaks {
			go func() { _, _ = io.Copy(io.Discard, c) }() // until it is closed
		}
		if _, err := io.Copy(c, labtest.Pattern(send)); err != nil {
			return fmt.Errorf("send before reset: %w", err)
		}
		return reset(c)
	case clientBreaks, serverBreaks:
		over := make(chan struct{})
		defer func() { <-over }()
		go func() {
			defer close(over)
			_, _ = io.Copy(c, labtest.Pattern(1<<62))
		}()
	}
	return untilReset(c, receive)
}

// untilReset reads what the other side sends before it resets.
func untilReset(c *net.TCPConn, want int64) error {
	buf := make([]byte, 32<<10)
	var got int64
	for {
		n, err := c.Read(buf)
		got += int64(n)
		switch {
		case err == nil:
		case got == want && (errors.Is(err, unix.ECONNRESET) || err == io.EOF && isReset(c)):
			return nil
		default:
			return fmt.Errorf("reset expected after %d bytes: %d and %w", want, got, err)
		}
	}
}

// isReset says whether a connection was reset: the write that hears of it takes
// the error with it, and reads say that it has ended.
func isReset(c *net.TCPConn) (is bool) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		is = err == nil && info.State == unix.BPF_TCP_CLOSE
	})
	return is
}

// reset sends a RST once everything has been acknowledged.
func reset(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	for left := 1; left > 0; time.Sleep(time.Millisecond) {
		errControl := raw.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if err := errors.Join(err, errControl); err != nil {
			return err
		}
	}
	if err := c.SetLinger(0); err != nil {
		return err
	}
	return c.Close()
}

// Refused is refused and unreachable is unreachable, at once, as without cgtun.
func TestTruthOfErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.router.Sysctl("net.ipv4.icmp_ratelimit", "0")
	w.router.Sysctl("net.ipv6.icmp.ratelimit", "0")
	w.router.Run("ip", "route", "add", "unreachable", "203.0.113.66")
	w.router.Run("ip", "-6", "route", "add", "unreachable", "2001:db8::66")
	w.router.Run("ip", "route", "add", "prohibit", "203.0.113.67")
	w.start(w.config(second))
	for _, q := range []probe{
		{Network: "tcp", To: port(far4, 9)}, {Network: "tcp", To: port(far6, 9)},
		{Network: "udp", To: port(far4, 9), Say: "x"}, {Network: "udp", To: port(far6, 9), Say: "x"},
		{Network: "tcp", To: "203.0.113.66:80"}, {Network: "tcp", To: "[2001:db8::66]:80"}, {Network: "tcp", To: "203.0.113.67:80"},
	} {
		q.Do = "dial"
		want := w.probe(outside, q)
		within := want.Took + 200*time.Millisecond
		got := w.promptly(inside, q, within, 5)
		if got.Errno != want.Errno || got.Errno == "" {
			t.Errorf("%s to %s: %s, without cgtun %s", q.Network, q.To, got.Errno, want.Errno)
		}
		if got.Took > within && !raceEnabled {
			t.Errorf("%s to %s took %v, without cgtun %v", q.Network, q.To, got.Took, want.Took)
		}
	}
}

// SYNs with everything that a client may put into one: it connects as plain TCP.
func TestUnusualOpenings(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	w.start(w.config(second))
	w.machine.Sysctl("net.ipv4.tcp_ecn", "1")
	w.machine.Sysctl("net.ipv4.tcp_fastopen", "5") // data without a cookie
	for _, far := range []string{far4, far6} {
		for _, q := range []probe{{Do: "dial", Network: "tcp", Say: "plain with ECN"}, {Do: "dial", Network: "tcp", MPTCP: true, Say: "MPTCP"}} {
			q.To = port(far, 7000)
			if a := w.probe(inside, q); a.Heard != q.Say {
				t.Errorf("%q to %s: %+v", q.Say, far, a)
			}
		}
		for _, do := range []string{"open", "urgent", "options"} {
			if out, err := w.try(inside, "env", probeArgs(probe{Do: do, To: port(far, 7000)})...); err != nil {
				t.Errorf("%s to %s: %v %s", do, far, err, out)
			}
		}
	}
	w.noLeak("unusual openings")
}

// openSYN sends data with the SYN (TCP Fast Open).
func openSYN(q probe) error {
	d := net.Dialer{Timeout: 3 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
		}), err)
	}}
	for range 2 {
		c, err := d.Dial("tcp", q.To)
		if err != nil {
			return err
		}
		if err := echoOnce(c, "early"); err != nil {
			return err
		}
		c.Close()
	}
	return nil
}

// ipOptions asks by TCP and UDP with each kind of IP options and extension
// headers that a socket can have.
func ipOptions(q probe) error {
	v6 := netip.MustParseAddrPort(q.To).Addr().Is6()
	for name, o := range map[string]struct {
		v6     bool
		option int
		value  []byte
	}{
		"record route":        {false, unix.IP_OPTIONS, []byte{7, 7, 4, 0, 0, 0, 0, 1}},
		"router alert":        {false, unix.IP_OPTIONS, []byte{148, 4, 0, 0}},
		"timestamp":           {false, unix.IP_OPTIONS, []byte{68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
		"hop-by-hop":          {true, unix.IPV6_HOPOPTS, []byte{0, 0, 5, 2, 0, 0, 1, 0}},
		"destination options": {true, unix.IPV6_DSTOPTS, []byte{0, 0, 1, 4, 0, 0, 0, 0}},
	} {
		if o.v6 != v6 {
			continue
		}
		for _, network := range []string{"tcp", "udp"} {
			level := unix.SOL_IP
			if v6 {
				level = unix.SOL_IPV6
			}
			d := net.Dialer{Timeout: 3 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
				var err error
				return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), level, o.option, string(o.value)) }), err)
			}}
			c, err := d.Dial(network, q.To)
			if err == nil {
				err = errors.Join(echoOnce(c, name), c.Close())
			}
			if err != nil {
				return fmt.Errorf("%s with %s: %w", network, name, err)
			}
		}
	}
	return nil
}

// urgent sends a byte out of band: it may come in line, but nothing is lost.
func urgent(q probe) error {
	c, err := dialTCP(q)
	if err != nil {
		return err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if _, err := io.WriteString(c, "abc"); err != nil {
		return err
	}
	errControl := raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
	if err := errors.Join(err, errControl); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "def"); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	all, err := io.ReadAll(c)
	if got := strings.Replace(string(all), "!", "", 1); err != nil || got != "abcdef" {
		return fmt.Errorf("echo %q: %v", all, err)
	}
	return nil
}

// A path of MTU 1280, of which nobody tells: streams flow.
func TestSmallPathMTU(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	server := w.server.ServeExchange(":7000")
	w.router.Run("ip", "link", "set", "eth2", "mtu", "1280")
	w.server.Run("ip", "link", "set", "eth0", "mtu", "1280")
	w.start(w.config(second))
	for _, told := range []bool{true, false} {
		if !told {
			w.router.Run("nft", "add", "table", "inet", "silent")
			w.router.Run("nft", "add", "chain", "inet", "silent", "out", "{ type filter hook output priority 0; }")
			w.router.Run("nft", "add", "rule", "inet", "silent", "out", "icmp", "type", "destination-unreachable", "drop")
			w.router.Run("nft", "add", "rule", "inet", "silent", "out", "icmpv6", "type", "packet-too-big", "drop")
			for _, family := range []string{"-4", "-6"} {
				w.machine.Run("ip", family, "route", "flush", "cache")
			}
		}
		for _, far := range []string{far4, far6} {
			if out, err := w.try(inside, "env", probeArgs(probe{Do: "exchange", To: port(far, 7000), N: 2 << 20})...); err != nil {
				t.Errorf("ICMP %v, to %s: %v %s", told, far, err, out)
			}
		}
	}
	if err := server.Err(); err != nil {
		t.Error(err)
	}
	w.noLeak("small path MTU")
}
