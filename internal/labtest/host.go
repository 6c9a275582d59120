package labtest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host is a network namespace of a lab.
type Host struct {
	Name string // as in `ip netns exec NAME …`
	Path string // "/run/netns/NAME"

	lab     *Lab
	devices int
	meters  int
	dirty   bool
}

func (h *Host) nextDevice() string {
	h.devices++
	return fmt.Sprintf("eth%d", h.devices-1)
}

// LeavesBehind says that the test leaves tables, rules or devices of cgtun in
// this namespace on purpose, so that the lab does not look for them.
func (h *Host) LeavesBehind() { h.dirty = true }

// Command returns a command that runs inside the namespace. It sees the mounts
// of the test: unlike under `ip netns exec`, /sys is not a fresh one. The
// process has the pid of the command that was started.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + h.Path, "--", name}, args...)...)
}

// Run runs a program inside the namespace and returns its stdout. It fails the
// test if the program does.
func (h *Host) Run(name string, args ...string) string {
	h.lab.t.Helper()
	out, err := h.Try(name, args...)
	if err != nil {
		h.lab.t.Fatal(err)
	}
	return out
}

// Try runs a program inside the namespace, for a minute at most, and returns
// its stdout, also when it failed; the error holds its stderr.
func (h *Host) Try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return h.finish(exec.CommandContext(ctx, name, args...))
}

// IP runs commands of ip(8) in one go: "route add default via 10.1.0.1", without options.
func (h *Host) IP(commands ...string) {
	h.lab.t.Helper()
	h.feed(strings.Join(commands, "\n"), "ip", "-batch", "-")
}

// feed runs a program inside the namespace that reads a text. It fails the test, with
// the text, if the program does.
func (h *Host) feed(text, name string, args ...string) {
	h.lab.t.Helper()
	cmd := exec.CommandContext(context.Background(), name, args...)
	cmd.Stdin = strings.NewReader(text)
	if _, err := h.finish(cmd); err != nil {
		h.lab.t.Fatalf("%v\n%s", err, text)
	}
}

// finish runs cmd inside the namespace: it is the child of a thread that is inside, so
// that nsenter is not needed.
func (h *Host) finish(cmd *exec.Cmd) (string, error) {
	return finish(cmd, func(cmd *exec.Cmd) error { return h.Do(cmd.Start) })
}

// Sysctl sets a sysctl of the namespace: "net.ipv4.ip_forward", "1".
func (h *Host) Sysctl(key, value string) {
	h.lab.t.Helper()
	path := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
	err := h.Do(func() error { return os.WriteFile(path, []byte(value), 0) })
	if err != nil {
		h.lab.t.Fatalf("set sysctl in %s: %v", h.Name, err)
	}
}

// Forward lets the namespace route packets between its links.
func (h *Host) Forward() {
	h.lab.t.Helper()
	h.Sysctl("net.ipv4.ip_forward", "1")
	h.Sysctl("net.ipv6.conf.all.forwarding", "1")
}

// DefaultDevice sends what has no other way into a device, and returns when the
// namespace receives by the IPv6 address that it has: the kernel makes it one a
// little later.
func (h *Host) DefaultDevice(dev string) {
	h.lab.t.Helper()
	h.Run("ip", "route", "add", "default", "dev", dev)
	h.Run("ip", "-6", "route", "add", "default", "dev", dev)
	Eventually(h.lab.t, 10*time.Second, func() bool {
		return strings.Contains(h.Run("ip", "-6", "route", "show", "table", "local", "dev", dev), "local ")
	}, "no local route to the address of %s", dev)
}

// Do calls f on a thread that is inside the namespace. What f opens stays
// there; goroutines that it starts do not. f must not end the test by Fatal.
func (h *Host) Do(f func() error) (err error) {
	target, err := os.Open(h.Path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer target.Close()
	done := make(chan error, 1)
	go func() {
		err := fmt.Errorf("do in %s: ended by Goexit", h.Name)
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, e := os.Open("/proc/thread-self/ns/net")
		if e != nil {
			err = fmt.Errorf("open own namespace: %w", e)
			return
		}
		defer home.Close()
		if e := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); e != nil {
			err = fmt.Errorf("enter %s: %w", h.Name, e)
			return
		}
		err = f()
		// A thread that cannot go back is not given back: a goroutine
		// that ends while locked takes its thread with it.
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}

// literal refuses names: the resolver's sockets, and those of a dial to
// several addresses, are made by other goroutines and so outside of the
// namespace.
func literal(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return err
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("address %q: only literal addresses can be used inside a namespace", addr)
	}
	return nil
}

// Listen listens inside the namespace. The lab closes the listener if the test
// does not. The sockets are plain TCP, not MPTCP.
func (h *Host) Listen(network, addr string) net.Listener {
	h.lab.t.Helper()
	var ln net.Listener
	err := literal(addr)
	if err == nil {
		err = h.Do(func() (err error) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			ln, err = lc.Listen(context.Background(), network, addr)
			return err
		})
	}
	if err != nil {
		h.lab.t.Fatalf("listen in %s: %v", h.Name, err)
	}
	h.lab.onClose(func() { ln.Close() })
	return ln
}

// ListenPacket opens a datagram socket inside the namespace. The lab closes it
// if the test does not.
func (h *Host) ListenPacket(network, addr string) net.PacketConn {
	h.lab.t.Helper()
	var pc net.PacketConn
	err := literal(addr)
	if err == nil {
		err = h.Do(func() (err error) {
			pc, err = net.ListenPacket(network, addr)
			return err
		})
	}
	if err != nil {
		h.lab.t.Fatalf("listen in %s: %v", h.Name, err)
	}
	h.lab.onClose(func() { pc.Close() })
	return pc
}

// Dial connects from inside the namespace, within ten seconds. The caller
// closes the conn.
func (h *Host) Dial(network, addr string) (net.Conn, error) {
	return h.DialWith(&net.Dialer{Timeout: 10 * time.Second}, network, addr)
}

// DialWith is Dial with a dialer of the caller's.
func (h *Host) DialWith(d *net.Dialer, network, addr string) (conn net.Conn, err error) {
	if err := literal(addr); err != nil {
		return nil, err
	}
	err = h.Do(func() (err error) {
		conn, err = d.Dial(network, addr)
		return err
	})
	return conn, err
}

// endProcesses kills the processes that are still in the namespace and returns their names.
func endProcesses(h *Host) (left []string) {
	for _, pid := range h.processes() {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		left = append(left, fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(string(comm))))
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	return left
}

// processes lists those in the namespace, apart from the test itself.
func (h *Host) processes() (pids []int) {
	want, err := netnsID(h.Path)
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if id, err := netnsID("/proc/" + e.Name() + "/ns/net"); err == nil && id == want {
			pids = append(pids, pid)
		}
	}
	return pids
}

// netnsID identifies the namespace behind a path.
func netnsID(path string) ([2]uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return [2]uint64{}, fmt.Errorf("stat %s: %w", path, err)
	}
	return [2]uint64{st.Dev, st.Ino}, nil
}
