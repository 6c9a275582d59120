package steer_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
	"cgtun/steer"
)

// startClosed starts an instance that selects the world's cgroup and blocks
// when it is gone.
func (w *world) startClosed() *labtest.Proc {
	w.t.Helper()
	c := cgroupOf(w.selected)
	p := w.lab.StartCommand(w.command(w.home, "steer", fmt.Sprint(c.ID), fmt.Sprint(c.Level)))
	labtest.Eventually(w.t, 20*time.Second, func() bool { return strings.Contains(p.Output(), "ready") }, "instance")
	return p
}

// With on_exit = "closed" who is selected reaches nothing but what is bypassed
// from the first start on, whatever ends the instance, until it is removed.
func TestClosedOutlivesTheInstance(t *testing.T) {
	w := newWorld(t)
	before := state(w.home)
	last := w.startClosed()
	w.leaks = w.router.MeterMatch("ip daddr "+server4+" meta l4proto != icmp", "ip6 daddr "+server6+" meta l4proto != ipv6-icmp")
	for _, way := range ways {
		if strings.HasPrefix(way.network, "udp") {
			w.lab.StartCommand(w.selected.Command(w.command(w.home, "insist", way.network, way.server)))
		}
	}
	for _, death := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM} {
		if err := syscall.Kill(last.Pid, death); err != nil {
			t.Fatal(err)
		}
		last.Wait()
		labtest.Eventually(t, 10*time.Second, func() bool {
			_, err := w.home.Try("ip", "link", "show", "tun1")
			return err != nil
		}, "device gone")
		w.assertClosed(death)
		// Another instance's start is no reason to open.
		open(t, w.home, 202)
		w.assertClosed(death)
		last = w.startClosed()
	}
	if err := steer.Remove(refOf(t, w.home), "101"); !errors.Is(err, steer.ErrAlive) {
		t.Errorf("Remove of a live instance: %v", err)
	}
	if err := syscall.Kill(last.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	last.Wait()
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets by the uplink", n)
	}
	if err := steer.Remove(refOf(t, w.home), "101"); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 10*time.Second, func() bool { return state(w.home) == before }, "state as it was")
	if got := asks(w.in); got != allUplink {
		t.Errorf("opened: %s", got)
	}
}

func (w *world) assertClosed(after syscall.Signal) {
	w.t.Helper()
	if got := asks(briefly(w.in)); strings.Contains(got, "uplink") {
		w.t.Errorf("after %v: %s", after, got)
	}
	if got := w.in("ask", "tcp4", server4+":7000", "mark=101"); !strings.Contains(got, "no route") && !strings.Contains(got, "unreachable") {
		w.t.Errorf("after %v, marked from birth: %s", after, got)
	}
	if got := output(w.selected.Command(w.home.Command(w.t.Context(), "ping", "-c1", "-W2", "10.9.0.1"))); !strings.Contains(got, "1 received") {
		w.t.Errorf("after %v, bypassed: %s", after, got)
	}
	if got, err := w.home.Try("ping", "-c1", "-W2", server4); err != nil {
		w.t.Errorf("after %v, others: %s", after, got)
	}
	objects, err := steer.Find(refOf(w.t, w.home))
	if err != nil || len(objects) < 4 {
		w.t.Errorf("after %v, Find: %v %v", after, objects, err)
	}
	for _, o := range objects {
		if !o.Closed || o.Alive {
			w.t.Errorf("after %v, Find: %+v", after, o)
		}
	}
	if text := w.home.Run("ip", "route", "show", "table", "101"); strings.Contains(text, "tun1") {
		w.t.Errorf("after %v, the table leads somewhere:\n%s", after, text)
	}
}

// What is to hold afterwards can be changed while it runs, and at a start.
func TestClosedIsChanged(t *testing.T) {
	for _, owner := range []bool{true, false} {
		t.Run(fmt.Sprintf("owner %v", owner), func(t *testing.T) {
			h := host(t)
			before := state(h)
			start := func() *steer.Steering {
				s, err := steer.OpenHome(refOf(t, h), 101)
				if err != nil {
					t.Fatal(err)
				}
				if !owner {
					s.WithoutOwner()
				}
				return s
			}
			apply := func(s *steer.Steering, closed bool) {
				t.Helper()
				p := plan()
				p.Closed = closed
				if err := s.Apply(p); err != nil {
					t.Fatal(err)
				}
				if got := strings.Contains(h.Run("ip", "route", "show", "table", "101"), "unreachable default"); got != closed {
					t.Errorf("closed %v: blocks %v", closed, got)
				}
			}
			s := start()
			apply(s, false)
			apply(s, true)
			if owner {
				h.Run("nft", "flush", "ruleset")
				if !strings.Contains(h.Run("nft", "list", "ruleset"), "chain out") {
					t.Error("nft flush ruleset took the table of a live instance")
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(h.Run("nft", "list", "ruleset"), "table inet cgtun_101") {
				t.Error("a closed table did not stay")
			}
			s = start() // an open start takes the closed block over
			apply(s, false)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if after := state(h); after != before {
				t.Errorf("left:\n%s\nwas:\n%s", after, before)
			}
			s = start()
			apply(s, true)
			if err := errors.Join(s.Undo(), s.Close()); err != nil {
				t.Fatal(err)
			}
			if after := state(h); after != before {
				t.Errorf("left after Undo:\n%s\nwas:\n%s", after, before)
			}
		})
	}
}

// What is blocked is let into the device when the table knows what comes out of it, not
// before: the kernel's answer to that would leave by another one.
func TestClosedIsOpenedByItsTable(t *testing.T) {
	for _, away := range []bool{false, true} {
		t.Run(fmt.Sprintf("away %v", away), func(t *testing.T) {
			h := host(t)
			start := func() *steer.Steering {
				s, err := steer.OpenHome(refOf(t, h), 101)
				if away {
					s, err = steer.Open(refOf(t, h), "101")
				}
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			p := plan()
			p.Closed = true
			p.Bypass = many()
			s := start()
			if err := errors.Join(s.Apply(p), s.Close()); err != nil {
				t.Fatal(err)
			}
			s = start()
			looks := 0
			look := func() {
				looks++
				if leads, knows := opened(t, h); leads && !knows {
					t.Errorf("look %d: the route leads to the device, and the table does not know it", looks)
				}
			}
			whileApplying(t, s, p, look)
			look()
			if looks < 5 {
				t.Errorf("only %d looks meanwhile", looks)
			}
			if err := errors.Join(s.Undo(), s.Close()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// What a run before has closed stays closed where the next one cannot begin.
func TestClosedStaysSoWhereTheNextStartFails(t *testing.T) {
	h := host(t)
	before := state(h)
	p := plan()
	p.Closed = true
	apply := func() (*steer.Steering, error) {
		s, err := steer.OpenHome(refOf(t, h), 101)
		if err != nil {
			t.Fatal(err)
		}
		return s, s.Apply(p)
	}
	s, err := apply()
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	device, mark := p.Device, p.Mark
	p.Device, p.Mark = "tun9", 111 // the device is not there
	for _, closed := range []bool{true, false} {
		p.Closed = closed
		s, err := apply()
		if err == nil {
			t.Error("a way by no device")
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		blocks := strings.Contains(h.Run("ip", "route", "show", "table", "101"), "unreachable default") &&
			strings.Contains(h.Run("ip", "rule"), "fwmark 0x6f lookup 101") &&
			strings.Contains(h.Run("nft", "list", "ruleset"), "table inet cgtun_101")
		if blocks != closed {
			t.Errorf("closed %v: blocks %v", closed, blocks)
		}
	}
	if after := state(h); after != before {
		t.Errorf("left:\n%s\nwas:\n%s", after, before)
	}
	p.Device, p.Mark, p.Closed = device, mark, true
	s, err = apply()
	if err := errors.Join(err, s.Undo(), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// Another way than our device leads on after a kill, and while the next run takes it over.
func TestClosedWayLeadsOnAcrossAStart(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"), labtest.Tool("ip"))
	lab := labtest.New(t)
	h := lab.Host("home")
	link := lab.Link(h, lab.Host("next"), "10.6.0.9/24", "10.6.0.1/24", "", "")
	p := plan()
	p.Closed, p.Device, p.Via = true, "", steer.Via{Dev: link.A}
	p.Bypass = many()
	open := func() *steer.Steering {
		s, err := steer.OpenHome(refOf(t, h), 101)
		if err != nil {
			t.Fatal(err)
		}
		s.WithoutOwner() // so that nothing shows that the first one is still there
		return s
	}
	killed := open()
	if err := killed.Apply(p); err != nil {
		t.Fatal(err)
	}
	s := open()
	gaps := 0
	whileApplying(t, s, p, func() {
		if leads, _ := opened(t, h); !leads {
			gaps++
		}
	})
	if gaps > 0 {
		t.Errorf("the way was gone in %d looks", gaps)
	}
	_ = killed.Close() // what it knows is not so any more
	if err := errors.Join(s.Undo(), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// whileApplying applies a plan, and calls look again and again until that is done.
func whileApplying(t *testing.T, s *steer.Steering, p steer.Plan, look func()) {
	t.Helper()
	applied := make(chan error, 1)
	go func() { applied <- s.Apply(p) }()
	for {
		select {
		case err := <-applied:
			if err != nil {
				t.Error(err)
			}
			return
		default:
			look()
		}
	}
}

// many are so many prefixes that the table takes its time.
func many() (prefixes []netip.Prefix) {
	for i := range 5000 {
		prefixes = append(prefixes, netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 8), byte(i), 1}), 32))
	}
	return prefixes
}

// opened says whether the route of table 101 leads to a device, and then whether the nft
// table gives its mark to what comes out of one.
func opened(t *testing.T, h *labtest.Host) (leads, knows bool) {
	t.Helper()
	err := refOf(t, h).Do(func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: 101, Type: unix.RTN_UNICAST}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if leads = len(routes) > 0; err != nil || !leads {
			return err
		}
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "cgtun_101"}
		rules, err := conn.GetRules(table, &nftables.Chain{Table: table, Name: "in"})
		knows = len(rules) == 2
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return leads, knows
}
