package router_test

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// asking is a resolver whose questions begin with a question mark.
type asking struct {
	router.Resolver
	ended error // how connections do
	names int
}

type way = func(netip.AddrPort, flow.Proto) (dialer.Outbound, error)

func (*asking) Takes(dst netip.AddrPort) bool { return dst.Port() == 53 }

func (a *asking) Name(*flow.Flow) (string, bool, bool) { a.names++; return "a.example", true, true }

func (*asking) Take(_ *flow.Flow, msg []byte, _ way) ([]byte, func(context.Context, func([]byte)), bool) {
	return []byte("answer"), nil, bytes.HasPrefix(msg, []byte("?"))
}

func (a *asking) Serve(context.Context, *flow.Flow, net.Conn, way) ([]byte, bool, error) {
	return nil, false, a.ended
}

// Of joined datagrams the questions are answered, and the others alone go on.
func TestJoinedQuestionsAreAnsweredAlone(t *testing.T) {
	out := newPacketOutbound("up")
	servePackets(t, router.Options{Resolver: &asking{}}, []rules.Config{{Use: "up"}}, map[string]dialer.Outbound{"up": out},
		func(_ *router.Router, c *packetClient, _ context.CancelFunc) {
			server := netip.MustParseAddrPort("192.0.2.53:53")
			c.sent <- flow.Datagram{Peer: server, Data: []byte("?one!two?six!ten!x"), Segment: 4}
			got := <-(<-out.open).out
			if string(got.Data) != "!two!ten!x" || got.Segment != 4 {
				t.Errorf("on went %q in parts of %d", got.Data, got.Segment)
			}
			for range 2 {
				if d := <-c.got; string(d.Data) != "answer" || d.Peer != server {
					t.Errorf("answered %q by %v", d.Data, d.Peer)
				}
			}
			if len(c.got) != 0 {
				t.Errorf("%d answers more", len(c.got))
			}
		})
}

// A connection of questions ends as its client has ended it.
func TestQuestionsEndForTheirReason(t *testing.T) {
	for _, tt := range []struct {
		ended error
		want  string
	}{{nil, "closed"}, {unix.ECONNRESET, "reset"}, {context.Canceled, "canceled"}} {
		r := router.New(router.Options{Resolver: &asking{ended: tt.ended}})
		reload(t, r, []rules.Config{{Use: "up"}}, failing("up", unix.ECONNREFUSED))
		wait(t, "end of the flow", serve(t, r, newClient("192.0.2.53:53")))
		if got := reasons(r); len(got) != 1 || got[0] != "192.0.2.53 closed "+tt.want {
			t.Errorf("ended with %v: %q, want %s", tt.ended, got, tt.want)
		}
	}
}

// The name of a destination is looked up once a flow.
func TestNameIsLookedUpOnce(t *testing.T) {
	known := &asking{}
	r := router.New(router.Options{Resolver: known})
	reload(t, r, []rules.Config{{Use: "up"}}, failing("up", unix.ECONNREFUSED))
	wait(t, "end of the flow", serve(t, r, newClient("192.0.2.1:443")))
	if known.names != 1 {
		t.Errorf("asked %d times", known.names)
	}
}
