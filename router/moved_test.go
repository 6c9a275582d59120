package router_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// pathsOut is a group as the router sees one: it takes the first path that the
// target does not avoid.
type pathsOut struct {
	*packetOutbound
	paths []string
}

func (o *pathsOut) Outbounds() []string { return o.paths }

func (o *pathsOut) OpenPackets(ctx context.Context, t dialer.Target) (*dialer.PacketConn, error) {
	for _, p := range o.paths {
		if !slices.Contains(t.Avoid, p) {
			c, err := o.packetOutbound.OpenPackets(ctx, t)
			c.Path = []string{p}
			return c, err
		}
	}
	return nil, &dialer.Error{Hop: o.name, Reason: flow.HostUnreachable, Err: unix.EHOSTUNREACH}
}

// lastPath is the path of the flow that was opened last.
func lastPath(r *router.Router) string {
	flows := r.Flows()
	return flows[len(flows)-1].Path[0]
}

func TestDatagramsLeaveASilentPath(t *testing.T) {
	out := &pathsOut{newPacketOutbound("group"), []string{"a", "b"}}
	servePackets(t, router.Options{}, []rules.Config{{Use: "group"}}, map[string]dialer.Outbound{"group": out},
		func(r *router.Router, c *packetClient, cancel context.CancelFunc) {
			say := func() { c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("x")} }
			say()
			first := <-out.open
			<-first.out
			first.in <- flow.Datagram{Peer: peerN(1), Data: []byte("y")}
			<-c.got
			// Answered: silence of both sides says nothing.
			time.Sleep(time.Minute)
			say()
			<-first.out
			time.Sleep(time.Second)
			say()
			<-first.out
			if got := lastPath(r); got != "a" {
				t.Errorf("after a second without an answer: %q", got)
			}
			time.Sleep(1500 * time.Millisecond)
			say()
			second := <-out.open
			<-second.out
			if got := lastPath(r); got != "b" {
				t.Errorf("after two seconds without an answer: %q", got)
			}
			// Both silent: it goes back, after a longer time.
			time.Sleep(3 * time.Second)
			say()
			<-second.out
			time.Sleep(2 * time.Second)
			say()
			third := <-out.open
			<-third.out
			if got := lastPath(r); got != "a" {
				t.Errorf("when both are silent: %q", got)
			}
			// An answer: it is as quick as at first.
			third.in <- flow.Datagram{Peer: peerN(1), Data: []byte("y")}
			<-c.got
			say()
			<-third.out
			time.Sleep(2500 * time.Millisecond)
			say()
			<-(<-out.open).out
			if got := lastPath(r); got != "b" {
				t.Errorf("two seconds after an answer: %q", got)
			}
		})
}

func TestDatagramsLeaveALostPath(t *testing.T) {
	out := &pathsOut{newPacketOutbound("group"), []string{"a", "b"}}
	servePackets(t, router.Options{}, []rules.Config{{Use: "group"}}, map[string]dialer.Outbound{"group": out},
		func(r *router.Router, c *packetClient, cancel context.CancelFunc) {
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("x")}
			first := <-out.open
			<-first.out
			first.fail(&flow.PeerError{Peer: peerN(1), Reason: flow.NetUnreachable, Err: unix.ENETUNREACH})
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("lost")}
			c.sent <- flow.Datagram{Peer: peerN(1), Data: []byte("x")}
			<-(<-out.open).out
			if got := lastPath(r); got != "b" || len(c.told) != 0 {
				t.Errorf("%q, and the client was told %d times", got, len(c.told))
			}
		})
}
