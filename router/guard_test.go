package router_test

import (
	"context"
	"maps"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// guard denies one address.
type guard struct {
	denied  atomic.Pointer[netip.Addr]
	gone    atomic.Pointer[netip.Addr] // of this machine
	version atomic.Uint64
	leaves  []dialer.Leave // as it was asked last
}

func (g *guard) Judge(f *flow.Flow, leaves []dialer.Leave) error {
	g.leaves = leaves
	if a := g.denied.Load(); a != nil && *a == f.Dst.Addr() {
		return &flow.Denied{Kind: "loopback", Why: "it is one"}
	}
	return nil
}

func (g *guard) Version() uint64 { return g.version.Load() }

func (g *guard) Has(a netip.Addr) bool {
	gone := g.gone.Load()
	return gone == nil || a != *gone
}

func (g *guard) lose(a netip.Addr) {
	g.gone.Store(&a)
	g.version.Add(1)
}

func (g *guard) deny(a string) {
	addr := netip.MustParseAddr(a)
	g.denied.Store(&addr)
	g.version.Add(1)
}

// byMark is an outbound whose sockets leave in a way of their own.
type byMark struct{ *outbound }

func (byMark) Leaves() []dialer.Leave { return []dialer.Leave{{Mark: 7}} }

func TestGuardRefusesStreams(t *testing.T) {
	g := &guard{}
	g.deny("198.51.100.1")
	asked := 0
	out := &outbound{"up", func(context.Context, dialer.Target) (flow.Conn, error) { asked++; return nil, context.Canceled }}
	r := router.New(router.Options{Guard: g})
	set, err := rules.Compile([]rules.Config{{Use: "up"}})
	if err != nil {
		t.Fatal(err)
	}
	r.Reload(set, map[string]dialer.Outbound{"up": byMark{out}})
	c := newClient("198.51.100.1:80")
	wait(t, "end of the flow", serve(t, r, c))
	if accepted, why := c.told(t); accepted || why != flow.Refused {
		t.Errorf("client was told: accepted %v, %v; want a RST", accepted, why)
	}
	if asked != 0 || len(g.leaves) != 1 || g.leaves[0].Mark != 7 {
		t.Errorf("dialled %d times; guard was asked about %+v", asked, g.leaves)
	}
	if i := r.Flows()[0]; *i.Reason != "prohibited" {
		t.Errorf("table says %q", *i.Reason)
	}
	if n := r.Counters(); n.DeniedTotal != 1 || n.RefusedTotal != 0 || r.Outbounds()["up"].DialsTotal != 0 {
		t.Errorf("counters %+v, outbound %+v: a denial is no failure", n, r.Outbounds()["up"])
	}
	reload(t, r, []rules.Config{{Use: "reject"}})
	wait(t, "end of the flow", serve(t, r, newClient("198.51.100.2:80")))
	if got, want := r.Denials(), map[string]uint64{"loopback": 1, "rule": 1}; !maps.Equal(got, want) {
		t.Errorf("denials %v, want %v", got, want)
	}
	if _, _, path, err := r.Explain(&rules.Facts{Flow: newClient("198.51.100.1:80").flow}); err != nil || path != nil {
		t.Errorf("explain of a rejected flow: %v, %v", path, err)
	}
	reload(t, r, []rules.Config{{Use: "up"}}, out)
	if _, _, path, err := r.Explain(&rules.Facts{Flow: newClient("198.51.100.1:80").flow}); flow.ReasonOf(err) != flow.Prohibited || path != nil {
		t.Errorf("explain of a denied flow: %v, %v", path, err)
	}
}

func TestGuardRefusesDatagrams(t *testing.T) {
	g, out := &guard{}, newPacketOutbound("up")
	servePackets(t, router.Options{Guard: g}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, _ context.CancelFunc) {
			say := func(n int) { c.sent <- flow.Datagram{Peer: peerN(n), Data: []byte("x")}; synctest.Wait() }
			say(1)
			say(2)
			s := <-out.open
			<-s.out
			<-s.out
			// Home gets the address that one of them has been talking to.
			g.deny("192.0.2.1")
			say(1)
			say(2)
			if got := <-c.told; got.peer != peerN(1) || got.why != flow.Prohibited {
				t.Errorf("told %+v", got)
			}
			if d := <-s.out; d.Peer != peerN(2) || len(s.out) != 0 {
				t.Errorf("sent to %v, and %d more", d.Peer, len(s.out))
			}
			say(1) // remembered: told again, and not counted
			if len(c.told) != 1 || r.Counters().DeniedTotal != 1 {
				t.Errorf("told %d times more, %d denied", len(c.told), r.Counters().DeniedTotal)
			}
			if n := r.Outbounds()["up"]; n.FailuresTotal != 0 || r.Counters().FlowsTotal != 3 {
				t.Errorf("outbound %+v, counters %+v", n, r.Counters())
			}
		})
}

// A socket that is bound to an address which the machine has lost would send on
// for ever, and hear nothing.
func TestSocketEndsWithItsAddress(t *testing.T) {
	g, out := &guard{}, newPacketOutbound("up")
	out.local = netip.MustParseAddr("10.2.0.2")
	servePackets(t, router.Options{Guard: g}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(r *router.Router, c *packetClient, _ context.CancelFunc) {
			say := func() { c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("x")}; synctest.Wait() }
			say()
			first := <-out.open
			g.lose(netip.MustParseAddr("10.2.0.3")) // another one
			say()
			if len(first.out) != 2 || len(out.open) != 0 {
				t.Errorf("%d datagrams by the first socket, %d more sockets", len(first.out), len(out.open))
			}
			g.lose(out.local)
			say()
			select {
			case <-first.done:
			default:
				t.Error("the first socket is open")
			}
			if second := <-out.open; len(second.out) != 1 {
				t.Errorf("%d datagrams by the second socket", len(second.out))
			}
		})
}
