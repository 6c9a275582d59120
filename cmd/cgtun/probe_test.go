package main_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

// probeEnv makes the test binary a probe: a client or server with odd sockets
// that no common program makes. It is run inside and outside of the cgroup.
const probeEnv = "CGTUN_TEST_PROBE"

func init() {
	if os.Getenv(probeEnv) == "" {
		return
	}
	var q probe
	err := json.Unmarshal([]byte(os.Getenv(probeEnv)), &q)
	if err == nil {
		var limit unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
			limit.Cur = limit.Max
			_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		}
		err = q.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// probe is what a probe does.
type probe struct {
	Do      string        // dial, serve, raw, or one of the names in probes
	Network string        // tcp, udp
	To      string        // ADDR:PORT, of raw ADDR
	Device  string        // SO_BINDTODEVICE
	Mark    int           // SO_MARK, 0: none
	MPTCP   bool          // dial by an MPTCP socket
	Say     string        // is sent, and an echo of it is waited for
	Proto   int           // of raw
	Wait    time.Duration // for the connection or the answer; 0: 3 s
	N       int
	Seed    int64
	Late    time.Duration // of exchange
}

// answer is what came of it, as JSON on stdout.
type answer struct {
	Local string        // the address that was connected from
	Heard string        // what was answered
	Errno string        // the name of the error, "" if all went well
	Took  time.Duration // until connected, or until the error
}

// probes are the ones that other files of the package add.
var probes = map[string]func(probe) error{}

// ask runs a probe in the machine and returns its answer.
func (w *world) probe(at where, q probe) (a answer) {
	w.t.Helper()
	if err := json.Unmarshal([]byte(w.probeOutput(at, q)), &a); err != nil {
		w.t.Fatalf("answer of probe %+v: %v", q, err)
	}
	return a
}

func (w *world) probeOutput(at where, q probe) string {
	w.t.Helper()
	return w.run(at, "env", probeArgs(q)...)
}

// startProbe runs a probe in the background and waits until it says "ready".
func (w *world) startProbe(at where, q probe) *labtest.Proc {
	w.t.Helper()
	p := w.lab.StartCommand(w.command(context.Background(), at, "env", probeArgs(q)...))
	p.WaitOutput("ready", patience())
	return p
}

// promptly probes until the answer has come within that time: the machine may be busy. What
// is told must be the same each time.
func (w *world) promptly(at where, q probe, within time.Duration, tries int) answer {
	w.t.Helper()
	a := w.probe(at, q)
	for try := 1; try < tries && a.Took > within; try++ {
		last := a
		if a = w.probe(at, q); a.Errno != last.Errno {
			w.t.Errorf("%+v, and then %+v", last, a)
		}
	}
	return a
}

func probeArgs(q probe) []string {
	text, _ := json.Marshal(q)
	self, _ := os.Executable()
	return []string{probeEnv + "=" + string(text), self}
}

func (q probe) run() error {
	if q.Wait == 0 {
		q.Wait = 3 * time.Second
	}
	switch q.Do {
	case "dial":
		return q.tell(q.dial())
	case "raw":
		return q.tell(q.raw())
	case "serve":
		return q.serve()
	}
	do, ok := probes[q.Do]
	if !ok {
		return fmt.Errorf("no probe %q", q.Do)
	}
	return do(q)
}

func (q probe) tell(a answer, err error) error {
	a.failed(err)
	return json.NewEncoder(os.Stdout).Encode(a)
}

// failed notes an error, if it is one.
func (a *answer) failed(err error) {
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		a.Errno = unix.ErrnoName(errno)
	case errors.Is(err, os.ErrDeadlineExceeded):
		a.Errno = "timeout"
	case err != nil:
		a.Errno = err.Error()
	}
}

// options sets the socket options that the probe asks for.
func (q probe) options(_, _ string, raw syscall.RawConn) error {
	var err error
	errControl := raw.Control(func(fd uintptr) {
		if q.Device != "" {
			err = os.NewSyscallError("bindtodevice", unix.BindToDevice(int(fd), q.Device))
		}
		if q.Mark != 0 {
			err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, q.Mark))
		}
	})
	return errors.Join(err, errControl)
}

func (q probe) dial() (a answer, err error) {
	d := net.Dialer{Timeout: q.Wait, Control: q.options}
	d.SetMultipathTCP(q.MPTCP)
	start := time.Now()
	c, err := d.Dial(q.Network, q.To)
	a.Took = time.Since(start)
	if err != nil {
		return a, err
	}
	defer c.Close()
	a.Local = c.LocalAddr().String()
	if q.Say == "" {
		return a, nil
	}
	_ = c.SetDeadline(time.Now().Add(q.Wait))
	defer func() { a.Took = time.Since(start) }()
	if _, err := io.WriteString(c, q.Say); err != nil {
		return a, err
	}
	buf := make([]byte, len(q.Say))
	n, err := io.ReadFull(c, buf)
	a.Heard = string(buf[:n])
	return a, err
}

// raw sends a packet of any IP protocol.
func (q probe) raw() (a answer, err error) {
	to, err := netip.ParseAddr(q.To)
	if err != nil {
		return a, err
	}
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.As16()})
	if to.Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: to.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, q.Proto)
	if err != nil {
		return a, err
	}
	defer unix.Close(fd)
	if q.Device != "" {
		if err := unix.BindToDevice(fd, q.Device); err != nil {
			return a, err
		}
	}
	for range max(q.N, 1) {
		if err = unix.Sendto(fd, []byte(q.Say), 0, sa); err != nil {
			return a, err
		}
	}
	return a, nil
}

// serve echoes until it is killed: a stream or each datagram.
func (q probe) serve() error {
	lc := net.ListenConfig{Control: q.options}
	if strings.HasPrefix(q.Network, "udp") {
		pc, err := lc.ListenPacket(context.Background(), q.Network, q.To)
		if err != nil {
			return err
		}
		fmt.Println("ready", pc.LocalAddr())
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err == nil {
				_, _ = pc.WriteTo(buf[:n], from)
			}
		}
	}
	ln, err := lc.Listen(context.Background(), q.Network, q.To)
	if err != nil {
		return err
	}
	fmt.Println("ready", ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func port(addr string, port int) string { return net.JoinHostPort(addr, strconv.Itoa(port)) }

func probeDialer(q probe) *net.Dialer { return &net.Dialer{Timeout: q.Wait, Control: q.options} }

// echoOnce says something and waits for its echo.
func echoOnce(c net.Conn, say string) error {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, say); err != nil {
		return err
	}
	buf := make([]byte, len(say))
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != say {
		return fmt.Errorf("heard %q, said %q", buf, say)
	}
	return nil
}
