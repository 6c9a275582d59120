package dialer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// OpenEcho implements Echoer by a ping socket: the kernel chooses an identifier
// that nobody else has (RFC 5508 §3.1), and brings only its replies and errors.
// net.ipv4.ping_group_range must have the group of the process, IPv6 too; the
// kernel's own default has none, systemd's has all. Where it has not, a raw
// socket takes its place.
func (d *Direct) OpenEcho(_ context.Context, t Target) (*PacketConn, error) {
	dst := netip.AddrPortFrom(t.Addr.Addr().Unmap(), 0)
	w, err := d.way(dst.Addr())
	if err != nil {
		return nil, d.fail("route", dst, err)
	}
	conn, err := echoSocket(w, dst.Addr().Is6(), unix.SOCK_DGRAM, 0)
	if errors.Is(err, unix.EACCES) {
		return d.openRawEcho(w, dst)
	}
	if err != nil {
		return nil, d.fail("open", dst, err)
	}
	packets, err := d.packets(conn, w, dst)
	if err != nil {
		return nil, err
	}
	return &PacketConn{Packets: &echoPackets{packets}, Path: d.path, Local: w.source}, nil
}

// EchoAllowed says why this process can carry no pings, or nil. It tries.
func EchoAllowed() error {
	conn, err := echoSocket(way{}, false, unix.SOCK_DGRAM, 0)
	if errors.Is(err, unix.EACCES) {
		conn, err = echoSocket(way{}, false, unix.SOCK_RAW, 1)
	}
	if err != nil {
		return err
	}
	return conn.Close()
}

// echoSocket opens a ping socket (icmp(7)), or a raw one (raw(7)) for the replies
// to one identifier, that leaves by w.
func echoSocket(w way, v6 bool, kind int, id uint16) (kernelSocket, error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	if v6 {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "ping")
	defer f.Close() // FilePacketConn makes a copy
	if kind == unix.SOCK_RAW {
		if err := onlyReplies(fd, v6, id); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(w.apply(fd), askTTLs(fd, v6)); err != nil {
		return nil, err
	}
	var local unix.Sockaddr
	switch {
	case v6:
		a := &unix.SockaddrInet6{}
		if w.source.IsValid() {
			a.Addr = w.source.As16()
		}
		local = a
	default:
		a := &unix.SockaddrInet4{}
		if w.source.IsValid() {
			a.Addr = w.source.As4()
		}
		local = a
	}
	if err := unix.Bind(fd, local); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	conn, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	socket, ok := conn.(kernelSocket)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("ping socket is a %T", conn)
	}
	return socket, nil
}

// echoPackets sends one by one: a ping socket would take joined messages for
// one.
type echoPackets struct{ lendingPackets }

// WriteBatch is as Packets says.
func (e *echoPackets) WriteBatch(dgs []flow.Datagram) (int, error) {
	for i := range dgs {
		if _, err := e.lendingPackets.WriteBatch(dgs[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(dgs), nil
}
