package dialer

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// The parts of struct sock_extended_err, which the address of who said it
// follows (IP_RECVERR of ip(7)).
const (
	extendedOrigin  = 4
	extendedType    = 5
	extendedCode    = 6
	extendedInfo    = 8
	extendedErrSize = 16
)

// maxQuote is as much of a datagram as an ICMP error can bring back.
const maxQuote = 1280

// extendedError reads a control message if it is a sock_extended_err. said is
// nil if the kernel reports something of its own.
func extendedError(level, kind int32, data []byte) (errno unix.Errno, said *flow.ICMPError) {
	v4 := level == unix.SOL_IP && kind == unix.IP_RECVERR
	if !v4 && (level != unix.SOL_IPV6 || kind != unix.IPV6_RECVERR) || len(data) < extendedErrSize {
		return 0, nil
	}
	errno = unix.Errno(binary.NativeEndian.Uint32(data))
	switch data[extendedOrigin] {
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
	default:
		return errno, nil
	}
	said = &flow.ICMPError{
		Type: data[extendedType],
		Code: data[extendedCode],
		Info: binary.NativeEndian.Uint32(data[extendedInfo:]),
	}
	var from sockaddr
	if copy((*[unix.SizeofSockaddrInet6]byte)(unsafe.Pointer(&from.raw))[:], data[extendedErrSize:]) >= unix.SizeofSockaddrInet4 {
		switch from.raw.Family {
		case unix.AF_INET, unix.AF_INET6:
			said.From = from.addrPort().Addr()
		}
	}
	return errno, said
}

// passedTTL reads a control message if it is the TTL of what came (IP_RECVTTL of
// ip(7)), and returns what is left of it behind us. 0: it is none.
func passedTTL(level, kind int32, data []byte) uint8 {
	v4 := level == unix.SOL_IP && kind == unix.IP_TTL
	if !v4 && (level != unix.SOL_IPV6 || kind != unix.IPV6_HOPLIMIT) || len(data) < 4 {
		return 0
	}
	// The last router of all still has to hand it over.
	return uint8(min(max(int32(binary.NativeEndian.Uint32(data))-1, 1), 255))
}

// askTTLs has a socket tell the TTL of all that it receives.
func askTTLs(fd int, v6 bool) error {
	level, option := unix.SOL_IP, unix.IP_RECVTTL
	if v6 {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, option, 1))
}

// peerError turns such a message into an error of peer. Nil: it is none, or is
// told by the write that failed.
func peerError(peer netip.AddrPort, level, kind int32, data []byte) *flow.PeerError {
	errno, said := extendedError(level, kind, data)
	if errno == 0 || said == nil && errno == unix.EMSGSIZE {
		return nil
	}
	return &flow.PeerError{Peer: peer, Reason: saidReason(flow.ReasonOf(errno), said, peer.Addr().Is4()), ICMP: said, Err: errno}
}

// saidReason is the reason of an error that somebody on the way reports, if why is
// that of its errno: the kernel says EHOSTUNREACH for several.
func saidReason(why flow.Reason, said *flow.ICMPError, v4 bool) flow.Reason {
	switch {
	case said == nil:
	case v4 && said.Type == icmpTimeExceeded, !v4 && said.Type == icmp6TimeExceeded:
		return flow.Expired
	case v4 && said.Type == icmpDstUnreachable:
		switch said.Code {
		case icmpNetProhibited, icmpHostProhibited, icmpAdminProhibited:
			return flow.Prohibited
		}
	}
	return why
}

// ICMP types and codes (RFC 1812 §5.2.7.1, RFC 4443 §3).
const (
	icmpDstUnreachable  = 3
	icmpFragNeeded      = 4
	icmpNetProhibited   = 9
	icmpHostProhibited  = 10
	icmpAdminProhibited = 13
	icmpTimeExceeded    = 11
	icmp6TooBig         = 2
	icmp6TimeExceeded   = 3
)

// tooBig is what a router here would say of a datagram that does not fit.
func tooBig(mtu int, v6 bool) *flow.ICMPError {
	if v6 {
		return &flow.ICMPError{Type: icmp6TooBig, Info: uint32(mtu)}
	}
	return &flow.ICMPError{Type: icmpDstUnreachable, Code: icmpFragNeeded, Info: uint32(mtu)}
}

// pathMTU asks the kernel for the MTU of the path to peer, for a socket that
// leaves by w. 0: it does not know.
func pathMTU(w way, peer netip.Addr) int {
	network, level, option := "udp4", unix.SOL_IP, unix.IP_MTU
	if peer.Is6() {
		network, level, option = "udp6", unix.SOL_IPV6, unix.IPV6_MTU
	}
	d := net.Dialer{Control: w.control}
	if w.source.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(w.local())
	}
	// The discard port: nothing is sent there.
	c, err := d.Dial(network, netip.AddrPortFrom(peer, 9).String())
	if err != nil {
		return 0
	}
	defer c.Close()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return 0
	}
	mtu := 0
	_ = raw.Control(func(fd uintptr) { mtu, _ = unix.GetsockoptInt(int(fd), level, option) })
	return mtu
}
