package cgroupsel_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"

	"golang.org/x/sys/unix"
)

// far is where the datagrams of these tests go: the address of the other end
// of every namespace's link.
const far = "10.9.0.2:7000"

// helperFirst sends a datagram as the first act of its life and says how that
// went: "sent", or the error. With a path as argument it goes to that network
// namespace before, without exec or fork.
func helperFirst() error {
	runtime.LockOSThread()
	if len(os.Args) > 1 {
		if err := goTo(os.Args[1]); err != nil {
			return err
		}
	}
	fmt.Println(sendFar())
	return nil
}

func goTo(space string) error {
	fd, err := unix.Open(space, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Setns(fd, unix.CLONE_NEWNET)
}

// helperOpen goes to the network namespace in its first argument and opens a
// thousand sockets there, one after the other.
func helperOpen() error {
	runtime.LockOSThread()
	if err := goTo(os.Args[1]); err != nil {
		return err
	}
	for range 1000 {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
	fmt.Println("opened")
	return nil
}

// helperStay says that it is there and sends when it is told to, a line each.
func helperStay() error {
	fmt.Println("there")
	for {
		var line string
		if _, err := fmt.Scanln(&line); err != nil {
			return nil
		}
		fmt.Println(sendFar())
	}
}

// helperFork starts "first" when it is told to, and ends after it. With "job" as
// argument that is in a process group of its own, and it ends at once; with "stay" it is
// helperStay; with "crowd" and a path it starts some as with "late", one after the other:
// each starts a job that goes to a namespace, and ends after a time.
func helperFork() error {
	words := append(os.Args[1:], "")
	if words[0] == "stay" {
		return helperStay()
	}
	if words[0] == "late" {
		pause, err := time.ParseDuration(words[2])
		if err != nil {
			return err
		}
		// The kernel takes its time to give that back.
		large := make([]byte, 128<<20)
		for i := 0; i < len(large); i += os.Getpagesize() {
			large[i] = 1
		}
		err = itself("first", words[1]).Start()
		time.Sleep(pause)
		runtime.KeepAlive(&large)
		return err
	}
	fmt.Println("there")
	var line string
	if _, err := fmt.Scanln(&line); err != nil {
		return err
	}
	switch words[0] {
	case "job":
		return itself("first").Start()
	case "crowd":
		for i := range crowd {
			if err := itself("fork", "late", words[1], (time.Duration(i) * 2 * time.Millisecond).String()).Run(); err != nil {
				return err
			}
		}
		return nil
	}
	cmd := itself("first")
	cmd.SysProcAttr = nil
	return cmd.Run()
}

// crowd is how many helperFork starts.
const crowd = 10

// itself is the helper in another role, in a process group of its own.
func itself(role string, words ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], words...)
	cmd.Env = helperEnviron(role)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// helperHold holds with the options in its first argument until it is killed.
// It decides nothing; if they are closed it admits home and all namespaces,
// with eth1 as their tun.
func helperHold() error {
	var o cgroupsel.Options
	if err := json.Unmarshal([]byte(os.Args[1]), &o); err != nil {
		return err
	}
	s, err := cgroupsel.New(o)
	if err != nil {
		return err
	}
	home, err := netns.Home()
	if err != nil {
		return err
	}
	return s.Run(context.Background(), func(now cgroupsel.Snapshot) {
		if o.Selections[0].Closed {
			for _, ns := range append(now.Namespaces, cgroupsel.Namespace{Ref: home}) {
				if err := admitWithEth1(s, ns.Ref); err != nil {
					fmt.Println(err)
				}
			}
		}
		if err := s.Arm(); err != nil {
			fmt.Println(err)
		}
		fmt.Println("armed")
	})
}

func admitWithEth1(s *cgroupsel.Selector, ns netns.Ref) error {
	var a cgroupsel.Admission
	err := ns.Do(func() error {
		dev, err := net.InterfaceByName("eth1")
		if err == nil {
			a.Devices = []int{dev.Index}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.Admit(ns, a)
}

// helperSender sends to far a thousand times a second until it is killed.
func helperSender() error {
	for range time.Tick(time.Millisecond) {
		sendFar()
	}
	return nil
}

func sendFar() string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	if os.Getenv("SEND_UNMARKED") != "" {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0); err != nil {
			return err.Error()
		}
	}
	to := netip.MustParseAddrPort(far)
	if err := unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return err.Error()
	}
	return "sent"
}

// newSpace makes a namespace that reaches far, and a meter of what arrives
// there.
//
//	selected process in space (10.9.0.1) ──── far (10.9.0.2): counts
func newSpace(lab *labtest.Lab, name string) (*labtest.Host, *labtest.Meter) {
	space, other := lab.Host(name), lab.Host(name+"far")
	lab.Link(space, other, "10.9.0.1/24", "10.9.0.2/24")
	return space, other.MeterMatch("udp dport 7000")
}

// attached is what a process gets from sendto in a namespace that manage has
// attached: it takes the link down, which nothing else does here.
const attached = "network is unreachable"

// manager stands in for attach: it runs a selector, and attaches each namespace
// of the snapshot after a while.
type manager struct {
	t    *testing.T
	s    *cgroupsel.Selector
	mu   sync.Mutex
	last cgroupsel.Snapshot
	done map[uint64]bool

	Takes time.Duration // what an attachment takes
	// Decide is called instead of attaching, if it is set.
	Decide func(cgroupsel.Namespace)
}

func manage(t *testing.T, s *cgroupsel.Selector, m *manager) *manager {
	t.Helper()
	m.t, m.s, m.done = t, s, make(map[uint64]bool)
	ctx, cancel := context.WithCancel(context.Background())
	end := make(chan error, 1)
	first := make(chan struct{})
	once := sync.OnceFunc(func() { close(first) })
	go func() {
		end <- s.Run(ctx, func(now cgroupsel.Snapshot) {
			m.reconcile(now)
			once()
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-end; err != context.Canceled {
			t.Errorf("Run: %v", err)
		}
	})
	<-first
	return m
}

// arm shuts the gate.
func (m *manager) arm() *manager {
	m.t.Helper()
	if err := m.s.Arm(); err != nil {
		m.t.Fatal(err)
	}
	return m
}

// decide has f called from now on: m runs already, as f needs its selector.
func (m *manager) decide(f func(cgroupsel.Namespace)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Decide = f
}

func (m *manager) reconcile(now cgroupsel.Snapshot) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = now
	for _, ns := range now.Namespaces {
		if m.done[ns.Ref.Cookie()] || ns.Excess != nil {
			continue
		}
		m.done[ns.Ref.Cookie()] = true
		if m.Decide != nil {
			m.Decide(ns)
			continue
		}
		m.attach(ns)
	}
}

func (m *manager) attach(ns cgroupsel.Namespace) {
	time.Sleep(m.Takes)
	if err := ns.Ref.Do(linkDown); err != nil && !errors.Is(err, netns.ErrGone) {
		m.t.Errorf("attach: %v", err)
	}
	if err := m.s.Admit(ns.Ref, cgroupsel.Admission{}); err != nil {
		m.t.Error(err)
	}
}

// linkDown takes eth0 down, if it is there.
func linkDown() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("eth0")
	if err != nil {
		return err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// again makes the manager attach the namespace of a host once more, when it is
// in a snapshot.
func (m *manager) again(h *labtest.Host) {
	m.t.Helper()
	ref, err := netns.Named(h.Path)
	if err != nil {
		m.t.Fatal(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.done, ref.Cookie())
}

// snapshot is the newest that the manager got.
func (m *manager) snapshot() cgroupsel.Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// find returns the entry of the namespace of a host.
func (m *manager) find(h *labtest.Host) (cgroupsel.Namespace, bool) {
	m.t.Helper()
	ref, err := netns.Named(h.Path)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, ns := range m.s.Snapshot().Namespaces {
		if ns.Ref.Cookie() == ref.Cookie() {
			return ns, true
		}
	}
	return cgroupsel.Namespace{}, false
}

// first runs the helper of that name in a cgroup and returns what it says.
func first(t *testing.T, c *labtest.Cgroup, cmd *exec.Cmd) string {
	t.Helper()
	cmd.Env = helperEnviron("first")
	out, err := c.Command(cmd).Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// state is the state of a process as proc_pid_stat(5) has it, 'T' for stopped.
func state(pid int) byte {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return rest[0]
}

// busy loads the machine with n loops until the test ends.
func busy(t *testing.T, n int) {
	t.Helper()
	for range n {
		cmd := exec.Command("sh", "-c", "while :; do :; done")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	}
}
