package attach_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/steer"
	"cgtun/tun"
)

// What is served finds its device when it begins and all of the steering when
// it has to end, so that its last packets still find their clients.
func TestServingEndsBeforeTheSteering(t *testing.T) {
	atHome(t, func(t *testing.T) {
		o := options()
		var atStart, atEnd string
		o.Serve = func(ctx context.Context, a *attach.Attachment) error {
			atStart = steered()
			<-ctx.Done()
			atEnd = steered()
			if a.ID != attach.Home || a.Device.Name() != "tun0" || !a.NS.IsHome() {
				t.Errorf("attachment %+v", a)
			}
			return nil
		}
		r := run(t, o)
		if got := steered(); got != all {
			t.Errorf("ready, but there is only %q", got)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		if !strings.Contains(atStart, "device") || atEnd != all {
			t.Errorf("served from %q to %q", atStart, atEnd)
		}
		if got := steered(); got != "" || r.States() != nil {
			t.Errorf("left: %q, state %+v", got, r.States())
		}
	})
}

func TestManagerAttachesTwice(t *testing.T) {
	atHome(t, func(t *testing.T) {
		m := attach.New(options())
		var open int
		for i := range 2 {
			ctx, cancel := context.WithCancel(t.Context())
			err := m.Run(ctx, func() {
				if got := steered(); got != all {
					t.Errorf("time %d: there is only %q", i, got)
				}
				cancel()
			})
			if err != nil {
				t.Error(err)
			}
			if i == 0 {
				// The library closes subscriptions a little later.
				labtest.Eventually(t, within, func() bool { was := open; open = descriptors(t); return open == was }, "descriptors at rest")
			}
		}
		labtest.Eventually(t, within, func() bool { return descriptors(t) <= open }, "more than %d descriptors left open", open)
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Error(err)
	}
	return len(entries)
}

func TestFailingServeEndsRun(t *testing.T) {
	atHome(t, func(t *testing.T) {
		broken := errors.New("broken")
		for _, tt := range []struct {
			name  string
			serve func(context.Context, *attach.Attachment) error
			want  func(error) bool
		}{
			{"at once", func(context.Context, *attach.Attachment) error { return broken },
				func(err error) bool { return errors.Is(err, broken) }},
			{"without a reason", func(context.Context, *attach.Attachment) error { return nil },
				func(err error) bool { return err != nil && !strings.Contains(err.Error(), "%!") }},
		} {
			o := options()
			begin := make(chan struct{})
			o.Serve = func(ctx context.Context, a *attach.Attachment) error {
				<-begin
				return tt.serve(ctx, a)
			}
			r := run(t, o)
			close(begin)
			if err := r.end(); !tt.want(err) {
				t.Errorf("%s: %v", tt.name, err)
			}
			if got := steered(); got != "" {
				t.Errorf("%s: left %q", tt.name, got)
			}
		}
	})
}

// A device that somebody at home deletes or renames is made again, and steered to, while
// the other one goes on; at once, or when its name is free.
func TestDeviceAtHomeIsMadeAgain(t *testing.T) {
	atHome(t, func(t *testing.T) {
		var serving [2]atomic.Int32 // how often it has begun
		var lingers atomic.Bool     // who serves takes time to end
		o := options()
		o.Routes = append(o.Routes, otherRoute())
		o.Serve = func(ctx context.Context, a *attach.Attachment) error {
			stop := context.AfterFunc(ctx, func() { a.Device.Queues()[0].SetReadDeadline(time.Unix(1, 0)) })
			defer stop()
			serving[map[string]int{"default": 0, "other": 1}[a.Route]].Add(1)
			for {
				_, _, err := a.Device.Queues()[0].ReadPacket([][]byte{make([]byte, 70000)})
				switch {
				case ctx.Err() != nil:
					return nil
				case tun.IsEnd(err):
					for lingers.Load() && ctx.Err() == nil {
						time.Sleep(time.Millisecond)
					}
					return fmt.Errorf("read: %w", err)
				}
			}
		}
		r := run(t, o)
		back := func(times int32) bool { return serving[0].Load() == times && r.home().Err == nil && steered() == all }
		for i, taken := range [][]string{
			{"link del tun0"},
			{"link set tun0 down", "link set tun0 name gone0"},
			{"link del tun0"},
		} {
			for _, args := range taken {
				ip(t, args)
			}
			labtest.Eventually(t, 10*time.Second, func() bool { return back(int32(i) + 2) }, "back after %v", taken)
		}
		if out, _ := tool("ip", "link show gone0"); !strings.Contains(out, "does not exist") {
			t.Errorf("the device of another name is left: %s", out)
		}
		// The name is taken for a while: the steering stays, and who has the name
		// is not touched.
		lingers.Store(true)
		ip(t, "link del tun0")
		ip(t, "tuntap add dev tun0 mode tun")
		labtest.Eventually(t, 10*time.Second, func() bool { return r.home().Err != nil }, "an error in the state")
		lingers.Store(false)
		if got := steered(); got != "rule rule6 nft" {
			t.Errorf("while its name is taken there is %q", got)
		}
		if got := ip(t, "addr show tun0"); strings.Contains(got, "inet") {
			t.Errorf("another's device has our addresses: %s", got)
		}
		ip(t, "link del tun0")
		labtest.Eventually(t, 20*time.Second, func() bool { return back(5) }, "back when the name is free")
		if n := serving[1].Load(); n != 1 {
			t.Errorf("the other route was served %d times", n)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A stop ends what serves devices that were made again, also those that are not
// there any more and take time to end.
func TestStopAfterDevicesWereMadeAgain(t *testing.T) {
	atHome(t, func(t *testing.T) {
		o := options()
		o.Routes = append(o.Routes, otherRoute())
		var serving, asked atomic.Int32
		o.Serve = func(ctx context.Context, a *attach.Attachment) error {
			serving.Add(1)
			defer serving.Add(-1)
			if a.Route == "default" {
				<-ctx.Done() // it notices nothing else
				return nil
			}
			asked.Add(1)
			stop := context.AfterFunc(ctx, func() { a.Device.Queues()[0].SetReadDeadline(time.Unix(1, 0)) })
			defer stop()
			for {
				if _, _, err := a.Device.Queues()[0].ReadPacket([][]byte{make([]byte, 70000)}); tun.IsEnd(err) || ctx.Err() != nil {
					return err
				}
			}
		}
		r := run(t, o)
		for i := range int32(2) {
			ip(t, "link del tun0")
			labtest.Eventually(t, 10*time.Second, func() bool { return r.home().Err != nil }, "the loss is noticed")
			ip(t, "link del tun1")
			labtest.Eventually(t, 10*time.Second, func() bool {
				return r.home().Err == nil && steered() == all && asked.Load() == i+2
			}, "both are back")
		}
		if n := serving.Load(); n != 4 {
			t.Errorf("%d serve, want the three of tun0 and that of tun1", n)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// Tries to make a device again are bounded, and wait longer each time.
func TestRenewalsAreBounded(t *testing.T) {
	pauses := attach.Renewals()
	if len(pauses) == 0 || len(pauses) > 20 || pauses[0] != 0 || !slices.IsSorted(pauses) || pauses[len(pauses)-1] > 10*time.Second {
		t.Errorf("pauses %v", pauses)
	}
}

// A plan that cannot be applied is undone, and what is served has ended.
func TestBadPlanIsUndone(t *testing.T) {
	atHome(t, func(t *testing.T) {
		o := options()
		o.Routes[0].Plan.Priority = 40000
		served := 0
		o.Serve = func(ctx context.Context, _ *attach.Attachment) error {
			<-ctx.Done()
			served++
			return nil
		}
		err := attach.New(o).Run(t.Context(), func() { t.Error("was ready") })
		if err == nil || !strings.Contains(err.Error(), "priority 40000") {
			t.Errorf("got %v", err)
		}
		if served != 1 {
			t.Errorf("served %d times", served)
		}
		if got := steered(); got != "" {
			t.Errorf("left: %q", got)
		}
	})
}

func TestWhatIsTakenIsNamed(t *testing.T) {
	atHome(t, func(t *testing.T) {
		start := func() error { return attach.New(options()).Run(t.Context(), func() { t.Error("was ready") }) }
		check := func() error { return attach.Check(&options().Routes[0]) }
		if err := check(); err != nil {
			t.Errorf("nothing taken: %v", err)
		}
		var steering *steer.TakenError
		var device *tun.TakenError

		ip(t, "rule add pref 10101 lookup 7")
		for _, err := range []error{check(), start()} {
			if !errors.As(err, &steering) || steering.What != "ip rule priority 10101" {
				t.Errorf("priority: %v", err)
			}
		}
		ip(t, "rule del pref 10101")

		ip(t, "tuntap add dev tun0 mode tun")
		if err := check(); !errors.As(err, &steering) || steering.What != "device tun0" {
			t.Errorf("device, checked: %v", err)
		}
		if err := start(); !errors.As(err, &device) || device.Value != "tun0" {
			t.Errorf("device: %v", err)
		}
		ip(t, "link del tun0")
	})
}

// within is how soon the steering follows what changes around it, on a busy machine. Only
// what the kernel tells of is looked at: what is missed stays for good.
const within = 10 * time.Second

// Addresses that come and go on an uplink are local, and their prefixes left
// alone, within a second.
func TestAddressesAreFollowed(t *testing.T) {
	atHome(t, func(t *testing.T) {
		attached := make(chan *attach.Attachment, 1)
		o := options()
		o.Serve = func(ctx context.Context, a *attach.Attachment) error {
			attached <- a
			return serveNothing(ctx, a)
		}
		r := run(t, o)
		a := <-attached
		known := func(addr, bypass string) bool {
			state := r.home()
			return state.Err == nil && a.Local(netip.MustParseAddr(addr)) &&
				slices.Contains(state.Bypass, netip.MustParsePrefix(bypass)) && strings.Contains(ruleset(t), bypass)
		}
		unknown := func(addr, bypass string) bool {
			return !a.Local(netip.MustParseAddr(addr)) &&
				!slices.Contains(r.home().Bypass, netip.MustParsePrefix(bypass)) && !strings.Contains(ruleset(t), bypass)
		}
		for _, own := range [][2]string{{"10.9.0.1", "10.9.0.0/24"}, {"fd09::1", "fd09::/64"}} {
			if !known(own[0], own[1]) {
				t.Errorf("%s was not known from the start", own[0])
			}
		}
		if a.Local(netip.MustParseAddr("10.9.0.2")) || strings.Contains(ruleset(t), "0.0.0.0/0") {
			t.Error("too much is local")
		}
		for _, c := range []struct{ args, addr, bypass string }{
			{"192.0.2.1/24 dev eth0", "192.0.2.1", "192.0.2.0/24"},
			{"2001:db8:5::1/48 dev eth0 nodad", "2001:db8:5::1", "2001:db8:5::/48"},
			{"192.0.2.1 peer 198.51.100.0/24 dev eth0", "192.0.2.1", "198.51.100.0/24"},
		} {
			if known(c.addr, c.bypass) {
				t.Errorf("%s is known beforehand", c.addr)
			}
			ip(t, "addr add "+c.args)
			labtest.Eventually(t, within, func() bool { return known(c.addr, c.bypass) }, "%s was not followed", c.args)
			ip(t, "addr del "+strings.TrimSuffix(c.args, "nodad"))
			labtest.Eventually(t, within, func() bool { return unknown(c.addr, c.bypass) }, "the end of %s was not followed", c.args)
		}

		// Of many changes at once the last one counts.
		for range 20 {
			ip(t, "addr add 192.0.2.1/24 dev eth0")
			ip(t, "addr del 192.0.2.1/24 dev eth0")
		}
		ip(t, "addr add 192.0.2.1/24 dev eth0")
		labtest.Eventually(t, within, func() bool { return known("192.0.2.1", "192.0.2.0/24") }, "the last of many")
		ip(t, "addr del 192.0.2.1/24 dev eth0")

		// A link-local one is left alone as all of them are, and changes no plan.
		ip(t, "addr add fe80::77/64 dev eth0 nodad")
		labtest.Eventually(t, within, func() bool {
			return a.Local(netip.MustParseAddr("fe80::77")) && unknown("192.0.2.1", "192.0.2.0/24")
		}, "a link-local address")
		if slices.Contains(r.home().Bypass, netip.MustParsePrefix("fe80::77/128")) {
			t.Errorf("bypassed: %v", r.home().Bypass)
		}

		// A link that goes down loses its v6 addresses, and routes.
		ip(t, "link set eth0 down")
		labtest.Eventually(t, within, func() bool { return unknown("fd09::1", "fd09::/64") }, "link down")
		ip(t, "link set eth0 up")
		ip(t, "addr add fd09::1/64 dev eth0 nodad")
		ip(t, "route add default via 10.9.0.2")
		ip(t, "route add default via fd09::2")
		labtest.Eventually(t, within, func() bool {
			return known("fd09::1", "fd09::/64") && known("10.9.0.1", "10.9.0.0/24") && steered() == all
		}, "link up again")
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// What others take away at home is back within a second, also while the newest
// plan cannot be in force.
func TestHomeIsRepaired(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r := run(t, options())
		for _, plan := range []string{"good", "bad"} {
			if plan == "bad" {
				r.Reconcile(cgroupsel.Snapshot{Cgroups: []cgroupsel.Cgroup{{Path: "/sel", ID: 1, Present: true}}})
				labtest.Eventually(t, within, func() bool { return r.home().Err != nil }, "an error in the state")
			}
			for _, take := range [][2]string{
				{"nft", "flush ruleset"}, {"ip", "rule del pref 10101"}, {"ip", "-6 rule del pref 10101"},
				{"ip", "route del default table 101"}, {"ip", "-6 route del default dev tun0 table 101"}, {"ip", "link set tun0 down"},
			} {
				if _, err := tool(take[0], take[1]); err != nil {
					t.Fatal(err)
				}
				labtest.Eventually(t, within, func() bool { return steered() == all }, "%s plan: back after %v", plan, take)
			}
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// Of several gateways the first that answers is taken, and taken again when it
// is back.
func TestGatewaysAreFollowed(t *testing.T) {
	atHome(t, func(t *testing.T) {
		i := newInner(t, 1)
		i.connect(1)
		i.ip("addr add 10.44.1.3/32 dev eth0")
		o := options()
		o.Routes[0].Kernel = true
		o.Routes[0].Plan.Via = steer.Via{Gateway: []netip.Addr{netip.MustParseAddr("10.44.1.2"), netip.MustParseAddr("10.44.1.3")}, Dev: i.up}
		r := run(t, o)
		goesBy := func(gateway string) {
			t.Helper()
			labtest.Eventually(t, 40*time.Second, func() bool {
				return strings.Contains(ip(t, "route show table 101"), "default via "+gateway)
			}, "by %s", gateway)
		}
		goesBy("10.44.1.2")
		i.ip("addr del 10.44.1.2/24 dev eth0")
		goesBy("10.44.1.3")
		i.ip("addr add 10.44.1.2/24 dev eth0")
		goesBy("10.44.1.2")
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// Cgroups that are selected come into force; a plan that cannot be does not
// take away the one before, is told of in the state, and is got over.
func TestCgroupsAreFollowed(t *testing.T) {
	atHome(t, func(t *testing.T) {
		labtest.Need(t, labtest.CgroupV2)
		group := labtest.New(t).Cgroup("sel")
		selected := cgroupsel.Cgroup{Path: group.Path, ID: group.ID, Level: strings.Count(group.Path, "/"), Present: true}
		r := run(t, options())
		selects := func() int { return strings.Count(ruleset(t), "socket cgroupv2 level 2") }
		reconcile := func(all ...cgroupsel.Cgroup) { r.Reconcile(cgroupsel.Snapshot{Cgroups: all}) }

		reconcile(selected)
		labtest.Eventually(t, within, func() bool { return selects() > 0 }, "cgroup in force")
		bad := selected
		bad.Level = 0
		reconcile(bad)
		labtest.Eventually(t, within, func() bool { return r.home().Err != nil }, "an error in the state")
		if selects() == 0 || steered() != all {
			t.Error("a bad plan took the good one away")
		}
		absent := selected
		absent.Present = false
		reconcile(absent)
		labtest.Eventually(t, 2*within, func() bool { return selects() == 0 && r.home().Err == nil }, "cgroup out of force")
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestStateSaysWhatIsAttached(t *testing.T) {
	atHome(t, func(t *testing.T) {
		o := options()
		o.Routes[0].Plan.Bypass = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		if s := attach.New(o).States(); s != nil {
			t.Errorf("before Run: %+v", s)
		}
		r := run(t, o)
		s := r.home()
		ns, err := netns.Home()
		if err != nil {
			t.Fatal(err)
		}
		if s.ID != attach.Home || s.Device != "tun0" || s.NetnsIno != ns.Inode() || !s.V6 || s.Err != nil || s.Since.IsZero() {
			t.Errorf("state %+v", s)
		}
		if len(s.Addresses) != 2 || s.Dropped != (steer.Counters{}) {
			t.Errorf("addresses %v, dropped %+v", s.Addresses, s.Dropped)
		}
		want := append(steer.Builtin(), o.Routes[0].Plan.Bypass[0], netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd09::/64"))
		for _, p := range want {
			if !slices.Contains(s.Bypass, p) {
				t.Errorf("bypass lacks %s: %v", p, s.Bypass)
			}
		}
		// A marked packet that is bound to another device is dropped and
		// counted.
		if _, err := tool("ping", "-q -c1 -W0.1 -m 101 -I eth0 203.0.113.1"); err == nil {
			t.Error("ping was answered")
		}
		if got := r.home().Dropped; got.Guard == 0 {
			t.Errorf("dropped %+v", got)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}
