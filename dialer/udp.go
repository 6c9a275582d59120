package dialer

import (
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

const (
	// The socket's buffers hold 30 ms of 120,000 datagrams a second, which is
	// longer than any pause of ours. They are limits, not allocations.
	udpReceiveBuffer = 4 << 20
	udpSendBuffer    = 1 << 20
	// The largest payload: 65,535 bytes less the headers that the IP length
	// counts.
	maxPayload4 = 65507
	maxPayload6 = 65527
	// maxPeerErrors bounds the errors that are fetched at once.
	maxPeerErrors = 32
)

// udpSocket is an unconnected UDP socket that moves datagrams in batches, joined
// where the kernel does that (UDP_SEGMENT, UDP_GRO of udp(7)). Each is sent with
// the TTL that it asks for, and cut up by nobody if it does not want that: what
// is too large for the path, and all else that ICMP says, comes back as an error
// of its peer.
//
// ReadLent, ReadBatch and WriteBatch are as Packets says: reading goes beside
// writing.
type udpSocket struct {
	conn kernelSocket
	raw  syscall.RawConn
	most int // bytes of a payload

	// Of the reader.
	in      *receiver // nil while it waits: a waiting socket holds no buffers
	want    int
	got     int
	readErr unix.Errno
	errs    []*flow.PeerError
	poll    [1]unix.PollFd
	readFn  func(uintptr) bool

	udpWrites
}

// kernelSocket is a socket of the kernel: UDP, ping or raw.
type kernelSocket interface {
	net.PacketConn
	syscall.Conn
}

// newUDPSocket takes over conn, which is bound and not connected.
func newUDPSocket(conn kernelSocket, v6 bool) (*udpSocket, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open socket %s: %w", conn.LocalAddr(), err)
	}
	s := &udpSocket{conn: conn, raw: raw, most: maxPayload4}
	if v6 {
		s.most = maxPayload6
	}
	s.readFn, s.writeFn = s.receive, s.transmit
	s.joinBelow = wholeDatagram
	s.v6, s.ttl, s.whole = v6, kernelTTL, wholeUnset
	var set error
	if err := raw.Control(func(fd uintptr) { set = setUDPOptions(int(fd), v6) }); err != nil {
		return nil, fmt.Errorf("open socket %s: %w", conn.LocalAddr(), err)
	}
	if set != nil {
		return nil, fmt.Errorf("open socket %s: %w", conn.LocalAddr(), set)
	}
	return s, nil
}

func setUDPOptions(fd int, v6 bool) error {
	level, recvErr := unix.SOL_IP, unix.IP_RECVERR
	if v6 {
		level, recvErr = unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	if err := unix.SetsockoptInt(fd, level, recvErr, 1); err != nil {
		return fmt.Errorf("ask for ICMP errors: %w", err)
	}
	// Kernels before 5.0 have no UDP_GRO: datagrams then come one by one.
	_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	// Without CAP_NET_ADMIN the system's limits hold.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpReceiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, udpReceiveBuffer)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, udpSendBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, udpSendBuffer)
	}
	return nil
}

// Close closes the socket. Reads and writes that wait end with net.ErrClosed.
func (s *udpSocket) Close() error { return s.conn.Close() }

// LocalAddr is the address that all peers of a UDP socket see.
func (s *udpSocket) LocalAddr() netip.AddrPort {
	a, _ := s.conn.LocalAddr().(*net.UDPAddr)
	return a.AddrPort()
}

// ReadBatch is as Packets says. A datagram that is longer than its place is cut.
func (s *udpSocket) ReadBatch(dgs []flow.Datagram) (int, error) {
	var lent [recvBatch]flow.Datagram
	n, err := s.ReadLent(lent[:min(len(dgs), recvBatch)])
	for i, d := range lent[:n] {
		d.Data = dgs[i].Data[:copy(dgs[i].Data, d.Data)]
		dgs[i] = d
	}
	return n, err
}

// ReadLent is ReadBatch with buffers of the socket's: what dgs had before does
// not matter, and what it gets may be used until the next call.
func (s *udpSocket) ReadLent(dgs []flow.Datagram) (int, error) {
	if len(s.errs) == 0 {
		s.want, s.got, s.readErr = len(dgs), 0, 0
		if err := s.raw.Read(s.readFn); err != nil {
			return 0, fmt.Errorf("read datagrams: %w", err)
		}
	}
	if len(s.errs) > 0 {
		err := s.errs[0]
		s.errs = s.errs[1:]
		return 0, err
	}
	if s.readErr != 0 {
		return 0, fmt.Errorf("read datagrams: %w", s.readErr)
	}
	for i := range s.got {
		dgs[i] = s.in.datagram(i)
	}
	return s.got, nil
}

// receive tries to read. False: wait for the socket.
func (s *udpSocket) receive(fd uintptr) bool {
	if s.in == nil {
		if !s.readable(fd) {
			return false
		}
		s.in = receivers.Get().(*receiver)
	}
	for {
		n, errno := s.in.recv(fd, s.want)
		if errno == 0 {
			s.got = n
			return true
		}
		if errno == unix.EINTR {
			continue
		}
		// The error queue may have something whatever the errno is: a writer
		// may have been given the error that announced it.
		if s.fetchErrors(fd); len(s.errs) > 0 {
			return true
		}
		if errno == unix.EAGAIN {
			receivers.Put(s.in)
			s.in = nil
			return false
		}
		if !pending(errno) {
			s.readErr = errno
			return true
		}
	}
}

// readable says whether there is something to read, an error too. It is asked
// before buffers are taken: of thousands of new sockets, few have something.
func (s *udpSocket) readable(fd uintptr) bool {
	s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	n, err := unix.Poll(s.poll[:], 0)
	return n > 0 || err != nil
}

// fetchErrors empties the error queue (IP_RECVERR of ip(7)).
func (s *udpSocket) fetchErrors(fd uintptr) {
	s.errs = s.errs[:0]
	for len(s.errs) < maxPeerErrors {
		errno := s.in.recvError(fd)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return
		}
		peer := s.in.names[0].addrPort()
		quote := s.in.data[0][:min(s.in.msgs[0].n, maxQuote)]
		var e *flow.PeerError
		var ttl uint8
		s.in.eachControl(0, func(level, kind int32, data []byte) {
			if came := peerError(peer, level, kind, data); came != nil {
				e = came
			}
			if came := passedTTL(level, kind, data); came != 0 {
				ttl = came
			}
		})
		if e == nil {
			continue
		}
		if e.ICMP != nil {
			e.ICMP.TTL, e.ICMP.Quote = ttl, append([]byte(nil), quote...)
		}
		s.errs = append(s.errs, e)
	}
}

// pending says whether errno is one that a UDP socket keeps until somebody asks:
// it concerns a datagram of the past, and the call that was given it did
// nothing.
func pending(errno unix.Errno) bool {
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET,
		unix.EACCES, unix.EPROTO, unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.EMSGSIZE:
		return true
	}
	return false
}
