package steer_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
	"cgtun/steer"
)

// helper is what the test binary does inside of a lab's namespace. Its
// arguments are a verb, a network, an address, and options KEY=VALUE that are
// set on the socket before it is used.
func helper(args []string) int {
	var err error
	switch verb := args[0]; verb {
	case "ask":
		err = ask(args[1], args[2], args[3:])
	case "insist":
		for {
			// Where it is not let, it tries again.
			_ = send(args[1], args[2], args[3:])
			time.Sleep(time.Millisecond)
		}
	case "send":
		err = send(args[1], args[2], args[3:])
	case "forge":
		err = forge(args[1], args[2])
	case "spoof":
		err = raw(args[1], args[2], unix.IPPROTO_UDP)
	case "broken":
		err = raw(args[1], args[2], unix.IPPROTO_TCP)
	case "serve":
		err = serve(args[1], args[2:])
	case "connect":
		err = connectOnly(args[1], args[2:])
	case "steer":
		err = steerForever(args[1:])
	default:
		err = fmt.Errorf("no verb %q", verb)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func options(args []string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		ctlErr := c.Control(func(fd uintptr) {
			for _, a := range args {
				var n int
				key, value, _ := strings.Cut(a, "=")
				if key == "src" {
					err = errors.Join(err, bindTo(int(fd), netip.MustParseAddr(value)))
					continue
				}
				fmt.Sscan(value, &n)
				switch key {
				case "mark":
					err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, n))
				case "port":
					err = errors.Join(err,
						unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
						unix.Bind(int(fd), &unix.SockaddrInet4{Port: n}))
				case "dev":
					err = errors.Join(err, unix.BindToDevice(int(fd), value))
				}
			}
		})
		return errors.Join(ctlErr, err)
	}
}

func bindTo(fd int, src netip.Addr) error {
	if src.Is6() {
		return unix.Bind(fd, &unix.SockaddrInet6{Addr: src.As16()})
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: src.As4()})
}

// ask sends a line and prints the answer: the name of the server. It waits as many
// milliseconds for it as the option "wait" says.
func ask(network, addr string, opts []string) error {
	wait := 5 * time.Second
	for _, o := range opts {
		if ms, ok := strings.CutPrefix(o, "wait="); ok {
			n, _ := strconv.Atoi(ms)
			wait = time.Duration(n) * time.Millisecond
		}
	}
	c, err := (&net.Dialer{Timeout: wait, Control: options(opts)}).Dial(network, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte("who\n")); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	return err
}

// send sends datagrams as fast as it can until it is killed, each from a
// socket of its own every now and then.
func send(network, addr string, opts []string) error {
	for {
		c, err := (&net.Dialer{Control: options(opts)}).Dial(network, addr)
		if err != nil {
			return err
		}
		for range 50 {
			c.Write([]byte("x\n"))
			time.Sleep(50 * time.Microsecond)
		}
		c.Close()
	}
}

// forge sends a datagram to its own address own from the foreign one of far,
// which needs no capability, and then answers it: tens of times, for a hole
// needs be found only once.
func forge(own, far string) error {
	freebind := func(_, _ string, c syscall.RawConn) (err error) {
		ctlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
		})
		return errors.Join(ctlErr, err)
	}
	lc := net.ListenConfig{Control: freebind}
	server, err := lc.ListenPacket(context.Background(), "udp6", own)
	if err != nil {
		return err
	}
	defer server.Close()
	forged, err := lc.ListenPacket(context.Background(), "udp6", far)
	if err != nil {
		return err
	}
	to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(own))
	if _, err := forged.WriteTo([]byte("x\n"), to); err != nil {
		return err
	}
	server.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, _, err := server.ReadFrom(make([]byte, 10)); err != nil {
		return fmt.Errorf("forged packet did not arrive: %w", err)
	}
	forged.Close()
	for range 20 {
		if _, err := server.WriteTo([]byte("x\n"), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(far))); err != nil {
			return err
		}
	}
	fmt.Println("sent")
	return nil
}

// raw sends one v4 packet: a datagram, perhaps with a source that is not ours,
// or TCP that is no segment of anything.
func raw(src, dst string, proto byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	s, d := netip.MustParseAddr(src).As4(), netip.MustParseAddr(dst).As4()
	p := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, proto, 0, 0}
	p = append(append(p, s[:]...), d[:]...)
	p = append(p, 0x10, 0, 0x1b, 0x58, 0, 8, 0, 0)
	return unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: d})
}

// serve answers TCP and UDP on a port with the line "selected", for ever.
func serve(addr string, opts []string) error {
	lc := net.ListenConfig{Control: options(opts)}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return err
	}
	pc, err := lc.ListenPacket(context.Background(), "udp", addr)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	go func() {
		buf := make([]byte, 100)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo([]byte("selected\n"), from)
		}
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		c.Write([]byte("selected\n"))
		bufio.NewReader(c).ReadString('\n')
		c.Close()
	}
}

// connectOnly begins a TCP connection and waits to be killed.
func connectOnly(addr string, opts []string) error {
	fmt.Println("ready")
	_, err := (&net.Dialer{Control: options(opts)}).Dial("tcp4", addr)
	return err
}

// steerForever is a cgtun that does nothing but steer, in its home, until it
// is told to end. With the id and the level of a cgroup it steers that, and
// closed, by a device of its own.
func steerForever(closed []string) error {
	home, err := netns.Home()
	if err != nil {
		return err
	}
	p := plan()
	if len(closed) == 2 {
		p.Closed, p.Device = true, "tun1"
		c := steer.Cgroup{Path: "selected"}
		fmt.Sscan(closed[0], &c.ID)
		fmt.Sscan(closed[1], &c.Level)
		p.Cgroups = []steer.Cgroup{c}
		p.Bypass = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64")}
	}
	s, err := steer.Open(home, "101")
	if err != nil {
		return err
	}
	dev, err := openTun(p.Device)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := upTun(p.Device); err != nil {
		return err
	}
	if err := s.Apply(p); err != nil {
		return err
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	fmt.Println("ready")
	<-term
	return s.Close()
}
