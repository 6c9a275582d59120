package labtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var labs atomic.Int32 // numbers the labs of this process

// goneWithin is how long the kernel may take to let go of a namespace: it does so
// in the background, all namespaces of the machine in turn.
var goneWithin = time.Minute

// Lab is one test's network. Its methods fail the test when something cannot
// be made; they are to be called from the test's goroutine.
type Lab struct {
	t      testing.TB
	prefix string // in front of each name: of pid and lab

	mu      sync.Mutex
	hosts   []*Host
	cgroups *cgroupTree // nil until the first Cgroup
	closers []func()    // of servers and processes, run newest first
}

// New returns an empty lab. When the test and the clean-ups that it registered
// later have ended, the lab ends its processes, then asserts that cgtun left
// nothing in its namespaces and that the namespaces and cgroups can be removed
// and are gone.
func New(t testing.TB) *Lab {
	t.Helper()
	l := &Lab{t: t, prefix: fmt.Sprintf("lab%dn%d", os.Getpid(), labs.Add(1))}
	t.Cleanup(l.close)
	return l
}

// Host makes a namespace with its lo up. name is for people and needs only be
// unique in the lab.
func (l *Lab) Host(name string) *Host {
	l.t.Helper()
	h := &Host{lab: l, Name: l.prefix + "-" + name}
	h.Path = "/run/netns/" + h.Name
	if _, err := output("ip", "netns", "add", h.Name); err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	l.hosts = append(l.hosts, h)
	l.mu.Unlock()
	// Duplicate address detection would make each v6 address unusable for
	// a second, and states seen in that second unlike later ones.
	h.Sysctl("net.ipv6.conf.default.accept_dad", "0")
	h.Sysctl("net.ipv6.conf.all.accept_dad", "0")
	h.up("lo")
	return h
}

// Link is a veth pair between two hosts.
type Link struct {
	A, B string // the device's name at either end: "eth0", "eth1", …
}

// Link joins a and b with a veth pair, both ends up. addrs are pairs of
// prefixes ("10.9.0.1/24", "10.9.0.2/24"): the first of each pair goes to a,
// the second to b; "" is none.
func (l *Lab) Link(a, b *Host, addrs ...string) *Link {
	l.t.Helper()
	if len(addrs)%2 != 0 {
		l.t.Fatalf("link %s %s: addresses come in pairs, these are %d", a.Name, b.Name, len(addrs))
	}
	k := &Link{A: a.nextDevice(), B: b.nextDevice()}
	if err := pair(a, k.A, b, k.B); err != nil {
		l.t.Fatalf("link %s %s: %v", a.Name, b.Name, err)
	}
	a.up(k.A)
	b.up(k.B)
	var ours, theirs []string
	for i := 0; i < len(addrs); i += 2 {
		ours, theirs = append(ours, addrs[i]), append(theirs, addrs[i+1])
	}
	a.give(k.A, ours)
	b.give(k.B, theirs)
	a.carries(k.A)
	b.carries(k.B)
	a.Settled(k.A)
	b.Settled(k.B)
	return k
}

// pair makes a veth pair with one end in either namespace.
func pair(a *Host, nameA string, b *Host, nameB string) error {
	there, err := os.Open(b.Path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer there.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = nameA
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = nameB, netlink.NsFd(there.Fd())
	return a.Do(func() error { return netlink.LinkAdd(veth) })
}

// device calls f with a device, inside the namespace.
func (h *Host) device(name string, f func(netlink.Link) error) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return f(link)
	})
}

// up sets a device up.
func (h *Host) up(dev string) {
	h.lab.t.Helper()
	if err := h.device(dev, netlink.LinkSetUp); err != nil {
		h.lab.t.Fatalf("set up %s in %s: %v", dev, h.Name, err)
	}
}

// give gives a device addresses; "" is none.
func (h *Host) give(dev string, addrs []string) {
	h.lab.t.Helper()
	err := h.device(dev, func(link netlink.Link) error {
		for _, text := range addrs {
			if text == "" {
				continue
			}
			addr, err := netlink.ParseAddr(text)
			if err != nil {
				return err
			}
			if addr.IP.To4() == nil {
				addr.Flags = unix.IFA_F_NODAD
			}
			addr.Broadcast = net.IPv4zero // none, as by ip(8): else AddrAdd computes one
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("address %s: %w", text, err)
			}
		}
		return nil
	})
	if err != nil {
		h.lab.t.Fatalf("addresses of %s in %s: %v", dev, h.Name, err)
	}
}

// carries waits until a device carries packets, and has the address that it gives
// itself: the kernel sees to both a little after the two ends are up.
func (h *Host) carries(dev string) {
	h.lab.t.Helper()
	Eventually(h.lab.t, 10*time.Second, func() (up bool) {
		err := h.device(dev, func(link netlink.Link) error {
			up = link.Attrs().OperState == netlink.OperUp
			return nil
		})
		return err == nil && up
	}, "%s in %s carries packets", dev, h.Name)
	h.awaitLinkLocal(dev)
}

// Settled waits until the v6 addresses of a device are in force, which they are
// a moment after it is up, and slower on a busy machine.
func (h *Host) Settled(dev string) {
	h.lab.t.Helper()
	Eventually(h.lab.t, 10*time.Second, func() (settled bool) {
		err := h.device(dev, func(link netlink.Link) error {
			addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
			if err != nil {
				return err
			}
			local := &netlink.Route{LinkIndex: link.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, local, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
			tentative := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 })
			settled = !tentative && len(routes) >= len(addrs)
			return err
		})
		return err == nil && settled
	}, "the addresses of %s in %s are in force", dev, h.Name)
}

// onClose registers what is to be undone before the namespaces go.
func (l *Lab) onClose(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// close undoes the lab and asserts that it could.
func (l *Lab) close() {
	l.mu.Lock()
	closers, hosts, tree := l.closers, l.hosts, l.cgroups
	l.mu.Unlock()
	for i := len(closers) - 1; i >= 0; i-- {
		closers[i]()
	}
	// Children of what was ended may end a little after it.
	eventually(2*time.Second, func() bool {
		return !slices.ContainsFunc(hosts, func(h *Host) bool { return len(h.processes()) > 0 }) && (tree == nil || tree.empty())
	})
	for _, h := range hosts {
		for _, p := range endProcesses(h) {
			l.t.Errorf("left in namespace %s: process %s", h.Name, p)
		}
		if h.dirty {
			continue
		}
		err := h.Do(func() error {
			for _, r := range residue() {
				l.t.Errorf("left in namespace %s: %s", h.Name, r)
			}
			return nil
		})
		if err != nil {
			l.t.Error(err)
		}
	}
	if tree != nil {
		for _, r := range tree.remove() {
			l.t.Errorf("left: %s", r)
		}
	}
	if err := removeNamespaces(l.prefix, hosts); err != nil {
		l.t.Error(err)
	}
}

// removeNamespaces deletes the hosts' namespaces and waits until the kernel has
// let go of them. Their names say nothing about that: an open socket, a tun or
// a descriptor keeps a nameless one alive. So each gets one end of a veth pair
// whose other end is in a namespace of the lab's own: it goes with the first.
//
// Connections that nobody has open any more keep it alive, too, for minutes: those
// whose FIN is never answered, because the other side was killed or cut off. They are
// nothing that a program left, and are ended first.
func removeNamespaces(prefix string, hosts []*Host) (err error) {
	if len(hosts) == 0 {
		return nil
	}
	witness := &Host{Name: prefix + "-witness", Path: "/run/netns/" + prefix + "-witness"}
	if _, err := output("ip", "netns", "add", witness.Name); err != nil {
		return err
	}
	defer func() {
		_, e := output("ip", "netns", "del", witness.Name)
		err = errors.Join(err, e)
	}()
	for i, h := range hosts {
		e := pair(witness, fmt.Sprintf("w%d", i), h, "labwitness")
		if unanswered(h) {
			// A kernel that cannot end them says so.
			_, _ = h.Try("ss", "-K", "state", "fin-wait-1", "state", "closing", "state", "last-ack")
		}
		_, e2 := output("ip", "netns", "del", h.Name)
		err = errors.Join(err, e, e2)
	}
	var left []string
	var failed error
	gone := eventually(goneWithin, func() bool {
		left, failed = witness.ends()
		return failed == nil && len(left) == 0
	})
	if gone {
		return err
	}
	err = errors.Join(err, failed)
	for i, h := range hosts {
		if slices.Contains(left, fmt.Sprintf("w%d", i)) {
			err = errors.Join(err, fmt.Errorf("namespace %s outlives the test: a socket, a tun, a process or a descriptor of it is still open", h.Name))
		}
	}
	return err
}

// ends lists the veth ends in a namespace.
func (h *Host) ends() (names []string, err error) {
	err = h.Do(func() error {
		links, err := dumped(netlink.LinkList)
		for _, l := range links {
			if l.Type() == "veth" {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	})
	return names, err
}

// unanswered tells whether a namespace has connections whose FIN waits for an answer:
// tcp_states.h numbers them.
func unanswered(h *Host) (found bool) {
	const finWait1, lastAck, closing = " 04 ", " 09 ", " 0B "
	_ = h.Do(func() error {
		for _, file := range []string{"tcp", "tcp6"} {
			text, _ := os.ReadFile("/proc/thread-self/net/" + file)
			for _, state := range []string{finWait1, lastAck, closing} {
				found = found || strings.Contains(string(text), state)
			}
		}
		return nil
	})
	return found
}

// output runs a program in the namespace of the test and returns its stdout;
// the error holds the stderr.
func output(name string, args ...string) (string, error) {
	return finish(exec.CommandContext(context.Background(), name, args...), (*exec.Cmd).Start)
}

// finish starts cmd, by start, and waits for its end.
func finish(cmd *exec.Cmd, start func(*exec.Cmd) error) (string, error) {
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("run %s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Eventually waits until ok returns true and fails the test if that takes
// longer than timeout. msg, a format and its arguments, says what was expected.
func Eventually(t testing.TB, timeout time.Duration, ok func() bool, msg ...any) {
	t.Helper()
	if eventually(timeout, ok) {
		return
	}
	what := "a condition"
	if len(msg) > 0 {
		what = fmt.Sprintf(fmt.Sprint(msg[0]), msg[1:]...)
	}
	t.Fatalf("not within %v: %s", timeout, what)
}

// eventually asks often at first, then every 20 ms. It rests for three times as long as
// asking takes, 200 ms at most: many conditions run programs, and what is waited
// for needs the processors, too.
func eventually(timeout time.Duration, ok func() bool) bool {
	deadline := time.Now().Add(timeout)
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		asked := time.Now()
		if ok() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(max(pause, min(3*time.Since(asked), 200*time.Millisecond)))
	}
}
