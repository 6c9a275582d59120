package dialer

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"cgtun/flow"
)

const (
	// routeFor is how long the route to a peer by an uplink is believed.
	routeFor = 10 * time.Second
	// maxRoutes bounds the peers whose route is remembered.
	maxRoutes = 1024
)

// OpenPackets implements Outbound: one socket for all peers of the target's
// family (RFC 4787 §4.1). The target itself only chooses the family, and by an
// interface the source address.
func (d *Direct) OpenPackets(ctx context.Context, t Target) (*PacketConn, error) {
	dst := netip.AddrPortFrom(t.Addr.Addr().Unmap(), t.Addr.Port())
	w, err := d.way(dst.Addr())
	if err != nil {
		return nil, d.fail("route", dst, err)
	}
	network, local := "udp4", netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	if dst.Addr().Is6() {
		network, local = "udp6", netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	}
	if w.source.IsValid() {
		local = w.local()
	}
	var listen net.ListenConfig
	if w.special() {
		listen.Control = w.control
	}
	conn, err := listen.ListenPacket(ctx, network, local.String())
	if err != nil {
		return nil, d.fail("open", dst, err)
	}
	packets, err := d.packets(conn.(*net.UDPConn), w, dst)
	if err != nil {
		return nil, err
	}
	return &PacketConn{Packets: packets, Path: d.path, Local: w.source}, nil
}

// packets takes over a socket that leaves by w, the first peer being dst.
func (d *Direct) packets(conn kernelSocket, w way, dst netip.AddrPort) (lendingPackets, error) {
	socket, err := newUDPSocket(conn, dst.Addr().Is6())
	if err != nil {
		conn.Close()
		return nil, d.fail("configure", dst, err)
	}
	socket.mtu = func(peer netip.Addr) int { return pathMTU(w, peer) }
	if d.via != nil {
		return &uplinkPackets{udpSocket: socket, via: d.via, way: w, routes: map[netip.Addr]time.Time{dst.Addr(): time.Now()}}, nil
	}
	return socket, nil
}

// lendingPackets are Packets that relay can read without buffers of its own.
type lendingPackets interface {
	Packets
	ReadLent([]flow.Datagram) (int, error)
}

// uplinkPackets is a udpSocket that is bound to an interface. Before the first
// datagram to a peer it makes sure that there is a route: without one the kernel
// would ask for the peer by ARP (see uplink).
type uplinkPackets struct {
	*udpSocket
	via    *uplink
	way    way
	routes map[netip.Addr]time.Time // when a peer's route was seen
}

// WriteBatch is as udpSocket's.
func (u *uplinkPackets) WriteBatch(dgs []flow.Datagram) (int, error) {
	now := time.Now()
	var last netip.Addr
	for i := range dgs {
		peer := dgs[i].Peer.Addr()
		if peer == last {
			continue
		}
		if err := u.route(peer, now); err != nil {
			if i > 0 {
				// What is before it first; the caller comes back for it.
				if n, err := u.udpSocket.WriteBatch(dgs[:i]); err != nil {
					return n, err
				}
			}
			return i, &flow.PeerError{Peer: dgs[i].Peer, Reason: flow.ReasonOf(err), Err: err}
		}
		last = peer
	}
	return u.udpSocket.WriteBatch(dgs)
}

// route makes sure that the socket has a route to peer through the interface.
func (u *uplinkPackets) route(peer netip.Addr, now time.Time) error {
	if seen, ok := u.routes[peer]; ok && now.Sub(seen) < routeFor {
		return nil
	}
	link, err := u.via.link()
	if err != nil {
		return err
	}
	if !u.via.leads(u.way, link, peer) {
		delete(u.routes, peer)
		return &noWay{fmt.Sprintf("no route to %s through %s", peer, u.via.name)}
	}
	if len(u.routes) >= maxRoutes {
		clear(u.routes)
	}
	u.routes[peer] = now
	return nil
}
