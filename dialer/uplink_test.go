package dialer_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// uplinks is a client with two uplinks, and a server that is far behind both:
//
//	        eth0 10.1.0.1 ─── 10.1.0.2 eth0
//	client                                   router eth2 10.9.0.1 ─── 10.9.0.2 server
//	        eth1 10.2.0.1 ─── 10.2.0.2 eth1         fd09::1           lo 198.51.100.1
//	      fd02::1             fd02::2                                    2001:db8:f::1
//
// The client's default route is that by eth0. Nobody answers ARP for the
// server's far addresses.
type uplinks struct {
	client, router, server *labtest.Host
	first, second          *labtest.Link
	served                 *labtest.Server
}

const (
	far4 = "198.51.100.1:7000"
	far6 = "[2001:db8:f::1]:7000"
)

func newUplinks(t *testing.T) *uplinks {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"), labtest.Tool("nft"))
	lab := labtest.New(t)
	u := &uplinks{client: lab.Host("client"), router: lab.Host("router"), server: lab.Host("server")}
	u.router.Forward()
	u.first = lab.Link(u.client, u.router, "10.1.0.1/24", "10.1.0.2/24", "fd01::1/64", "fd01::2/64")
	u.second = lab.Link(u.client, u.router, "10.2.0.1/24", "10.2.0.2/24", "fd02::1/64", "fd02::2/64")
	back := lab.Link(u.router, u.server, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	for _, cmd := range []string{"addr add 198.51.100.1/32 dev lo", "addr add 2001:db8:f::1/128 dev lo nodad",
		"route add default via 10.9.0.1 dev " + back.B, "-6 route add default via fd09::1 dev " + back.B} {
		u.server.Run("ip", strings.Fields(cmd)...)
	}
	u.router.Run("ip", "route", "add", "198.51.100.1", "via", "10.9.0.2")
	u.router.Run("ip", "route", "add", "2001:db8:f::1", "via", "fd09::2")
	u.ip("route add default via 10.1.0.2")
	u.ip("-6 route add default via fd01::2")
	u.served = u.server.ServeEcho(":7000")
	return u
}

// ip runs ip(8) in the client's namespace; IF1 and IF2 are the uplinks.
func (u *uplinks) ip(cmd string) {
	u.client.Run("ip", strings.Fields(u.name(cmd))...)
}

func (u *uplinks) name(text string) string {
	return strings.NewReplacer("IF1", u.first.A, "IF2", u.second.A).Replace(text)
}

// direct makes an outbound; IF1 and IF2 are the uplinks.
func (u *uplinks) direct(t *testing.T, c dialer.Config, capture ...dialer.Mark) *dialer.Direct {
	t.Helper()
	c.Name, c.Type, c.Interface = "up", dialer.TypeDirect, u.name(c.Interface)
	d, err := dialer.NewDirect(c, capture...)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// dial connects in the client's namespace and returns the own address.
func (u *uplinks) dial(d *dialer.Direct, addr string) (from netip.Addr, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err = u.client.Do(func() error {
		c, err := d.DialStream(ctx, dialer.Target{Addr: netip.MustParseAddrPort(addr)})
		if err != nil {
			return err
		}
		from = netip.MustParseAddrPort(c.LocalAddr().String()).Addr()
		// By RST: a conn that lingers would look its route up again when the
		// test takes it away.
		return c.Reset()
	})
	return from, err
}

func (u *uplinks) state(t *testing.T, d *dialer.Direct) (up bool, reason string) {
	t.Helper()
	if err := u.client.Do(func() error { up, reason = d.State(); return nil }); err != nil {
		t.Fatal(err)
	}
	return up, reason
}

// asked says whether a far address was asked for by ARP or ND on an uplink.
func (u *uplinks) asked() string {
	return u.client.Run("ip", "neigh", "show", "to", "198.51.100.0/24", "nud", "all") +
		u.client.Run("ip", "neigh", "show", "to", "2001:db8:f::/64", "nud", "all")
}

func TestInterfaceLeavesByItsOwnGateway(t *testing.T) {
	tests := []struct {
		name  string
		setup string // what ip does before, one command a line
		c     dialer.Config
		want  [2]string // own address for v4 and v6; empty: no way
	}{
		{"main table", "route add default via 10.2.0.2 metric 500\n-6 route add default via fd02::2 metric 5000",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", "fd02::1"}},
		{"rule from the address", "route add default via 10.2.0.2 table 100\n-6 route add default via fd02::2 table 100\n" +
			"rule add from 10.2.0.1 lookup 100\n-6 rule add from fd02::/64 lookup 100",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", "fd02::1"}},
		{"rule for a mark", "route add default via 10.2.0.2 table 100\n-6 route add default via fd02::2 table 100\n" +
			"rule add fwmark 7 lookup 100\n-6 rule add fwmark 7 lookup 100",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", "fd02::1"}},
		{"rule for an address and a mark", "route add default via 10.2.0.2 table 100\nrule add from 10.2.0.1 fwmark 7 lookup 100",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", ""}},
		{"rule for the interface", "route add default via 10.2.0.2 table 100\n-6 route add default via fd02::2 table 100\n" +
			"rule add oif IF2 lookup 100\n-6 rule add oif IF2 lookup 100",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", "fd02::1"}},
		{"a gateway to some places", "route add 198.51.100.0/24 via 10.2.0.2", dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", ""}},
		{"multipath", "route replace default nexthop via 10.1.0.2 nexthop via 10.2.0.2",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", ""}},
		{"v4 alone", "route add default via 10.2.0.2 metric 500", dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.1", ""}},
		{"second address", "addr add 10.2.0.7/24 dev IF2\nroute add default via 10.2.0.2 table 100\nrule add from 10.2.0.7 lookup 100",
			dialer.Config{Interface: "IF2"}, [2]string{"10.2.0.7", ""}},
		{"with a source", "addr add 10.2.0.7/24 dev IF2\nroute add default via 10.2.0.2 metric 500",
			dialer.Config{Interface: "IF2", Source: netip.MustParseAddr("10.2.0.7")}, [2]string{"10.2.0.7", ""}},
		{"the first one", "route add default via 10.2.0.2 metric 500", dialer.Config{Interface: "IF1"}, [2]string{"10.1.0.1", "fd01::1"}},
		{"any: the main table", "route add default via 10.2.0.2 metric 500", dialer.Config{}, [2]string{"10.1.0.1", "fd01::1"}},
		{"source alone, by its rule", "route add default via 10.2.0.2 table 100\nrule add from 10.2.0.1 lookup 100",
			dialer.Config{Source: netip.MustParseAddr("10.2.0.1")}, [2]string{"10.2.0.1", ""}},
		{"mark alone, by its rule", "route add default via 10.2.0.2 table 100\nrule add fwmark 7 lookup 100",
			dialer.Config{Mark: 7}, [2]string{"10.2.0.1", "fd01::1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := newUplinks(t)
			for cmd := range strings.Lines(tt.setup) {
				u.ip(cmd)
			}
			d := u.direct(t, tt.c)
			if up, reason := u.state(t, d); !up {
				t.Errorf("down: %s", reason)
			}
			for i, addr := range []string{far4, far6} {
				for range 2 { // the second time by what was learnt at the first
					from, err := u.dial(d, addr)
					switch {
					case tt.want[i] == "" && flow.ReasonOf(err) != flow.NetUnreachable:
						t.Errorf("%s: got %v, %v; want it unreachable", addr, from, err)
					case tt.want[i] != "" && (err != nil || from.String() != tt.want[i]):
						t.Errorf("%s: left from %v, %v; want %s", addr, from, err, tt.want[i])
					}
				}
			}
			if neighbours := u.asked(); neighbours != "" {
				t.Errorf("far addresses were asked for on the link: %s", neighbours)
			}
		})
	}
}

func TestInterfaceWithoutAWayIsDownWithAReason(t *testing.T) {
	tests := []struct {
		name, setup string
		c           dialer.Config
		want        string
	}{
		{"no gateway", "", dialer.Config{Interface: "IF2"}, "no gateway is known through IF2; try: "},
		{"a gateway that no rule leads to", "route add default via 10.2.0.2 table 100", dialer.Config{Interface: "IF2"},
			"the gateway 10.2.0.2 of IF2 is in table 100, to which no ip rule leads; try: ip rule add oif IF2 lookup 100"},
		{"a route of cgtun's own", "route add default via 10.2.0.2 table 100 protocol 197\nrule add from 10.2.0.1 lookup 100",
			dialer.Config{Interface: "IF2"}, "no gateway is known through IF2"},
		{"a rule for the mark that captures", "route add default via 10.2.0.2 table 100\nrule add fwmark 101 lookup 100",
			dialer.Config{Interface: "IF2"}, "the gateway 10.2.0.2 of IF2 is in table 100"},
		{"no such interface", "", dialer.Config{Interface: "eth9"}, "there is no interface eth9"},
		{"interface down", "link set IF2 down", dialer.Config{Interface: "IF2"}, "interface IF2 is down; try: ip link set IF2 up"},
		{"no such address", "", dialer.Config{Source: netip.MustParseAddr("10.7.7.7")}, "this machine has no address 10.7.7.7"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := newUplinks(t)
			u.client.LeavesBehind() // a route of our protocol number, made by hand
			for cmd := range strings.Lines(tt.setup) {
				u.ip(cmd)
			}
			d := u.direct(t, tt.c, dialer.Mark{Value: 101, Mask: 0xffffffff})
			if up, reason := u.state(t, d); up || !strings.HasPrefix(reason, u.name(tt.want)) {
				t.Errorf("got up %v, %q; want down, %q", up, reason, u.name(tt.want))
			}
			began := time.Now()
			from, err := u.dial(d, far4)
			if flow.ReasonOf(err) != flow.NetUnreachable {
				t.Errorf("left from %v, %v; want it unreachable", from, err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("said so after %v, want at once", took)
			}
			if neighbours := u.asked(); neighbours != "" {
				t.Errorf("far addresses were asked for on the link: %s", neighbours)
			}
		})
	}
}

func TestInterfaceWithoutCarrierIsDown(t *testing.T) {
	u := newUplinks(t)
	u.ip("route add default via 10.2.0.2 metric 500")
	d := u.direct(t, dialer.Config{Interface: "IF2"})
	if up, reason := u.state(t, d); !up {
		t.Fatalf("down at first: %s", reason)
	}
	u.router.Run("ip", "link", "set", u.second.B, "down")
	labtest.Eventually(t, 5*time.Second, func() bool {
		up, reason := u.state(t, d)
		return !up && reason == u.name("interface IF2 has no carrier")
	}, "down for want of a carrier")
	if _, err := u.dial(d, far4); flow.ReasonOf(err) != flow.NetUnreachable {
		t.Errorf("dial: %v", err)
	}
	u.router.Run("ip", "link", "set", u.second.B, "up")
	labtest.Eventually(t, 5*time.Second, func() bool { up, _ := u.state(t, d); return up }, "up again")
	if from, err := u.dial(d, far4); err != nil || from.String() != "10.2.0.1" {
		t.Errorf("dial after the carrier came back: %v, %v", from, err)
	}
}

func TestNeighboursOfAnInterfaceNeedNoGateway(t *testing.T) {
	u := newUplinks(t)
	u.router.ServeEcho("10.2.0.2:7000")
	if from, err := u.dial(u.direct(t, dialer.Config{Interface: "IF2"}), "10.2.0.2:7000"); err != nil || from.String() != "10.2.0.1" {
		t.Errorf("got %v, %v", from, err)
	}
}

// The way that worked last is not kept when the gateway goes.
func TestInterfaceFollowsItsRoutes(t *testing.T) {
	u := newUplinks(t)
	d := u.direct(t, dialer.Config{Interface: "IF2"})
	u.ip("route add default via 10.2.0.2 table 100")
	u.ip("rule add from 10.2.0.1 lookup 100")
	if _, err := u.dial(d, far4); err != nil {
		t.Fatal(err)
	}
	u.ip("rule del from 10.2.0.1 lookup 100")
	if from, err := u.dial(d, far4); flow.ReasonOf(err) != flow.NetUnreachable {
		t.Errorf("without the rule: left from %v, %v; want it unreachable", from, err)
	}
	u.ip("route add default via 10.2.0.2 metric 500")
	if from, err := u.dial(d, far4); err != nil || from.String() != "10.2.0.1" {
		t.Errorf("by the main table: %v, %v", from, err)
	}
	if neighbours := u.asked(); neighbours != "" {
		t.Errorf("far addresses were asked for on the link: %s", neighbours)
	}
}

// RELIABILITY O3: own sockets follow the main table's default route.
func TestOwnSocketsFollowTheDefaultRoute(t *testing.T) {
	u := newUplinks(t)
	d := u.direct(t, dialer.Config{})
	for i := range 100 {
		want := "10.1.0.1"
		if i >= 50 {
			want = "10.2.0.1"
		}
		if i == 50 {
			u.ip("route replace default via 10.2.0.2")
		}
		if from, err := u.dial(d, far4); err != nil || from.String() != want {
			t.Fatalf("dial %d: left from %v, %v; want %s", i, from, err, want)
		}
	}
	labtest.Eventually(t, 5*time.Second, func() bool { return len(u.served.Clients()) == 100 }, "the server saw all of them")
}

func TestFailureIsTold(t *testing.T) {
	u := newUplinks(t)
	u.ip("route add prohibit 192.0.2.1")
	u.ip("route add unreachable 192.0.2.2")
	u.router.Run("ip", "route", "add", "prohibit", "192.0.2.3")
	u.router.Run("ip", "route", "add", "unreachable", "192.0.2.4")
	u.router.Run("ip", "route", "add", "blackhole", "192.0.2.5")
	tests := []struct {
		name, addr string
		c          dialer.Config
		want       flow.Reason
		op         string
	}{
		{"refused", "198.51.100.1:7001", dialer.Config{}, flow.Refused, "connect"},
		{"refused, v6", "[2001:db8:f::1]:7001", dialer.Config{}, flow.Refused, "connect"},
		{"prohibited here", "192.0.2.1:80", dialer.Config{}, flow.Prohibited, "connect"},
		{"unreachable here", "192.0.2.2:80", dialer.Config{}, flow.HostUnreachable, "connect"},
		{"prohibited on the way", "192.0.2.3:80", dialer.Config{}, flow.HostUnreachable, "connect"}, // Linux tells no more
		{"unreachable on the way", "192.0.2.4:80", dialer.Config{}, flow.HostUnreachable, "connect"},
		{"silence", "192.0.2.5:80", dialer.Config{}, flow.TimedOut, "connect"},
		{"no such source", far4, dialer.Config{Source: netip.MustParseAddr("10.7.7.7")}, flow.NetUnreachable, "bind"},
		{"source of the other family", far6, dialer.Config{Source: netip.MustParseAddr("10.1.0.1")}, flow.NetUnreachable, "route"},
		{"no gateway", far4, dialer.Config{Interface: "IF2"}, flow.NetUnreachable, "route"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := u.direct(t, tt.c)
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			err := u.client.Do(func() error {
				c, err := d.DialStream(ctx, dialer.Target{Addr: netip.MustParseAddrPort(tt.addr)})
				if err == nil {
					_ = c.Close()
				}
				return err
			})
			var failed *dialer.Error
			if !errors.As(err, &failed) {
				t.Fatalf("got %v, want a *dialer.Error", err)
			}
			if failed.Reason != tt.want || failed.Op != tt.op || failed.Hop != "up" || failed.Addr.String() != tt.addr {
				t.Errorf("got reason %q, op %s: %v; want %q, %s", failed.Reason, failed.Op, err, tt.want, tt.op)
			}
		})
	}
}

func TestClientThatGivesUpEndsTheDial(t *testing.T) {
	u := newUplinks(t)
	u.router.Run("ip", "route", "add", "blackhole", "192.0.2.5")
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	err := u.client.Do(func() error {
		_, err := u.direct(t, dialer.Config{}).DialStream(ctx, dialer.Target{Addr: netip.MustParseAddrPort("192.0.2.5:80")})
		return err
	})
	if flow.ReasonOf(err) != flow.Canceled {
		t.Errorf("got %v, want canceled", err)
	}
}

// A path that dies is found within 15 s: the options that see to it are on.
func TestOutboundSocketsNoticeADeadPath(t *testing.T) {
	u := newUplinks(t)
	d := u.direct(t, dialer.Config{Mark: 9})
	var got string
	err := u.client.Do(func() error {
		c, err := d.DialStream(context.Background(), dialer.Target{Addr: netip.MustParseAddrPort(far4)})
		if err != nil {
			return err
		}
		defer c.Close()
		tcp, ok := c.Conn.(interface{ TCP() *net.TCPConn })
		if !ok {
			return fmt.Errorf("the conn hides its socket: %T", c.Conn)
		}
		got, err = options(tcp.TCP())
		return err
	})
	if want := "keepalive 1: 5 s, 3 s, 3; user timeout 14000 ms; nodelay 1; mark 9"; err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

// Of a peer that has nothing to say the kernel knows that it is there; of one that
// nothing comes back from it says so, seconds before the connection ends.
func TestPulse(t *testing.T) {
	t.Parallel()
	u := newUplinks(t)
	d := u.direct(t, dialer.Config{})
	var c *dialer.Conn
	err := u.client.Do(func() (err error) {
		c, err = d.DialStream(t.Context(), dialer.Target{Addr: netip.MustParseAddrPort(far4)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	socket := flow.Socket(c.Conn)
	time.Sleep(time.Second)
	var p dialer.Pulse
	if err := p.Ask(socket); err != nil {
		t.Fatal(err)
	}
	const looks, every = 25, 100 * time.Millisecond
	for i := range looks {
		time.Sleep(every)
		if p.Dead(socket) {
			t.Errorf("after %v a peer that is there is taken for dead", time.Duration(i+1)*every)
		}
	}
	began := time.Now()
	u.router.Run("nft", "add table inet hole; add chain inet hole f { type filter hook forward priority 0; }; add rule inet hole f drop")
	labtest.Eventually(t, 10*time.Second, func() bool { return p.Dead(socket) }, "the path is dead")
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("after %v the path is taken for dead", took)
	}
	u.router.Run("nft", "delete table inet hole")
	labtest.Eventually(t, 10*time.Second, func() bool { return !p.Dead(socket) }, "it is back")
	p.Rest(socket)
	if got, _ := options(socket); !strings.HasPrefix(got, "keepalive 1: 5 s, 3 s, 3;") {
		t.Errorf("at rest: %q", got)
	}
}
