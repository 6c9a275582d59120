package policy_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/policy"
)

// The judge of a host with a gateway and containers of several kinds:
//
//	gate ──── eth0 ┐      ┌ docker0, br-0123456789ab, virbr9, mine
//	         default│ home │
//	               ┘      └ eth1 ──── attached (a namespace of ours)
//	                        eth2 ──── other    (not ours)
func TestWhereContainersAreIsNotReached(t *testing.T) {
	labtest.Need(t, labtest.Root)
	lab := labtest.New(t)
	home, gate, attached, other := lab.Host("home"), lab.Host("gate"), lab.Host("attached"), lab.Host("other")
	lab.Link(home, gate, "10.1.0.2/24", "10.1.0.1/24", "fd01::2/64", "fd01::1/64")
	lab.Link(home, attached, "10.2.0.1/24", "10.2.0.2/24")
	lab.Link(home, other, "10.3.0.1/24", "10.3.0.2/24")
	for _, s := range []string{
		"route add default via 10.1.0.1", "route add default via fd01::1",
		"link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "addr add fd17::1/64 dev docker0 nodad", "link set docker0 up",
		"link add br-0123456789ab type bridge", "addr add 172.18.0.1/16 dev br-0123456789ab", "link set br-0123456789ab up",
		"link add br-lan type bridge", "addr add 172.19.0.1/16 dev br-lan", "link set br-lan up",
		"link add virbr9 type bridge", "addr add 172.20.0.1/16 dev virbr9", "link set virbr9 up",
		"link add mine type bridge", "addr add 172.21.0.1/16 dev mine", "link set mine up",
		"link add lxcbr0 type bridge", "addr add 172.22.0.1/16 dev lxcbr0", "link set lxcbr0 up",
		"route add 198.51.100.0/24 via 172.17.0.2",
		"route add default via 172.22.0.2 dev lxcbr0 table 77",
		"route add local 198.18.7.0/24 dev lo",
		"rule add fwmark 5 lookup 55 priority 900", "route add 203.0.113.0/24 dev docker0 table 55",
		"rule add from 10.3.0.1 lookup 55 priority 901",
	} {
		home.Run("ip", strings.Fields(s)...)
	}
	number := 0
	err := home.Do(func() error {
		l, err := netlink.LinkByName("eth1")
		if err == nil {
			number = l.Attrs().NetNsID
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var j *policy.Judge
	o := policy.Options{
		Home: "home", Interfaces: []string{"virbr9"},
		Attached: func() map[int]bool { return map[int]bool{number: true} },
		Devices:  func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("198.18.3.1")} },
	}
	if err := home.Do(func() (err error) { j, err = policy.New(o); return err }); err != nil {
		t.Fatal(err)
	}
	judge := func(f *flow.Flow, leaves ...dialer.Leave) (err error) {
		_ = home.Do(func() error { err = j.Judge(f, leaves); return nil })
		return err
	}
	source := netip.MustParseAddr("10.3.0.1")
	for _, tt := range []struct {
		dst   string
		leave dialer.Leave
		kind  string
	}{
		{"203.0.113.1", dialer.Leave{}, ""}, {"2001:db8::1", dialer.Leave{}, ""}, {"10.1.0.1", dialer.Leave{}, ""},
		// What is local in home.
		{"10.1.0.2", dialer.Leave{}, "home"}, {"fd01::2", dialer.Leave{}, "home"}, {"10.2.0.1", dialer.Leave{}, "home"},
		{"172.17.0.1", dialer.Leave{}, "home"}, {"fd17::1", dialer.Leave{}, "home"}, {"198.18.7.9", dialer.Leave{}, "home"},
		{"10.1.0.255", dialer.Leave{}, "broadcast"}, {"64:ff9b::a01:2", dialer.Leave{}, "home"}, {"2002:ac11:1::", dialer.Leave{}, "home"},
		{"198.18.3.1", dialer.Leave{}, "tun"}, {"198.18.3.2", dialer.Leave{}, ""},
		{"10.1.0.2", dialer.Leave{Interface: "eth0"}, "home"},
		// What is behind the bridges of engines.
		{"172.17.0.2", dialer.Leave{}, "container"}, {"fd17::2", dialer.Leave{}, "container"}, {"172.18.5.5", dialer.Leave{}, "container"},
		{"::ffff:172.17.0.2", dialer.Leave{}, "container"}, {"64:ff9b::172.17.0.2", dialer.Leave{}, "container"}, {"198.51.100.1", dialer.Leave{}, "container"},
		{"172.19.0.2", dialer.Leave{}, ""}, {"172.21.0.2", dialer.Leave{}, ""},
		{"172.20.0.2", dialer.Leave{}, ""}, // an outbound names it
		{"172.22.0.2", dialer.Leave{}, ""}, // it carries a default route
		// What is behind the veth of an attached namespace.
		{"10.2.0.2", dialer.Leave{}, "container"}, {"10.3.0.2", dialer.Leave{}, ""},
		// By the routes of marks and sources.
		{"203.0.113.1", dialer.Leave{Mark: 5}, "container"}, {"203.0.113.1", dialer.Leave{Mark: 4}, ""},
		{"203.0.113.1", dialer.Leave{Source: source}, "container"}, {"203.0.113.1", dialer.Leave{Interface: "docker0", Mark: 5}, ""},
	} {
		for range 2 { // asked, and remembered
			if err := judge(to(tt.dst), tt.leave); kindOf(t, err) != tt.kind {
				t.Errorf("%s by %+v: got %v, want kind %q", tt.dst, tt.leave, err, tt.kind)
			}
		}
	}
	if err := judge(to("203.0.113.1"), dialer.Leave{}, dialer.Leave{Mark: 5}); kindOf(t, err) != "container" {
		t.Errorf("a group of which one member leads to containers: got %v", err)
	}

	// Home's own processes reach what they reach anyway, and nobody else does
	// who says so.
	own := flow.New(flow.TCP, netip.MustParseAddrPort("10.1.0.2:5"), netip.MustParseAddrPort("172.17.0.2:80"), "home")
	if err := judge(own, dialer.Leave{}); err != nil {
		t.Errorf("a process of home is denied: %v", err)
	}
	behind := flow.New(flow.TCP, netip.MustParseAddrPort("10.9.0.2:5"), own.Dst, "home")
	if err := judge(behind, dialer.Leave{}); kindOf(t, err) != "container" {
		t.Errorf("a machine behind an interface of home: got %v", err)
	}
	claims := flow.New(flow.TCP, own.Src, own.Dst, "netns-1")
	if err := judge(claims, dialer.Leave{}); kindOf(t, err) != "container" {
		t.Errorf("a container with an address of home: got %v", err)
	}

	// Changes count from the moment on that they are told of.
	home.Run("ip", "addr", "add", "10.1.0.77/24", "dev", "eth0")
	home.Run("ip", "link", "set", "mine", "name", "cni0")
	if err := judge(to("172.21.0.2"), dialer.Leave{}); err != nil {
		t.Fatalf("a change that nobody told of is known: %v", err)
	}
	was := j.Version()
	j.LookAgain()
	if j.Version() == was {
		t.Error("the version is the same after a change")
	}
	changed := func(when string) {
		t.Helper()
		for dst, kind := range map[string]string{"10.1.0.77": "home", "172.21.0.2": "container", "203.0.113.1": ""} {
			if err := judge(to(dst), dialer.Leave{}); kindOf(t, err) != kind {
				t.Errorf("%s, %s: got %v, want kind %q", dst, when, err, kind)
			}
		}
	}
	changed("before the next look")
	was = j.Version()
	labtest.Background(t, "judge", func(ctx context.Context) error { return home.Do(func() error { return j.Run(ctx) }) })
	labtest.Eventually(t, 5*time.Second, func() bool { return j.Version() != was }, "no look at home after a change")
	changed("after it")
	if !j.Has(netip.MustParseAddr("10.1.0.77")) || !j.Has(netip.MustParseAddr("::ffff:10.1.0.2")) || j.Has(netip.MustParseAddr("10.1.0.78")) {
		t.Error("it is not known which addresses home has")
	}
	if err := judge(to("10.1.0.77")); kindOf(t, err) != "home" {
		t.Errorf("an address that home got is not in the table: %v", err)
	}
}
