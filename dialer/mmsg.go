package dialer

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// The numbers of one recvmmsg or sendmmsg call. x/sys has neither call, and
// x/net/ipv4 has them with two allocations a datagram and with buffers that are
// held while nothing comes.
const (
	recvBatch = 8
	sendBatch = 32
	// maxSegments is UDP_MAX_SEGMENTS of kernels before 6.9, later 128.
	maxSegments = 64
	// sendPieces is enough for every message to be cut off by another limit.
	sendPieces = 256
	// wholeDatagram holds what IPv4 and IPv6 can carry, joined or not.
	wholeDatagram = 64 << 10
	// recvControl holds an IP_RECVERR message with its address, or UDP_GRO.
	recvControl = 128
)

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// sockaddr has room for a sockaddr_in too.
type sockaddr struct{ raw unix.RawSockaddrInet6 }

// receiver has the buffers of one recvmmsg. Most of it is never touched: a
// small datagram uses one page of its 16.
type receiver struct {
	msgs    [recvBatch]mmsghdr
	names   [recvBatch]sockaddr
	iovs    [recvBatch]unix.Iovec
	control [recvBatch][recvControl]byte
	data    [recvBatch][wholeDatagram]byte
}

var receivers = sync.Pool{New: func() any {
	r := new(receiver)
	for i := range r.msgs {
		r.iovs[i].Base = &r.data[i][0]
		r.iovs[i].SetLen(wholeDatagram)
		h := &r.msgs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
		h.Control = &r.control[i][0]
	}
	return r
}}

// recv receives up to want datagrams without waiting.
func (r *receiver) recv(fd uintptr, want int) (int, unix.Errno) {
	want = min(want, recvBatch)
	for i := range want {
		r.ready(i)
	}
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.msgs[0])), uintptr(want), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// recvError receives one entry of the error queue into place 0.
func (r *receiver) recvError(fd uintptr) unix.Errno {
	r.ready(0)
	n, _, errno := unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&r.msgs[0].hdr)), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if errno != 0 {
		n = 0
	}
	r.msgs[0].n = uint32(n)
	return errno
}

// ready sets the lengths of a place that the kernel overwrites.
func (r *receiver) ready(i int) {
	h := &r.msgs[i].hdr
	h.Namelen = unix.SizeofSockaddrInet6
	h.SetControllen(recvControl)
}

// datagram returns what place i got. Its Data is the receiver's.
func (r *receiver) datagram(i int) flow.Datagram {
	d := flow.Datagram{Peer: r.names[i].addrPort(), Data: r.data[i][:r.msgs[i].n]}
	r.eachControl(i, func(level, kind int32, data []byte) {
		if level == unix.SOL_UDP && kind == unix.UDP_GRO && len(data) >= 4 {
			if size := int(binary.NativeEndian.Uint32(data)); size > 0 && size < len(d.Data) {
				d.Segment = size
			}
		}
		if ttl := passedTTL(level, kind, data); ttl != 0 {
			d.TTL = ttl
		}
	})
	return d
}

// eachControl walks the control messages of place i, as cmsg(3) lays them out.
func (r *receiver) eachControl(i int, use func(level, kind int32, data []byte)) {
	b := r.control[i][:r.msgs[i].hdr.Controllen]
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		size := int(h.Len)
		if size < unix.SizeofCmsghdr || size > len(b) {
			return
		}
		use(h.Level, h.Type, b[unix.CmsgLen(0):size])
		b = b[min(len(b), unix.CmsgSpace(size-unix.CmsgLen(0))):]
	}
}

// addrPort reads the sockaddr_in or sockaddr_in6.
func (a *sockaddr) addrPort() netip.AddrPort {
	if a.raw.Family == unix.AF_INET {
		a4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.raw))
		return netip.AddrPortFrom(netip.AddrFrom4(a4.Addr), ntohs(a4.Port))
	}
	return netip.AddrPortFrom(netip.AddrFrom16(a.raw.Addr).Unmap(), ntohs(a.raw.Port))
}

// set writes a sockaddr for peer and returns its length.
func (a *sockaddr) set(peer netip.AddrPort) uint32 {
	a.raw = unix.RawSockaddrInet6{}
	if peer.Addr().Is4() {
		a4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.raw))
		a4.Family, a4.Port, a4.Addr = unix.AF_INET, ntohs(peer.Port()), peer.Addr().As4()
		return unix.SizeofSockaddrInet4
	}
	a.raw.Family, a.raw.Port, a.raw.Addr = unix.AF_INET6, ntohs(peer.Port()), peer.Addr().As16()
	return unix.SizeofSockaddrInet6
}

// ntohs turns a port around, whatever the machine.
func ntohs(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

// sender has the messages of one sendmmsg. Each stands for some datagrams to one
// peer; with several, they are joined by UDP_SEGMENT.
type sender struct {
	msgs    [sendBatch]mmsghdr
	names   [sendBatch]sockaddr
	iovs    [sendPieces]unix.Iovec
	control [sendBatch]segmentControl
	parts   [sendBatch]part
	used    int // messages
	pieces  int // iovecs
}

// segmentControl is the control message that sets the size of each datagram.
type segmentControl struct {
	hdr  unix.Cmsghdr
	size uint16
	_    [6]byte // CMSG_SPACE(2)
}

// part is what a message stands for: the datagrams [from, to) of the batch, or
// size bytes of a single one that is itself joined, from offset on.
type part struct {
	from, to     int
	offset, size int
	segment      int // bytes of each datagram; 0: it is a single one
}

var senders = sync.Pool{New: func() any {
	s := new(sender)
	for i := range s.msgs {
		s.msgs[i].hdr.Name = (*byte)(unsafe.Pointer(&s.names[i]))
		s.control[i].hdr.Level, s.control[i].hdr.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		s.control[i].hdr.SetLen(unix.CmsgLen(2))
	}
	return s
}}

// reset forgets the messages and all that they point to.
func (s *sender) reset() {
	clear(s.iovs[:s.pieces])
	s.used, s.pieces = 0, 0
}

// full says that no message with n pieces fits any more.
func (s *sender) full(n int) bool { return s.used == sendBatch || s.pieces+n > sendPieces }

// begin starts a message to peer.
func (s *sender) begin(peer netip.AddrPort, p part) {
	i := s.used
	h := &s.msgs[i].hdr
	h.Namelen = s.names[i].set(peer)
	h.Iov = nil
	h.SetIovlen(0)
	h.Control = nil
	h.SetControllen(0)
	if p.segment != 0 {
		s.control[i].size = uint16(p.segment)
		h.Control = (*byte)(unsafe.Pointer(&s.control[i]))
		h.SetControllen(int(unsafe.Sizeof(s.control[i])))
	}
	s.parts[i] = p
	s.used++
}

// add puts data behind what the last message has.
func (s *sender) add(data []byte) {
	h := &s.msgs[s.used-1].hdr
	v := &s.iovs[s.pieces]
	if h.Iov == nil {
		h.Iov = v
	}
	v.Base = unsafe.SliceData(data)
	v.SetLen(len(data))
	s.pieces++
	h.SetIovlen(int(h.Iovlen) + 1)
}

// send sends the messages from the given one on, without waiting, and returns
// how many went. An error is that of the first one.
func (s *sender) send(fd uintptr, from int) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&s.msgs[from])), uintptr(s.used-from), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}
