package steer_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/steer"
)

// away applies a plan in the world's namespace as one that is not home.
func (w *world) away(p steer.Plan) *steer.Steering {
	w.t.Helper()
	s, err := steer.Open(refOf(w.t, w.home), "101")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := errors.Join(s.Undo(), s.Close()); err != nil {
			w.t.Error(err)
		}
	})
	if err := s.Apply(p); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// briefly is run for what nobody is to answer: it does not wait for long.
func briefly(run func(args ...string) string) func(args ...string) string {
	return func(args ...string) string { return run(append(args, "wait=300")...) }
}

// asks is who answers on each of the ways.
func asks(run func(args ...string) string) (answers string) {
	for _, way := range ways {
		answers += run("ask", way.network, way.server) + " "
	}
	return strings.TrimSpace(answers)
}

const (
	allBeyond = "beyond beyond beyond beyond"
	allUplink = "uplink uplink uplink uplink"
)

// A named namespace is captured as a whole, and only what its own programs
// send.
func TestWholeNamespaceTakesTheDevice(t *testing.T) {
	w := newWorld(t)
	p := w.plan()
	p.Cgroups, p.All = nil, true
	w.away(p)
	if got := asks(w.out); got != allBeyond {
		t.Errorf("in no cgroup: %s", got)
	}
	for _, addr := range []string{server4, server6} {
		if got, err := w.home.Try("ping", "-c1", "-W2", addr); err != nil {
			t.Errorf("ping %s: %s", addr, got)
		}
	}
	if n := w.leaks.Packets(); n != 0 {
		t.Errorf("%d packets by the uplink", n)
	}
	// Errors that the namespace reports as a router are no program's.
	before := w.pipe.packets()
	w.home.Forward()
	w.router.Run("ip", "route", "add", "192.0.2.0/24", "via", "10.9.0.2")
	w.home.Run("ip", "route", "add", "unreachable", "192.0.2.0/24")
	got, _ := w.far.Try("ping", "-c1", "-W5", "192.0.2.1")
	if !strings.Contains(got, "Unreachable") {
		t.Errorf("ping through the namespace: %s", got)
	}
	if n := w.pipe.packets() - before; n != 0 {
		t.Errorf("%d packets of the kernel's own in the device", n)
	}
}

// A family without a way out of the namespace stays as it is.
func TestOfflineFamilyStaysAsItIs(t *testing.T) {
	w := newWorld(t)
	p := w.plan()
	p.No6 = true
	s := w.away(p)
	want := "beyond beyond uplink uplink"
	for _, mark := range []string{"mark=0", "mark=101"} {
		got := asks(func(args ...string) string { return w.in(append(args, mark)...) })
		if got != want {
			t.Errorf("%s: %s, want %s", mark, got, want)
		}
	}
	if s.V6() {
		t.Error("V6() is true")
	}
	p.No4, p.No6 = true, false
	if err := s.Apply(p); err != nil {
		t.Fatal(err)
	}
	if got, want := asks(w.in), "uplink uplink beyond beyond"; got != want {
		t.Errorf("without v4: %s, want %s", got, want)
	}
}

// With closed a family without a way out is fenced by itself: it keeps what it had, and
// takes no default route that comes later, also when the device has gone.
func TestOfflineFamilyIsFenced(t *testing.T) {
	w := newWorld(t)
	w.home.Run("ip", "-6", "route", "del", "default")
	w.home.Run("ip", "route", "add", server6, "via", "fd09::1")
	p := w.plan()
	p.No6, p.Closed = true, true
	s := w.away(p)
	marked := func(args ...string) string { return w.in(append(args, "mark=101")...) }
	if got, want := asks(marked), "beyond beyond uplink uplink"; got != want {
		t.Errorf("with a route for v6: %s, want %s", got, want)
	}
	w.home.Run("ip", "route", "del", server6)
	w.home.Run("ip", "route", "add", "default", "via", "fd09::1")
	fenced := func(when, v4 string) {
		t.Helper()
		for _, in := range []func(args ...string) string{w.in, marked} {
			if got := asks(briefly(in)); !strings.HasPrefix(got, v4) || strings.Contains(got, "uplink") {
				t.Errorf("%s: %s", when, got)
			}
		}
		if got := briefly(marked)("ask", "tcp6", "["+server6+"]:7000", "dev="+w.uplink); got == "uplink" {
			t.Errorf("%s, bound to the uplink: %s", when, got)
		}
		if got := marked("ask", "tcp6", "[fd09::1]:9"); !strings.Contains(got, "refused") {
			t.Errorf("%s, bypassed: %s", when, got)
		}
		if got := asks(w.out); got != allUplink {
			t.Errorf("%s, others: %s", when, got)
		}
	}
	fenced("with a default route", "beyond beyond")
	if what, err := s.Repair(); what != "" || err != nil {
		t.Errorf("Repair of what is whole: %q, %v", what, err)
	}
	w.pipe.home.Close()
	labtest.Eventually(t, 10*time.Second, func() bool {
		_, err := w.home.Try("ip", "link", "show", "tun0")
		return err != nil
	}, "device gone")
	fenced("after death", "")
	w.revive()
	p.No6 = false
	if err := s.Apply(p); err != nil {
		t.Fatal(err)
	}
	if got := asks(w.in); got != allBeyond {
		t.Errorf("captured: %s", got)
	}
}

// In a namespace without a way out what is marked goes as it did, but by no default
// route that comes later, until that is steered, or the fence removed.
func TestOfflineTakesNoDefaultRoute(t *testing.T) {
	w := newWorld(t)
	w.pipe.home.Close()
	w.home.Run("ip", "route", "del", "default")
	w.home.Run("ip", "-6", "route", "del", "default")
	w.home.Run("ip", "route", "add", server4, "via", "10.9.0.1")
	before := state(w.home)
	p := w.plan()
	p.Device, p.No4, p.No6, p.Closed = "", true, true, true
	s := w.away(p)
	marked := func(args ...string) string { return w.in(append(args, "mark=101")...) }
	if got := asks(marked); strings.Count(got, "uplink") != 2 || strings.Count(got, "unreachable")+strings.Count(got, "no route") != 2 {
		t.Errorf("with a route for v4: %s", got)
	}
	w.home.Run("ip", "route", "del", server4)
	w.home.Run("ip", "route", "add", "default", "via", "10.9.0.1")
	w.home.Run("ip", "route", "add", "default", "via", "fd09::1")
	if got := asks(marked); strings.Contains(got, "uplink") {
		t.Errorf("with default routes: %s", got)
	}
	bound := func(args ...string) string { return marked(append(args, "dev="+w.uplink)...) }
	if got := asks(briefly(bound)); strings.Contains(got, "uplink") {
		t.Errorf("bound to the uplink: %s", got)
	}
	if got := asks(briefly(w.in)); strings.Contains(got, "uplink") {
		t.Errorf("selected by the table alone: %s", got)
	}
	if got := marked("ask", "tcp4", "10.9.0.1:9"); !strings.Contains(got, "refused") {
		t.Errorf("bypassed: %s", got)
	}
	if got := asks(w.out); got != allUplink {
		t.Errorf("others: %s", got)
	}
	if what, err := s.Repair(); what != "" || err != nil {
		t.Errorf("Repair of what is whole: %q, %v", what, err)
	}
	w.home.Run("nft", "flush", "ruleset")
	w.home.Run("ip", "rule", "del", "pref", "10101")
	if what, err := s.Repair(); what == "" || err != nil {
		t.Errorf("Repair: %q, %v", what, err)
	}
	if got := asks(marked); strings.Contains(got, "uplink") {
		t.Errorf("put back: %s", got)
	}
	objects, err := steer.Find(refOf(t, w.home))
	if err != nil || len(objects) < 4 {
		t.Fatalf("Find: %v %v", objects, err)
	}
	for _, o := range objects {
		if o.Instance != "101" || !o.Closed || o.Home == 0 {
			t.Errorf("Find: %+v", o)
		}
	}
	// The steering of a way out takes its place.
	w.revive()
	p = w.plan()
	p.Closed = true
	if err := w.away(p).Undo(); err != nil {
		t.Fatal(err)
	}
	w.pipe.home.Close()
	w.home.Run("ip", "route", "del", "default")
	w.home.Run("ip", "-6", "route", "del", "default")
	w.home.Run("ip", "route", "add", server4, "via", "10.9.0.1")
	labtest.Eventually(t, 10*time.Second, func() bool { return state(w.home) == before }, "the state is as it was")
}

// When the process is gone, and the device with it, an open table in a
// namespace marks for nothing; a closed one blocks.
func TestTableThatOutlivesUs(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(map[bool]string{false: "open", true: "closed"}[closed], func(t *testing.T) {
			w := newWorld(t)
			p := w.plan()
			p.Closed = closed
			w.away(p)
			if got := asks(w.in); got != allBeyond {
				t.Fatalf("at first: %s", got)
			}
			w.pipe.home.Close()
			labtest.Eventually(t, 10*time.Second, func() bool {
				_, err := w.home.Try("ip", "link", "show", "tun0")
				return err != nil
			}, "device gone")
			in := w.in
			if closed {
				in = briefly(w.in)
			}
			got := asks(in)
			switch n := w.leaks.Packets(); {
			case !closed && got != allUplink:
				t.Errorf("after death: %s", got)
			case closed && (n != 0 || strings.Contains(got, "uplink")):
				t.Errorf("after death: %s, and %d packets by the uplink", got, n)
			}
			if got := asks(w.out); got != allUplink {
				t.Errorf("others: %s", got)
			}
			// The next start finds it, and knows it for its own.
			objects, err := steer.Find(refOf(t, w.home))
			if err != nil || len(objects) < 3 {
				t.Fatalf("Find: %v %v", objects, err)
			}
			for _, o := range objects {
				if o.Alive || o.Home == 0 || o.Closed != closed {
					t.Errorf("Find: %+v", o)
				}
			}
			w.revive()
			w.away(p)
			if got := asks(w.in); got != allBeyond {
				t.Errorf("after the next start: %s", got)
			}
		})
	}
}

// What others take away is back when Repair is asked, and only that is said.
func TestRepairAway(t *testing.T) {
	h := host(t)
	p := plan()
	p.All = true
	before := state(h)
	s, err := steer.Open(refOf(t, h), "101")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Apply(p); err != nil {
		t.Fatal(err)
	}
	want := state(h)
	for _, injury := range []struct{ command, what string }{
		{"true", ""},
		{"ip rule del pref 10101", "ip rules"},
		{"ip -6 rule del pref 10101", "ip rules"},
		{"ip route flush table 101", "routes"},
		{"ip -6 route flush table 101", "routes"},
		{"nft flush ruleset", "nft table"},
		{"nft flush chain inet cgtun_101 out", "nft table"},
		{"nft delete table inet cgtun_101", "nft table"},
	} {
		words := strings.Fields(injury.command)
		h.Run(words[0], words[1:]...)
		if what, err := s.Repair(); what != injury.what || err != nil {
			t.Errorf("%s: Repair said %q %v", injury.command, what, err)
		}
		if got := state(h); got != want {
			t.Errorf("%s: left\n%s\nwant\n%s", injury.command, got, want)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := state(h); got != before {
		t.Errorf("after Close:\n%s\nbefore:\n%s", got, before)
	}
}

// A steered namespace ends with its last process, and that is no error.
func TestNamespaceIsNotPinned(t *testing.T) {
	var s *steer.Steering
	t.Run("life", func(t *testing.T) {
		h := host(t)
		h.LeavesBehind()
		var err error
		if s, err = steer.Open(refOf(t, h), "101"); err != nil {
			t.Fatal(err)
		}
		p := plan()
		p.All = true
		if err := s.Apply(p); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Repair(); err != nil {
			t.Fatal(err)
		}
		// The lab ends with this function, and asserts that it could.
	})
	if _, err := s.Repair(); !errors.Is(err, netns.ErrGone) {
		t.Errorf("Repair: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// A mark or a table that somebody in the namespace uses is named, and a second
// instance is, too.
func TestTakenAway(t *testing.T) {
	h := host(t)
	s, err := steer.Open(refOf(t, h), "101")
	if err != nil {
		t.Fatal(err)
	}
	p := plan()
	h.Run("ip", "rule", "add", "pref", "50", "fwmark", "101", "lookup", "7")
	before := state(h)
	var taken *steer.TakenError
	if err := s.Apply(p); !errors.As(err, &taken) || taken.What != "mark 0x65/0xffffffff" {
		t.Errorf("mark: %v", err)
	}
	if got := state(h); got != before {
		t.Errorf("state has changed:\n%s\nwas:\n%s", got, before)
	}
	p.Via = steer.Via{Dev: "tun0"}
	if err := s.Apply(p); err == nil {
		t.Error("a way of the kernel was accepted in another namespace")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// What Repair costs when there is nothing to do.
func BenchmarkRepairAway(b *testing.B) {
	labtest.Need(b, labtest.Root)
	h := labtest.New(b).Host("away")
	h.Run("ip", "tuntap", "add", "tun0", "mode", "tun")
	h.Run("ip", "link", "set", "tun0", "up")
	defer h.Run("ip", "link", "del", "tun0")
	s, err := steer.Open(refOf(b, h), "101")
	if err != nil {
		b.Fatal(err)
	}
	p := plan()
	p.All = true
	p.Bypass = []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16")}
	if err := s.Apply(p); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if what, err := s.Repair(); what != "" || err != nil {
			b.Fatal(what, err)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}
