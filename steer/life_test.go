package steer_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
	"cgtun/steer"
)

// host is a namespace with a tun that nobody reads, for tests without traffic.
func host(t *testing.T) *labtest.Host {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"), labtest.Tool("ip"))
	h := labtest.New(t).Host("home")
	addTun(t, h, "tun0")
	return h
}

func addTun(t *testing.T, h *labtest.Host, name string) {
	h.Run("ip", "tuntap", "add", name, "mode", "tun")
	t.Cleanup(func() { h.Try("ip", "link", "del", name) })
	h.Run("ip", "link", "set", name, "up")
}

func open(t *testing.T, h *labtest.Host, number int) *steer.Steering {
	t.Helper()
	s, err := steer.OpenHome(refOf(t, h), number)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestTakenIsRefusedAndNamed(t *testing.T) {
	tests := []struct {
		name   string
		setup  string // "ip …" in home
		what   string
		holder string
	}{
		{"priority", "ip rule add pref 10101 fwmark 0x7 lookup 7", "ip rule priority 10101", `ip rule "10101: from all fwmark 0x7 lookup 7`},
		{"priority in v6", "ip -6 rule add pref 10101 lookup 7", "ip rule priority 10101", `ip rule "10101: from all lookup 7`},
		{"mark", "ip rule add pref 50 fwmark 101 lookup 7", "mark 0x65/0xffffffff", `ip rule "50: from all fwmark 0x65 lookup 7`},
		{"overlapping mask", "ip rule add pref 50 fwmark 0x60/0xf0 lookup 7", "mark 0x65/0xffffffff", "fwmark 0x60/0xf0"},
		{"table", "ip route add 192.0.2.0/24 dev tun0 table 101", "table 101", "route 192.0.2.0/24 proto 3 dev tun0"},
		{"table in v6", "ip -6 route add 2001:db8::/32 dev tun0 table 101", "table 101", "route 2001:db8::/32 proto 3 dev tun0"},
		{"inverted mark", "ip rule add pref 50 not fwmark 101 lookup 7", "", ""},
		{"other mark under the same mask", "ip rule add pref 50 fwmark 0x70/0xf0 lookup 7", "", ""},
		{"rule without mark", "ip rule add pref 50 from 192.0.2.1 lookup 101", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := host(t)
			h.Run("ip", strings.Fields(tt.setup)[1:]...)
			h.Run("nft", "add table inet foreign; add chain inet foreign c; add rule inet foreign c accept")
			before := state(h)
			s := open(t, h, 101)
			err := s.Apply(plan())
			var taken *steer.TakenError
			if tt.what == "" {
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			} else if !errors.As(err, &taken) || taken.What != tt.what || !strings.Contains(taken.Holder, tt.holder) {
				t.Errorf("got %v, want %s taken by %s", err, tt.what, tt.holder)
			}
			if after := state(h); after != before {
				t.Errorf("state has changed:\n%s\nwas:\n%s", after, before)
			}
		})
	}
}

func TestCheckNamesTheDevice(t *testing.T) {
	h := host(t)
	h.Run("ip", "link", "set", "tun0", "alias", "somebody's")
	s := open(t, h, 101)
	var taken *steer.TakenError
	if err := s.Check(plan()); !errors.As(err, &taken) || taken.What != "device tun0" || !strings.Contains(taken.Holder, "somebody's") {
		t.Errorf("got %v", err)
	}
	p := plan()
	p.Device = "tun1"
	if err := s.Check(p); err != nil {
		t.Errorf("free device: %v", err)
	}
}

func TestBadPlanIsRefused(t *testing.T) {
	h := host(t)
	s := open(t, h, 101)
	before := state(h)
	for name, change := range map[string]func(*steer.Plan){
		"bits outside of the mask": func(p *steer.Plan) { p.Mask = 0xf },
		"no mark":                  func(p *steer.Plan) { p.Mark = 0 },
		"only the shared bit":      func(p *steer.Plan) { p.Mark, p.Mask = 1<<30, 1<<30 },
		"other table":              func(p *steer.Plan) { p.Table = 102 },
		"after main":               func(p *steer.Plan) { p.Priority = 40000 },
		"no device":                func(p *steer.Plan) { p.Device = "tun9" },
		"root cgroup":              func(p *steer.Plan) { p.Cgroups = []steer.Cgroup{{Path: "/", ID: 1}} },
	} {
		p := plan()
		change(&p)
		if err := s.Apply(p); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if after := state(h); after != before {
			t.Fatalf("%s: state has changed:\n%s\nwas:\n%s", name, after, before)
		}
	}
}

// A reload that fails leaves what was there.
func TestFailedApplyKeepsTheOldPlan(t *testing.T) {
	h := host(t)
	s := open(t, h, 101)
	if err := s.Apply(plan()); err != nil {
		t.Fatal(err)
	}
	before := state(h)
	p := plan()
	p.Bypass = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	p.Device = "tun9"
	if err := s.Apply(p); err == nil {
		t.Error("a plan without its device was accepted")
	}
	if after := state(h); after != before {
		t.Errorf("state has changed:\n%s\nwas:\n%s", after, before)
	}
}

// Two instances side by side: each takes its own, and an answer goes back into
// the device that the question came out of, whoever else is there.
func TestTwoInstancesSideBySide(t *testing.T) {
	for _, masks := range [][2]uint32{{0xffffffff, 0xffffffff}, {0xff, 0xffff}} {
		t.Run(fmt.Sprintf("%#x %#x", masks[0], masks[1]), func(t *testing.T) {
			w := newWorld(t)
			beyond2, other := w.lab.Host("beyond2"), w.lab.Cgroup("other")
			pipe2 := w.tun("tun1", "198.18.0.2", "fd00:101::2", beyond2, "tun0")
			serveName(beyond2, "beyond2")
			p1, p2 := w.plan(), w.plan()
			p1.Mask = masks[0]
			p2.Mark, p2.Mask, p2.Table, p2.Priority, p2.Device = 102, masks[1], 102, 10102, "tun1"
			p2.Cgroups = []steer.Cgroup{cgroupOf(other)}
			w.steer(p2)
			w.steer(p1)
			for _, way := range ways {
				if got := w.in("ask", way.network, way.server); got != "beyond" {
					t.Errorf("%s, first: %s", way.network, got)
				}
				if got := output(other.Command(w.command(w.home, "ask", way.network, way.server))); got != "beyond2" {
					t.Errorf("%s, second: %s", way.network, got)
				}
			}
			// A stranger beyond either device speaks first, as the full cone
			// of a UDP client allows.
			for _, c := range []struct {
				cgroup *labtest.Cgroup
				pipe   *pipe
				port   string
			}{{w.selected, w.pipe, "6001"}, {other, pipe2, "6002"}} {
				srv := w.lab.StartCommand(c.cgroup.Command(w.command(w.home, "serve", ":"+c.port)))
				labtest.Eventually(t, 5*time.Second, func() bool { return strings.Contains(srv.Output(), "ready") }, "server")
				before := c.pipe.packets()
				ap := netip.MustParseAddrPort
				c.pipe.home.Write(datagram(ap("203.0.113.99:9"), ap("10.9.0.2:"+c.port), "who\n"))
				labtest.Eventually(t, 5*time.Second, func() bool { return c.pipe.packets() > before || w.leaks.Packets() > 0 }, "answer")
			}
			if n := w.leaks.Packets(); n != 0 {
				t.Errorf("%d packets left by the uplink", n)
			}
		})
	}
}

// A second cgtun with the same numbers is refused; the first one is named and
// not hurt.
func TestSameNumbersAreTaken(t *testing.T) {
	h := host(t)
	first := open(t, h, 101)
	if err := first.Apply(plan()); err != nil {
		t.Fatal(err)
	}
	before := state(h)
	var taken *steer.TakenError
	err := open(t, h, 101).Apply(plan())
	if !errors.As(err, &taken) || !strings.Contains(taken.Holder, "cgtun instance 101") {
		t.Errorf("same table: %v", err)
	}
	p := plan()
	p.Table = 102
	if err := open(t, h, 102).Apply(p); !errors.As(err, &taken) || !strings.Contains(taken.Holder, "cgtun instance 101") {
		t.Errorf("same priority: %v", err)
	}
	p.Priority = 10102
	if err := open(t, h, 102).Apply(p); !errors.As(err, &taken) || !strings.HasPrefix(taken.What, "mark ") {
		t.Errorf("same mark: %v", err)
	}
	if after := state(h); after != before {
		t.Errorf("state has changed:\n%s\nwas:\n%s", after, before)
	}
	if err := steer.Remove(refOf(t, h), "101"); !errors.Is(err, steer.ErrAlive) {
		t.Errorf("Remove of a live instance: %v", err)
	}
}

// After kill -9 there is nothing that steers, only ip rules to an empty
// table; Remove, or a start under other numbers, takes them away.
func TestKilledInstanceLeavesNearlyNothing(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"), labtest.Tool("ip"))
	for _, by := range []string{"cleanup", "start"} {
		t.Run(by, func(t *testing.T) {
			lab := labtest.New(t)
			w := &world{t: t, lab: lab, home: lab.Host("home")}
			h, ref := w.home, refOf(t, w.home)
			before := state(h)
			killed := lab.StartCommand(w.command(h, "steer"))
			labtest.Eventually(t, 5*time.Second, func() bool { return strings.Contains(killed.Output(), "ready") }, "instance")
			objects, err := steer.Find(ref)
			if err != nil || len(objects) != 4 {
				t.Errorf("Find: %v %v, want table, two rules, routes", objects, err)
			}
			for _, o := range objects {
				if !o.Alive || o.Instance != "101" {
					t.Errorf("Find: %+v, want it alive", o)
				}
			}
			if err := syscall.Kill(killed.Pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			killed.Wait()
			// Nothing of ours is left but the rules, and they lead nowhere.
			labtest.Eventually(t, 5*time.Second, func() bool { return !strings.Contains(state(h), "tun0") }, "device gone")
			if left := h.Run("nft", "list", "ruleset"); left != "" {
				t.Errorf("left after kill -9: %s", left)
			}
			labtest.Eventually(t, 5*time.Second, func() bool {
				routes := h.Run("ip", "route", "show", "table", "all") + h.Run("ip", "-6", "route", "show", "table", "all")
				return !strings.Contains(routes, "table 101") && h.Run("ip", "nexthop") == ""
			}, "routes gone with the device")
			objects, err = steer.Find(ref)
			if err != nil || len(objects) == 0 {
				t.Errorf("Find after kill -9: %v %v", objects, err)
			}
			for _, o := range objects {
				if o.Alive {
					t.Errorf("Find after kill -9: %+v is alive", o)
				}
			}
			if by == "cleanup" {
				if err := steer.Remove(ref, "101"); err != nil {
					t.Fatal(err)
				}
			} else {
				open(t, h, 202)
			}
			if after := state(h); after != before {
				t.Errorf("left:\n%s\nwas:\n%s", after, before)
			}
		})
	}
}

// kept calls Repair and Probe all the time until the test ends, as attach does
// where events say so, and collects what Repair says.
func kept(t *testing.T, s *steer.Steering) func() string {
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var said []string
	var work sync.WaitGroup
	work.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			if i%50 == 0 {
				_ = s.Probe()
			}
			if what, err := s.Repair(); what != "" || err != nil {
				mu.Lock()
				said = append(said, fmt.Sprint(what, " ", err))
				mu.Unlock()
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	t.Cleanup(func() {
		cancel()
		work.Wait()
	})
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return strings.Join(said, "; ")
	}
}

// Whatever others take away is put back, and said.
func TestTakenAwayIsPutBack(t *testing.T) {
	for _, owner := range []bool{true, false} {
		t.Run(fmt.Sprintf("owner %v", owner), func(t *testing.T) {
			h := host(t)
			s := open(t, h, 101)
			if !owner {
				s.WithoutOwner()
			}
			if err := s.Apply(plan()); err != nil {
				t.Fatal(err)
			}
			var feature *steer.FeatureError
			if errors.As(s.Missing(), &feature) == owner {
				t.Errorf("Missing() = %v", s.Missing())
			}
			before := state(h)
			injuries := []struct{ command, what string }{
				{"ip rule del pref 10101", "ip rules"},
				{"ip -6 rule del pref 10101", "ip rules"},
				{"ip route flush table 101", "routes"},
				{"ip -6 route flush table 101", "routes"},
			}
			if !owner {
				injuries = append(injuries, []struct{ command, what string }{
					{"nft flush ruleset", "nft table"},
					{"nft delete table inet cgtun_101", "nft table"},
					{"nft flush chain inet cgtun_101 out", "nft table"},
				}...)
			}
			for _, injury := range injuries {
				words := strings.Fields(injury.command)
				h.Run(words[0], words[1:]...)
				if what, err := s.Repair(); what != injury.what || err != nil {
					t.Errorf("%s: Repair said %q %v", injury.command, what, err)
				}
				if after := state(h); after != before {
					t.Errorf("after %s:\n%s\nwas:\n%s", injury.command, after, before)
				}
			}
			if owner {
				h.Run("nft", "flush", "ruleset")
				if after := state(h); after != before {
					t.Errorf("after nft flush ruleset:\n%s\nwas:\n%s", after, before)
				}
			}
			if what, err := s.Repair(); what != "" || err != nil {
				t.Errorf("nothing to do: Repair said %q %v", what, err)
			}
		})
	}
}

// What the kernel does not let go at first is tried again, and a later Close
// takes what the first could not.
func TestUndoIsTriedAgain(t *testing.T) {
	h := host(t)
	before := state(h)
	for _, fails := range []int{1, 4} {
		s := open(t, h, 101)
		if err := s.Apply(plan()); err != nil {
			t.Fatal(err)
		}
		s.FailUndo(fails)
		err := s.Close()
		if fails > 3 {
			if err == nil || !strings.Contains(err.Error(), "cgtun cleanup") {
				t.Errorf("Close: %v, want it to say what to do", err)
			}
			err = s.Close()
		}
		if err != nil {
			t.Errorf("Close: %v", err)
		}
		if after := state(h); after != before {
			t.Errorf("%d failures: left\n%s\nwas\n%s", fails, after, before)
		}
	}
}

// When the uplink gets another address, marked sockets have that from then on.
func TestSourceFollowsTheUplink(t *testing.T) {
	h := host(t)
	h.Run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	h.Run("ip", "link", "set", "up0", "up")
	h.Run("ip", "link", "set", "up1", "up")
	h.Run("ip", "addr", "add", "10.9.0.2/24", "dev", "up0")
	h.Run("ip", "route", "add", "default", "via", "10.9.0.1")
	s := open(t, h, 101)
	if err := s.Apply(plan()); err != nil {
		t.Fatal(err)
	}
	shown := func() string { return h.Run("ip", "route", "show", "table", "101") }
	if got := shown(); !strings.Contains(got, "src 10.9.0.2") {
		t.Errorf("at first: %s", got)
	}
	kept(t, s)
	labtest.Eventually(t, 5*time.Second, func() bool {
		h.Try("ip", "addr", "flush", "dev", "up0")
		h.Try("ip", "addr", "add", "10.9.0.3/24", "dev", "up0")
		h.Try("ip", "route", "add", "default", "via", "10.9.0.1")
		time.Sleep(100 * time.Millisecond)
		return strings.Contains(shown(), "default dev tun0 proto 197 scope link src 10.9.0.3")
	}, "new source")
}

// A long list of bypassed prefixes is one transaction, and is replaced by
// another in one.
func TestLongBypassList(t *testing.T) {
	h := host(t)
	s := open(t, h, 101)
	p := plan()
	for i := range 5000 {
		p.Bypass = append(p.Bypass,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), 0}), 25),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0xd, 0xb8, byte(i >> 8), byte(i)}), 48))
	}
	for range 2 {
		if err := s.Apply(p); err != nil {
			t.Fatal(err)
		}
		got := h.Run("nft", "list", "set", "inet", "cgtun_101", "by4")
		if n := strings.Count(got, "/25"); n != len(p.Bypass)/2 {
			t.Errorf("%d prefixes in the set, want %d", n, len(p.Bypass)/2)
		}
		p.Bypass = p.Bypass[:4000]
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
