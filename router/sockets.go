package router

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/relay"
)

// The sockets of a source of datagrams: from the first datagram that needs one to
// their end.

// outKey: each outbound has one socket a family.
type outKey struct {
	outbound dialer.Outbound
	v6       bool
}

// packetOut is an open outbound socket.
type packetOut struct {
	key  outKey
	conn *dialer.PacketConn
	dead atomic.Bool
	// places are taken for its sockets.
	places int
	opened time.Time

	movable bool // there are other paths
	silence silence
}

// open returns the socket of an outbound for the family of e's destination.
func (s *source) open(ctx context.Context, outbound dialer.Outbound, e *entry) (*packetOut, error) {
	key := outKey{outbound: outbound, v6: e.flow.Dst.Addr().Is6()}
	s.mu.Lock()
	out, fell := s.outs[key], s.fell[key]
	s.mu.Unlock()
	if out != nil && !out.dead.Load() {
		return out, nil
	}
	if time.Since(fell) < failedFor {
		return nil, &dialer.Error{Hop: outbound.Name(), Op: "open", Reason: flow.HostUnreachable, Err: errFell}
	}
	if err := s.r.takeSocket(); err != nil {
		return nil, err
	}
	var conn *dialer.PacketConn
	dial := outbound.OpenPackets
	if e.flow.Proto == flow.ICMP {
		dial = func(ctx context.Context, t dialer.Target) (*dialer.PacketConn, error) {
			return dialer.OpenEcho(ctx, outbound, t)
		}
	}
	s.client.Begun()
	err := s.r.inFlight(ctx, time.Now().Add(s.r.opts.Deadline), e.flow, func(ctx context.Context) (err error) {
		conn, err = s.openAway(ctx, key, e.target(), dial)
		return err
	})
	if err != nil {
		s.r.giveSockets(1)
		return nil, err
	}
	if w := s.r.ways.find(outbound.Name()); w != nil {
		w.dials.Add(1) // its time says nothing: nobody was asked
	}
	out = &packetOut{key: key, conn: conn, places: 1, opened: time.Now(), movable: movable(outbound)}
	for ; out.places < conn.Sockets; out.places++ {
		if err := s.r.takeSocket(); err != nil {
			s.r.giveSockets(out.places)
			conn.Close()
			return nil, err
		}
	}
	s.mu.Lock()
	s.outs[key] = out
	s.mu.Unlock()
	s.back.Go(func() {
		defer s.r.recovered(s.noEntry(), func() { s.drop(out, nil) })
		// Not the PacketConn around it: that would hide that it can lend.
		err := relay.Packets(s.client, out.conn.Packets, relay.PacketOptions{Seen: out.seen(s.seen), Failed: s.failed})
		s.drop(out, err)
	})
	return out, nil
}

// errFell: a proxy that gives an association and ends it would be asked for another
// one with every datagram.
var errFell = errors.New("the socket ended as soon as it was open")

// seen is what is told of what comes back by this socket.
func (o *packetOut) seen(f func([]flow.Datagram)) func([]flow.Datagram) {
	if !o.movable {
		return f
	}
	return func(dgs []flow.Datagram) {
		o.silence.heard()
		f(dgs)
	}
}

// drop closes a socket that does not work any more. Its peers' flows end when
// the client writes to them again, or with the session.
func (s *source) drop(out *packetOut, err error) {
	if out.dead.Swap(true) {
		return
	}
	s.mu.Lock()
	if s.outs[out.key] == out {
		delete(s.outs, out.key)
	}
	// Where there are other paths the next one is tried, and so is another address;
	// one for pings can end to make room for others.
	udp := s.client.Flow().Proto == flow.UDP
	if udp && !out.movable && err != nil && !errors.Is(err, errAddressGone) && time.Since(out.opened) < failedFor {
		s.fell[out.key] = time.Now()
	}
	s.mu.Unlock()
	out.conn.Close()
	s.r.giveSockets(out.places)
	s.r.log.Debug("datagram socket ended", "flow", s.client.Flow().ID, "outbound", out.key.outbound.Name(), "err", err)
}
