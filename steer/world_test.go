package steer_test

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
	"cgtun/steer"
)

// The address that is served on both ways: who answers says which way it was.
const (
	server4 = "203.0.113.7"
	server6 = "2001:db8::7"
)

// world is the lab of this package. The tun's packets are carried to another
// kernel, so that real answers come back through it, without a netstack.
//
//	beyond (203.0.113.7) ═tun═ home (10.9.0.2) ─── router ─── far (10.8.0.2, 203.0.113.7)
//	"beyond"                                       meter      "uplink"
type world struct {
	t                         *testing.T
	lab                       *labtest.Lab
	home, router, far, beyond *labtest.Host
	uplink                    string // home's device
	selected                  *labtest.Cgroup
	leaks                     *labtest.Meter // what home sent to what is not bypassed
	pipe                      *pipe
}

func newWorld(t *testing.T) *world {
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("nft"), labtest.Tool("ping"))
	lab := labtest.New(t)
	w := &world{t: t, lab: lab, home: lab.Host("home"), router: lab.Host("router"), far: lab.Host("far"), beyond: lab.Host("beyond")}
	w.uplink = lab.Link(w.home, w.router, "10.9.0.2/24", "10.9.0.1/24", "fd09::2/64", "fd09::1/64").A
	lab.Link(w.router, w.far, "10.8.0.1/24", "10.8.0.2/24", "fd08::1/64", "fd08::2/64")
	w.router.Forward()
	w.home.Run("ip", "route", "add", "default", "via", "10.9.0.1")
	w.home.Run("ip", "route", "add", "default", "via", "fd09::1")
	w.router.Run("ip", "route", "add", server4, "via", "10.8.0.2")
	w.router.Run("ip", "route", "add", server6, "via", "fd08::2")
	w.far.Run("ip", "route", "add", "default", "via", "10.8.0.1")
	w.far.Run("ip", "route", "add", "default", "via", "fd08::1")
	w.pipe = w.tun("tun0", "198.18.0.1", "fd00:101::1", w.beyond, "tun0")
	serveName(w.far, "uplink")
	serveName(w.beyond, "beyond")
	w.selected = lab.Cgroup("selected")
	w.leaks = w.router.Meter([]string{"0.0.0.0/0", "::/0"}, []string{server4, server6, "10.8.0.0/16", "fd08::/64"})
	return w
}

// revive makes the tun anew, after the end of the first.
func (w *world) revive() {
	w.beyond = w.lab.Host("beyond2")
	w.pipe = w.tun("tun0", "198.18.0.1", "fd00:101::1", w.beyond, "tun0")
	serveName(w.beyond, "beyond")
}

// serveName answers each line with the name, at the served addresses.
func serveName(h *labtest.Host, name string) {
	h.Run("ip", "addr", "add", server4+"/32", "dev", "lo")
	h.Run("ip", "addr", "add", server6+"/128", "dev", "lo", "nodad")
	h.Settled("lo")
	h.Serve(":7000", func(c *net.TCPConn) error {
		_, err := c.Write([]byte(name + "\n"))
		c.Read(make([]byte, 10))
		return err
	})
	for _, addr := range []string{server4, "[" + server6 + "]"} {
		pc := h.ListenPacket("udp", addr+":7000")
		go func() {
			buf := make([]byte, 100)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				pc.WriteTo([]byte(name+"\n"), from)
			}
		}()
	}
}

// plan is that of the world's selected cgroup.
func (w *world) plan() steer.Plan {
	p := plan()
	p.Cgroups = []steer.Cgroup{cgroupOf(w.selected)}
	p.Bypass = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64")}
	return p
}

func cgroupOf(c *labtest.Cgroup) steer.Cgroup {
	return steer.Cgroup{Path: c.Path, ID: c.ID, Level: strings.Count(c.Path, "/")}
}

// steer applies a plan until the test ends.
func (w *world) steer(p steer.Plan) *steer.Steering {
	w.t.Helper()
	s, err := steer.OpenHome(refOf(w.t, w.home), p.Table)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			w.t.Error(err)
		}
	})
	if err := s.Apply(p); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// command is the helper inside of home.
func (w *world) command(h *labtest.Host, args ...string) *exec.Cmd {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	w.t.Cleanup(cancel)
	cmd := h.Command(ctx, "/proc/self/exe", args...)
	exe, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	for i, a := range cmd.Args {
		if a == "/proc/self/exe" {
			cmd.Args[i] = exe
		}
	}
	if cmd.Path == "/proc/self/exe" {
		cmd.Path = exe
	}
	cmd.Env = append(os.Environ(), "STEER_HELPER=1")
	return cmd
}

func output(cmd *exec.Cmd) string {
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil && text == "" {
		return err.Error()
	}
	return text
}

// in runs the helper in home, in the selected cgroup.
func (w *world) in(args ...string) string {
	w.t.Helper()
	return output(w.selected.Command(w.command(w.home, args...)))
}

// out runs the helper in home, in no selected cgroup.
func (w *world) out(args ...string) string {
	w.t.Helper()
	return output(w.command(w.home, args...))
}

// openTun opens a tun in the namespace of the calling thread.
func openTun(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func upTun(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// pipe carries packets between a tun of home and one beyond.
type pipe struct {
	home *os.File
	mu   sync.Mutex
	seen [][]byte      // the newest packets out of home
	n    int           // all of them, but for the kernel's own
	hold chan struct{} // not nil: what comes back waits until it is closed
}

// tun makes a tun in home with its addresses and joins it to one beyond.
func (w *world) tun(name, addr4, addr6 string, beyond *labtest.Host, far string) *pipe {
	w.t.Helper()
	p := &pipe{}
	var other *os.File
	open := func(f **os.File, name string) func() error {
		return func() (err error) { *f, err = openTun(name); return err }
	}
	if err := w.home.Do(open(&p.home, name)); err != nil {
		w.t.Fatal(err)
	}
	if err := beyond.Do(open(&other, far)); err != nil {
		w.t.Fatal(err)
	}
	w.home.Run("ip", "link", "set", name, "up")
	w.home.Run("ip", "addr", "add", addr4+"/32", "dev", name, "noprefixroute")
	w.home.Run("ip", "addr", "add", addr6+"/128", "dev", name, "noprefixroute", "nodad")
	w.home.Settled(name)
	beyond.Run("ip", "link", "set", far, "up")
	beyond.Run("ip", "route", "add", "default", "dev", far)
	beyond.Run("ip", "-6", "route", "add", "default", "dev", far)
	var wg sync.WaitGroup
	wg.Go(func() { p.copy(other, p.home, true) })
	wg.Go(func() { p.copy(p.home, other, false) })
	w.t.Cleanup(func() { p.home.Close(); other.Close(); wg.Wait() })
	return p
}

func (p *pipe) copy(dst, src *os.File, count bool) {
	buf := make([]byte, 1<<16)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		if count {
			p.n++
			p.seen = append(p.seen, append([]byte(nil), buf[:n]...))
		}
		hold := p.hold
		p.mu.Unlock()
		if !count && hold != nil {
			<-hold
		}
		dst.Write(buf[:n])
	}
}

// holdAnswers keeps what comes back from beyond until release is called, or the
// test has ended.
func (w *world) holdAnswers() (release func()) {
	gate := make(chan struct{})
	w.pipe.mu.Lock()
	w.pipe.hold = gate
	w.pipe.mu.Unlock()
	release = sync.OnceFunc(func() { close(gate) })
	w.t.Cleanup(release)
	return release
}

// packets counts what home has sent into the tun.
func (p *pipe) packets() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.n
}

// from counts the v4 packets of a source.
func (p *pipe) from(src string) (n int) {
	addr := netip.MustParseAddr(src).As4()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.seen {
		if len(b) >= 20 && b[0]>>4 == 4 && [4]byte(b[12:16]) == addr {
			n++
		}
	}
	return n
}

// tcpFlags counts the v4 TCP packets with exactly these flags.
func (p *pipe) tcpFlags(flags byte) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, b := range p.seen {
		if len(b) >= 40 && b[0] == 0x45 && b[9] == unix.IPPROTO_TCP && b[33] == flags {
			n++
		}
	}
	return n
}

// datagram builds a v4 UDP packet, without a UDP checksum.
func datagram(src, dst netip.AddrPort, data string) []byte {
	b := make([]byte, 28, 28+len(data))
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(data)))
	copy(b[12:], src.Addr().AsSlice())
	copy(b[16:], dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[20:], src.Port())
	binary.BigEndian.PutUint16(b[22:], dst.Port())
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(data)))
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	return append(b, data...)
}
