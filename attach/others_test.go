package attach_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/tun"
)

// gate notes what a Manager says to it.
type gate struct {
	onOffline func() // called when a namespace is to be admitted as offline
	onAdmit   func() // called when one is to be admitted otherwise
	onForget  func() // called when one was forgotten
	onLetGo   func() // called when no device of a namespace is to be guarded any more

	mu     sync.Mutex
	said   map[uint64][]string // on each namespace, without repetitions
	frames map[uint64]string
	admits map[uint64]int  // how often each namespace was admitted
	doubts map[uint64]bool // by cookie: nobody may begin to send
}

func (g *gate) note(ns netns.Ref, word string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.said == nil {
		g.said = map[uint64][]string{}
	}
	if said := g.said[ns.Cookie()]; len(said) == 0 || said[len(said)-1] != word {
		g.said[ns.Cookie()] = append(said, word)
	}
	return nil
}

// GuardFrames keeps the names of the devices.
func (g *gate) GuardFrames(ns netns.Ref, _ int, devices ...cgroupsel.Device) error {
	if g.onLetGo != nil && len(devices) == 0 {
		g.onLetGo()
	}
	return ns.Do(func() error {
		var names []string
		for _, d := range devices {
			if dev, err := net.InterfaceByIndex(d.Index); err == nil && d.Ethernet {
				names = append(names, dev.Name)
			}
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.frames == nil {
			g.frames = map[uint64]string{}
		}
		g.frames[ns.Cookie()] = strings.Join(names, " ")
		return nil
	})
}

// guards are the devices whose frames are guarded.
func (g *gate) guards(ns netns.Ref) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.frames[ns.Cookie()]
}

func (g *gate) Arm() error { return nil }

func (g *gate) Doubt(ns netns.Ref, _ cgroupsel.Family) error {
	g.doubt(ns, true)
	return nil
}

func (g *gate) doubt(ns netns.Ref, is bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.doubts == nil {
		g.doubts = map[uint64]bool{}
	}
	g.doubts[ns.Cookie()] = is
}

func (g *gate) doubted(ns netns.Ref) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.doubts[ns.Cookie()]
}

func (g *gate) Admit(ns netns.Ref, a cgroupsel.Admission) error {
	g.doubt(ns, false)
	g.mu.Lock()
	if g.admits == nil {
		g.admits = map[uint64]int{}
	}
	g.admits[ns.Cookie()]++
	g.mu.Unlock()
	switch {
	case a.Offline:
		if g.onOffline != nil {
			g.onOffline()
		}
		return g.note(ns, "offline")
	case len(a.Devices) == 0 || a.Devices[0] == 0:
		return g.note(ns, "waived")
	}
	if g.onAdmit != nil {
		g.onAdmit()
	}
	return g.note(ns, "admitted")
}
func (g *gate) Deny(ns netns.Ref) error { return g.note(ns, "denied") }

func (g *gate) Forget(ns netns.Ref) {
	_ = g.note(ns, "forgotten")
	if g.onForget != nil {
		g.onForget()
	}
}

func (g *gate) words(ns netns.Ref) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.said[ns.Cookie()])
}

// last is the last word on a namespace, "" for none.
func (g *gate) last(ns netns.Ref) string {
	if said := g.words(ns); len(said) > 0 {
		return said[len(said)-1]
	}
	return ""
}

// inner is a namespace that lives as long as a process in it:
//
//	home inN ──── eth0 (10.44.N.2, fd44:N::2) inner
type inner struct {
	t   *testing.T
	ref netns.Ref
	pid int
	up  string // its end at home
	end func()
}

func newInner(t *testing.T, n int) *inner {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	i := &inner{t: t, pid: cmd.Process.Pid, up: fmt.Sprintf("in%d", n)}
	i.end = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		labtest.Eventually(t, soon, func() bool {
			return !i.linked()
		}, "%s goes with its namespace", i.up)
	})
	t.Cleanup(i.end)
	var err error
	if i.ref, err = netns.Named("/proc/" + strconv.Itoa(i.pid) + "/ns/net"); err != nil {
		t.Fatal(err)
	}
	return i
}

// linked says whether home has its end of the link.
func (i *inner) linked() bool {
	_, err := tool("ip", "link show dev "+i.up)
	return err == nil
}

// connect gives it a link, with the addresses and default routes of both families.
func (i *inner) connect(n int) {
	ip(i.t, fmt.Sprintf("link add %s type veth peer name eth0 netns %d", i.up, i.pid))
	ip(i.t, fmt.Sprintf("addr add 10.44.%d.1/24 dev %s", n, i.up))
	ip(i.t, "link set "+i.up+" up")
	i.ip("link set lo up")
	i.ip(fmt.Sprintf("addr add 10.44.%d.2/24 dev eth0", n))
	i.ip(fmt.Sprintf("addr add fd44:%d::2/64 dev eth0 nodad", n))
	i.ip("link set eth0 up")
	i.ip(fmt.Sprintf("route add default via 10.44.%d.1", n))
	i.ip(fmt.Sprintf("route add default via fd44:%d::1", n))
}

func (i *inner) try(tool, args string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(i.pid), "-n", tool}, strings.Fields(args)...)...).CombinedOutput()
	return string(out), err
}

func (i *inner) ip(args string) string {
	i.t.Helper()
	out, err := i.try("ip", args)
	if err != nil {
		i.t.Fatalf("ip %s: %v: %s", args, err, out)
	}
	return out
}

// steered says what is there of our steering and device.
func (i *inner) steered() string {
	var parts []string
	for _, p := range [][4]string{
		{"device", "ip", "link show up", "alias cgtun_101"},
		{"rule", "ip", "-4 rule", "fwmark 0x65 lookup 101"},
		{"rule6", "ip", "-6 rule", "fwmark 0x65 lookup 101"},
		{"nft", "nft", "list tables", "inet cgtun_101"},
	} {
		if out, err := i.try(p[1], p[2]); err == nil && strings.Contains(out, p[3]) {
			parts = append(parts, p[0])
		}
	}
	return strings.Join(parts, " ")
}

const allInside = "device rule rule6 nft"

func (i *inner) namespace() cgroupsel.Namespace {
	return cgroupsel.Namespace{Ref: i.ref, PID: i.pid, Running: true}
}

// others starts a Manager with a gate.
func others(t *testing.T, change func(*attach.Options)) (*running, *gate) {
	t.Helper()
	g := new(gate)
	o := options()
	o.Gate = g
	if change != nil {
		change(&o)
	}
	return run(t, o), g
}

func (r *running) shows(list ...cgroupsel.Namespace) {
	r.Reconcile(cgroupsel.Snapshot{Namespaces: list})
}

// state is what status says of a namespace, "" for nothing.
func (r *running) state(ns netns.Ref) string {
	for _, s := range r.States() {
		if s.NetnsIno == ns.Inode() {
			return s.State
		}
	}
	return ""
}

// soon is how soon a busy machine must have followed what no event tells of.
const soon = 15 * time.Second

func (r *running) becomes(i *inner, state, inside, word string, g *gate) {
	r.t.Helper()
	labtest.Eventually(r.t, soon, func() bool {
		return r.state(i.ref) == state && i.steered() == inside && g.last(i.ref) == word
	}, "%q, %q inside, gate %q; want %q, %q, %q", r.state(i.ref), i.steered(), g.last(i.ref), state, inside, word)
}

// A namespace is attached when it is in the picture and has a way out, left as
// it was when it is not in it any more, and goes with its last process.
func TestOtherNamespacesAreAttachedAndLeft(t *testing.T) {
	atHome(t, func(t *testing.T) {
		served := make(chan *attach.Attachment, 10)
		r, g := others(t, func(o *attach.Options) {
			o.Serve = func(ctx context.Context, a *attach.Attachment) error {
				served <- a
				defer context.AfterFunc(ctx, func() { _ = a.Device.Queues()[0].SetReadDeadline(time.Unix(1, 0)) })()
				for {
					if _, _, err := a.Device.Queues()[0].ReadPacket([][]byte{make([]byte, 70000)}); tun.IsEnd(err) {
						return err
					}
					if ctx.Err() != nil {
						return nil
					}
				}
			}
		})
		<-served
		i := newInner(t, 1)
		i.connect(1)
		i.ip("link add tun0 type veth peer name other") // a name that is taken
		labtest.Eventually(t, soon, func() bool {
			a := i.ip("addr show eth0")
			return strings.Contains(a, "fe80::") && !strings.Contains(a, "tentative")
		}, "the link has all of its addresses")
		before := i.ip("addr") + i.ip("rule") + i.ip("route show table all")
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		a := <-served
		if a.Device.Name() != "tun1" || !a.Local(netip.MustParseAddr("10.44.1.2")) || a.Local(netip.MustParseAddr("10.44.1.9")) {
			t.Errorf("%s, local addresses wrong", a.Device.Name())
		}
		s := r.States()[1]
		if s.ID != i.ref.String() || s.Device != "tun1" || !s.V4 || !s.V6 || !slices.Contains(s.Bypass, netip.MustParsePrefix("10.9.0.1/32")) {
			t.Errorf("state %+v", s)
		}
		r.shows()
		r.becomes(i, "", "", "forgotten", g)
		if after := i.ip("addr") + i.ip("rule") + i.ip("route show table all"); after != before {
			t.Errorf("is\n%s\nwas\n%s", after, before)
		}

		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		i.end()
		labtest.Eventually(t, soon, func() bool {
			return r.state(i.ref) == "" && g.last(i.ref) == "forgotten" && !i.linked()
		}, "the namespace ends with its last process, and its veth")
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// Without a default route there is nothing to capture: no device, but admitted
// as soon as something runs there. Each family goes by its own route.
func TestOfflineStaysOffline(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		forked := i.namespace()
		forked.Running = false
		r.shows(forked)
		labtest.Eventually(t, soon, func() bool { return r.state(i.ref) == attach.StateGated }, "a task was only forked")
		if word := g.last(i.ref); word != "" {
			t.Errorf("gate: %s", word)
		}
		r.shows(i.namespace())
		r.becomes(i, attach.StateOffline, "", "offline", g)
		i.connect(1)
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		i.ip("-6 route del default")
		labtest.Eventually(t, soon, func() bool { return i.steered() == "device rule nft" }, "v6 is left alone: %s", i.steered())
		i.ip("route del default")
		r.becomes(i, attach.StateOffline, "", "offline", g)
		named := i.namespace()
		named.All = true
		r.shows(named)
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		if got := i.steered(); got != "" {
			t.Errorf("left: %s", got)
		}
	})
}

// Changes that follow each other are looked at a little later, but each is a doubt at
// once: who begins to send after it waits for the look.
func TestChangesAreDoubtsAtOnce(t *testing.T) {
	atHome(t, func(t *testing.T) {
		attach.Calm(4 * time.Second)
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		i.ip("-6 route del default")
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, "device rule nft", "admitted", g)
		labtest.Eventually(t, soon, func() bool {
			i.ip("addr add 10.45.0.1/32 dev lo") // if it is looked at, nobody looks again for a while
			time.Sleep(500 * time.Millisecond)
			i.ip("addr del 10.45.0.1/32 dev lo")
			for range 3 {
				time.Sleep(500 * time.Millisecond)
				if !g.doubted(i.ref) {
					return false
				}
			}
			return true
		}, "a second change is a doubt before it is looked at")
		labtest.Eventually(t, soon, func() bool { return !g.doubted(i.ref) }, "it is looked at and admitted")
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A namespace above the selector's bounds is shown as failed, and why, and left
// alone; it is attached when there is room.
func TestTooManyNamespacesAreShown(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		above := i.namespace()
		above.Excess = errors.New("too many")
		r.shows(above)
		r.becomes(i, attach.StateFailed, "", "", g)
		if s := r.States()[1]; s.Err != above.Excess || s.ID != i.ref.String() || s.Device != "" {
			t.Errorf("state %+v", s)
		}
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// What others take away inside is back within a second or so.
func TestOthersAreRepaired(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		for _, take := range [][2]string{
			{"nft", "flush ruleset"}, {"ip", "rule del pref 10101"}, {"ip", "-6 rule del pref 10101"}, {"ip", "route del default table 101"},
		} {
			if out, err := i.try(take[0], take[1]); err != nil {
				t.Fatalf("%v: %v: %s", take, err, out)
			}
			labtest.Eventually(t, soon, func() bool {
				return i.steered() == allInside && strings.Contains(i.ip("route show table 101"), "default dev tun0")
			}, "back after %v", take)
		}
		if _, err := i.try("ip", "link del tun0"); err != nil {
			t.Fatal(err)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// Without CAP_NET_BROADCAST there are no events of other namespaces: they are
// looked at each second, and that is said. Home's are followed as ever.
func TestOthersWithoutEvents(t *testing.T) {
	labtest.Need(t, labtest.Tool("setpriv"))
	atHomeBy(t, []string{"setpriv", "--bounding-set=-net_broadcast"}, func(t *testing.T) {
		var log lockedBuffer
		r, g := others(t, func(o *attach.Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		if said := "other namespaces are looked at each second"; strings.Count(log.String(), said) != 1 {
			t.Errorf("not said once: %s", log.String())
		}
		i := newInner(t, 1)
		r.shows(i.namespace())
		r.becomes(i, attach.StateOffline, "", "offline", g)
		i.connect(1)
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		for _, take := range [][2]string{{"nft", "flush ruleset"}, {"ip", "rule del pref 10101"}} {
			if out, err := i.try(take[0], take[1]); err != nil {
				t.Fatalf("%v: %v: %s", take, err, out)
			}
			labtest.Eventually(t, soon, func() bool { return i.steered() == allInside }, "back after %v", take)
		}
		ip(t, "rule del pref 10101")
		labtest.Eventually(t, within, func() bool { return steered() == all }, "home's rule is back")
		i.ip("route del default")
		i.ip("-6 route del default")
		r.becomes(i, attach.StateOffline, "", "offline", g)
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// lockedBuffer may be written to and read at the same time.
type lockedBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// Events of one namespace that are too many for the buffer hide those of another:
// then all are looked at.
func TestOverflowIsFollowedByALook(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		i := newInner(t, 1)
		i.connect(1)
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		var flood strings.Builder
		for _, verb := range []string{"add", "del"} {
			for n := range 4000 {
				fmt.Fprintf(&flood, "route %s 198.51.%d.%d/32 dev lo table 7\n", verb, n>>8, n&255)
			}
		}
		file := filepath.Join(t.TempDir(), "flood")
		if err := os.WriteFile(file, []byte(flood.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 { // an overflow is not the end of listening
			lost := lostEvents(t)
			// What was told before has been looked at; then nobody listens.
			cmd := exec.Command("sh", "-c", `sleep 0.5; trap 'kill -CONT $PPID' EXIT; kill -STOP $PPID
timeout 20 nsenter -t "$0" -n ip -batch "$1" && ip rule del pref 10101`, strconv.Itoa(i.pid), file)
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			labtest.Eventually(t, within, func() bool { return steered() == all }, "the ip rule is back")
			if lostEvents(t) == lost {
				t.Error("no event was lost")
			}
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// lostEvents is how many messages did not fit the buffers of netlink sockets.
func lostEvents(t *testing.T) (lost int) {
	t.Helper()
	text, err := os.ReadFile("/proc/net/netlink")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 8 && f[1] == "0" { // NETLINK_ROUTE
			n, _ := strconv.Atoi(f[8])
			lost += n
		}
	}
	return lost
}

// The gate knows each device of home and of an attached namespace but loopback and
// ours, from before the namespace is admitted, and those that come later.
func TestDevicesAreGuarded(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r, g := others(t, nil)
		home, err := netns.Home()
		if err != nil {
			t.Fatal(err)
		}
		if got := g.guards(home); got != "eth0" {
			t.Errorf("at home: %q", got)
		}
		i := newInner(t, 1)
		i.connect(1)
		r.shows(i.namespace())
		r.becomes(i, attach.StateUp, allInside, "admitted", g)
		if got := g.guards(i.ref); got != "eth0" {
			t.Errorf("inside: %q", got)
		}
		i.ip("link add late0 type veth peer name late1")
		// Who is called as ours are is none of ours for that.
		i.ip("link set late0 alias cgtun_101")
		labtest.Eventually(t, soon, func() bool {
			return len(strings.Fields(g.guards(home))) == 2 && len(strings.Fields(g.guards(i.ref))) == 3
		}, "home %q, inside %q", g.guards(home), g.guards(i.ref))
		i.ip("route del default")
		i.ip("-6 route del default")
		r.becomes(i, attach.StateOffline, "", "offline", g)
		if got := g.guards(i.ref); got != "" {
			t.Errorf("offline: %q", got)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}
