package bench_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/relay"
	"cgtun/router"
	"cgtun/rules"
	"cgtun/stack"
	"cgtun/tun"
)

// The test binary is every program of the lab: roleEnv says which one.
const (
	roleEnv = "CGTUN_BENCH_ROLE"
	argEnv  = "CGTUN_BENCH_ARG"
)

const (
	iperfPort = "5201"
	echoPort  = "7000"
	// The copying relay shares an address with the splicing one.
	copyIperfPort = "5202"
	copyEchoPort  = "7001"
	serverIP      = "10.7.0.2"
	routerIP      = "10.8.0.1" // seen from the client that is routed
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleEnv)
	if role == "" {
		labtest.Main(m)
		return
	}
	raiseFiles()
	if err := roles[role](os.Getenv(argEnv)); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

var roles = map[string]func(arg string) error{
	"cgtun":    func(path string) error { return cgtun(path, nil) },
	"race":     func(path string) error { return cgtun(path, []string{"a", "b"}) },
	"splice":   splice,
	"copy":     copying,
	"server":   echoServer,
	"rate":     rate,
	"requests": requests,
	"latency":  latency,
	"idle":     idle,
}

// raiseFiles lets a process have as many descriptors as the system allows.
func raiseFiles() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		l.Cur = l.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	}
}

func untilTerminated() context.Context {
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	return ctx
}

// cgtun serves the namespace at path with a stack, the router and a direct
// outbound, as the daemon does, or a group of some of them.
func cgtun(path string, members []string) error {
	ctx := untilTerminated()
	ref, err := netns.Named(path)
	if err != nil {
		return err
	}
	queues, _ := strconv.Atoi(os.Getenv("CGTUN_BENCH_QUEUES"))
	d, err := tun.Open(ref, tun.Options{Name: "tun0", Table: 101, Queues: queues,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}})
	if err != nil {
		return err
	}
	defer d.Close()
	h, err := newHandler(ctx, members)
	if err != nil {
		return err
	}
	var q []stack.Queue
	for _, one := range d.Queues() {
		q = append(q, one)
	}
	s, err := stack.New(q, h, stack.Options{Attachment: "home", Local: func(a netip.Addr) bool { return a == netip.MustParseAddr("10.9.0.1") }})
	if err != nil {
		return err
	}
	if file := os.Getenv("CGTUN_BENCH_PROFILE"); file != "" {
		f, err := os.Create(file + strings.Join(members, ""))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
		defer func() {
			if f, err := os.Create(f.Name() + ".allocs"); err == nil {
				_ = pprof.Lookup("allocs").WriteTo(f, 0)
				_ = f.Close()
			}
		}()
	}
	fmt.Println("ready")
	err = s.Run(ctx)
	fmt.Fprintf(os.Stderr, "%+v\n", s.Stats())
	return err
}

// newHandler is the router with the built-in direct outbound; or, to see what
// the router costs, no more than a dial and the relay.
func newHandler(ctx context.Context, members []string) (flow.Handler, error) {
	if os.Getenv("CGTUN_BENCH_HANDLER") == "plain" {
		return plain{}, nil
	}
	var out dialer.Outbound
	out, err := newDirect("direct")
	if err == nil && len(members) > 0 {
		out, err = newRace(ctx, members)
	}
	if err != nil {
		return nil, err
	}
	set, err := rules.Compile(nil)
	if err != nil {
		return nil, err
	}
	r := router.New(router.Options{})
	r.Reload(set, map[string]dialer.Outbound{"direct": out})
	go r.Run(ctx)
	return r, nil
}

func newDirect(name string) (dialer.Outbound, error) {
	cfg := dialer.DefaultConfig()
	cfg.Name, cfg.Type = name, dialer.TypeDirect
	return dialer.NewDirect(cfg)
}

func newRace(ctx context.Context, members []string) (dialer.Outbound, error) {
	cfg := group.DefaultConfig()
	cfg.Name, cfg.Outbounds = "race", members
	var outs []dialer.Outbound
	for _, name := range members {
		out, err := newDirect(name)
		if err != nil {
			return nil, err
		}
		outs = append(outs, out)
	}
	scores := group.NewScores(slog.New(slog.DiscardHandler), nil)
	go scores.Run(ctx)
	return group.New(cfg, outs, scores)
}

type plain struct{}

func (plain) ServeStream(ctx context.Context, s flow.Stream) {
	s.Begun()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", s.Flow().Dst.String())
	if err != nil {
		s.Reject(flow.ReasonOf(err), flow.Said(err))
		return
	}
	server := flow.NewTCPConn(c.(*net.TCPConn))
	defer server.Close()
	client, err := s.Accept()
	if err != nil {
		_ = server.Reset()
		return
	}
	defer client.Close()
	relay.Streams(ctx, client, server, &relay.Options{})
}

func (plain) ServePackets(_ context.Context, c flow.PacketConn) { c.Close() }

// splice relays both ports to the server with splice(2): io.Copy between two
// sockets is that.
func splice(string) error {
	return relayPorts(map[string]string{iperfPort: iperfPort, echoPort: echoPort}, func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
	})
}

// copying is the same with read(2) and write(2) and one buffer a direction: what
// a relay costs at least that holds the bytes once, as one with a TCP of its own
// has to.
func copying(string) error {
	return relayPorts(map[string]string{copyIperfPort: iperfPort, copyEchoPort: echoPort}, func(dst, src *net.TCPConn) {
		// The plain interfaces keep io.CopyBuffer from splicing.
		io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 64<<10))
	})
}

// relayPorts relays from the ports that are keys to those ports of the server.
func relayPorts(ports map[string]string, move func(dst, src *net.TCPConn)) error {
	ctx := untilTerminated()
	for from, to := range ports {
		ln, err := listen("0.0.0.0:" + from)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go relayOne(c.(*net.TCPConn), serverIP+":"+to, move)
			}
		}()
	}
	fmt.Println("ready")
	<-ctx.Done()
	return nil
}

func relayOne(c *net.TCPConn, addr string, move func(dst, src *net.TCPConn)) {
	defer c.Close()
	out, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	s := out.(*net.TCPConn)
	defer s.Close()
	var both sync.WaitGroup
	both.Go(func() { move(s, c); s.CloseWrite() })
	move(c, s)
	c.CloseWrite()
	both.Wait()
}

// listen is a plain TCP listener with a long queue. Go's own listeners are
// MPTCP's, which nobody here speaks.
func listen(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", addr)
}

// echoServer answers each byte with itself.
func echoServer(string) error {
	ctx := untilTerminated()
	ln, err := listen(serverIP + ":" + echoPort)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var b [64]byte
				for {
					n, err := c.Read(b[:])
					if err != nil {
						return
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	fmt.Println("ready")
	<-ctx.Done()
	return nil
}

func oneByte(c net.Conn) error { return echoed(c, []byte{1}) }

func echoed(c net.Conn, b []byte) error {
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// request is what a group may send twice.
const request = "GET / HTTP/1.1\r\n\r\n"

// rate opens connections as fast as it can for CGTUN_BENCH_SECONDS, eight at a time,
// each with one byte both ways, and prints how many were right, and how many a second.
func rate(addr string) error { return rateOf(addr, "\x01") }

// requests is rate with a request both ways.
func requests(addr string) error { return rateOf(addr, request) }

func rateOf(addr, what string) error {
	var done, failed atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	end := began.Add(time.Duration(setting("CGTUN_BENCH_SECONDS", 1)) * time.Second)
	for range 8 {
		all.Go(func() {
			for time.Now().Before(end) {
				c, err := net.DialTimeout("tcp", addr, 5*time.Second)
				if err == nil {
					err = echoed(c, []byte(what))
					c.Close()
				}
				if err != nil {
					failed.Add(1)
					continue
				}
				done.Add(1)
			}
		})
	}
	all.Wait()
	if n := failed.Load(); n > 0 {
		return fmt.Errorf("%d of %d connections failed", n, n+done.Load())
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"done": float64(done.Load()), "rate": float64(done.Load()) / time.Since(began).Seconds(),
	})
}

// latency measures connect + first byte, and the round trip on an open
// connection, one at a time.
func latency(addr string) error {
	var first, open []time.Duration
	for range 400 {
		began := time.Now()
		c, err := net.Dial("tcp", addr)
		if err == nil {
			err = oneByte(c)
		}
		if err != nil {
			return err
		}
		first = append(first, time.Since(began))
		c.Close()
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for range 2000 {
		began := time.Now()
		if err := oneByte(c); err != nil {
			return err
		}
		open = append(open, time.Since(began))
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"first50": percentile(first, 50), "first99": percentile(first, 99),
		"open50": percentile(open, 50), "open99": percentile(open, 99),
	})
}

// percentile is in microseconds.
func percentile(d []time.Duration, p int) float64 {
	slices.Sort(d)
	return float64(d[min(len(d)-1, len(d)*p/100)].Nanoseconds()) / 1000
}

// idle opens "N ADDR" connections, says "ready", and holds them until it is
// told to end.
func idle(arg string) error {
	var n int
	var addr string
	if _, err := fmt.Sscan(arg, &n, &addr); err != nil {
		return err
	}
	ctx := untilTerminated()
	conns := make([]net.Conn, n)
	var all sync.WaitGroup
	var failed atomic.Pointer[error]
	for w := range 16 {
		all.Go(func() {
			for i := w; i < n; i += 16 {
				c, err := net.DialTimeout("tcp", addr, 10*time.Second)
				if err == nil {
					err = oneByte(c)
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				conns[i] = c
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	fmt.Println("ready")
	<-ctx.Done()
	for _, c := range conns {
		if c == nil {
			return errors.New("a connection is missing")
		}
		c.Close()
	}
	return nil
}
