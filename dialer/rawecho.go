package dialer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// Echo by raw sockets, theory of operation.
//
// A raw socket gets every ICMP message of the machine, so a filter of the kernel
// leaves it the echo replies to one identifier, which is written into each
// request, and errors are taken only if they quote it. The identifiers in use
// are known to all outbounds of the process. Who else pings by a raw socket on
// this machine may have chosen the same one, and hears replies that are not his;
// ping(8) tells them by their contents.

// maxRawEchoes bounds the raw sockets that are open at a time: the kernel shows
// each reply and each error to all of them. One more, and the longest idle is
// closed: its source gets another one with its next request.
const maxRawEchoes = 256

const echoHeaderSize = 8

// echoIDs are the identifiers of the raw sockets.
var echoIDs = idPool{taken: make(map[uint16]*echoID)}

// idPool hands out identifiers that nobody else of this process has.
type idPool struct {
	mu    sync.Mutex
	taken map[uint16]*echoID
}

// echoID is an identifier that is in use.
type echoID struct {
	value uint16
	used  atomic.Int64 // when, in nanoseconds since 1970

	// Guarded by idPool.mu.
	close func() error // of its socket; nil: it is not open yet
	gone  bool         // it made room
}

// take returns an identifier, which may have been another one's. It is given
// back by give.
func (p *idPool) take() *echoID {
	id := new(echoID)
	id.used.Store(time.Now().UnixNano())
	p.mu.Lock()
	var end func() error
	if len(p.taken) >= maxRawEchoes {
		end = p.evictLocked()
	}
	for {
		id.value = uint16(rand.Uint32())
		if p.taken[id.value] == nil {
			break
		}
	}
	p.taken[id.value] = id
	p.mu.Unlock()
	if end != nil {
		_ = end()
	}
	return id
}

// evictLocked takes the longest idle identifier away, and returns what closes its
// socket.
func (p *idPool) evictLocked() func() error {
	var oldest *echoID
	for _, id := range p.taken {
		if oldest == nil || id.used.Load() < oldest.used.Load() {
			oldest = id
		}
	}
	oldest.gone = true
	delete(p.taken, oldest.value)
	return oldest.close
}

// opened says how the socket of an identifier is closed.
func (p *idPool) opened(id *echoID, end func() error) {
	p.mu.Lock()
	id.close = end
	gone := id.gone
	p.mu.Unlock()
	if gone {
		_ = end()
	}
}

func (p *idPool) give(id *echoID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !id.gone {
		delete(p.taken, id.value)
		id.gone = true
	}
}

// openRawEcho is OpenEcho by a raw socket.
func (d *Direct) openRawEcho(w way, dst netip.AddrPort) (*PacketConn, error) {
	id := echoIDs.take()
	v6 := dst.Addr().Is6()
	conn, err := echoSocket(w, v6, unix.SOCK_RAW, id.value)
	if err != nil {
		echoIDs.give(id)
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w (neither net.ipv4.ping_group_range nor CAP_NET_RAW allows pings)", err)
		}
		return nil, d.fail("open", dst, err)
	}
	packets, err := d.packets(conn, w, dst)
	if err != nil {
		echoIDs.give(id)
		return nil, err
	}
	echoIDs.opened(id, packets.Close)
	return &PacketConn{Packets: &rawEcho{lendingPackets: packets, id: id, v6: v6}, Path: d.path}, nil
}

// onlyReplies has a raw socket receive nothing but echo replies with an
// identifier. Of IPv4 it sees the IP header too (raw(7)).
func onlyReplies(fd int, v6 bool, id uint16) error {
	const (
		header = unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH // X = size of the IPv4 header
		none   = unix.BPF_LDX | unix.BPF_W | unix.BPF_IMM // X = 0
		load8  = unix.BPF_LD | unix.BPF_B | unix.BPF_IND
		load16 = unix.BPF_LD | unix.BPF_H | unix.BPF_IND
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K
	)
	first, reply := unix.SockFilter{Code: header}, uint32(0)
	if v6 {
		first, reply = unix.SockFilter{Code: none}, 129
	}
	program := []unix.SockFilter{
		first,
		{Code: load8, K: 0},
		{Code: equal, K: reply, Jf: 3},
		{Code: load16, K: 4},
		{Code: equal, K: uint32(id), Jf: 1},
		{Code: ret, K: 0xffffffff},
		{Code: ret, K: 0},
	}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	return os.NewSyscallError("setsockopt", err)
}

// rawEcho makes a raw socket look like a ping socket.
type rawEcho struct {
	lendingPackets
	id  *echoID
	v6  bool
	out []byte // of WriteBatch
}

// Close is as Packets says.
func (e *rawEcho) Close() error {
	echoIDs.give(e.id)
	return e.lendingPackets.Close()
}

// WriteBatch is as Packets says: one by one, each with the socket's identifier.
func (e *rawEcho) WriteBatch(dgs []flow.Datagram) (int, error) {
	e.id.used.Store(time.Now().UnixNano())
	for i, d := range dgs {
		if len(d.Data) < echoHeaderSize {
			return i, &flow.PeerError{Peer: d.Peer, Err: unix.EINVAL}
		}
		e.out = append(e.out[:0], d.Data...)
		setEchoID(e.out, e.id.value)
		d.Data = e.out
		if _, err := e.lendingPackets.WriteBatch([]flow.Datagram{d}); err != nil {
			return i, err
		}
	}
	return len(dgs), nil
}

// setEchoID changes the identifier of a message and its checksum with it
// (RFC 1624). That of ICMPv6 the kernel writes.
func setEchoID(msg []byte, id uint16) {
	sum := uint32(^binary.BigEndian.Uint16(msg[2:])) + uint32(^binary.BigEndian.Uint16(msg[4:])) + uint32(id)
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(msg[2:], ^uint16(sum))
	binary.BigEndian.PutUint16(msg[4:], id)
}

// ReadBatch is as Packets says.
func (e *rawEcho) ReadBatch(dgs []flow.Datagram) (int, error) {
	var lent [recvBatch]flow.Datagram
	n, err := e.ReadLent(lent[:min(len(dgs), recvBatch)])
	for i, d := range lent[:n] {
		d.Data = dgs[i].Data[:copy(dgs[i].Data, d.Data)]
		dgs[i] = d
	}
	return n, err
}

// ReadLent is as that of udpSocket, of the replies and errors of the identifier.
func (e *rawEcho) ReadLent(dgs []flow.Datagram) (int, error) {
	for {
		n, err := e.lendingPackets.ReadLent(dgs)
		var peer *flow.PeerError
		if errors.As(err, &peer) && peer.ICMP != nil && !e.own(peer.ICMP.Quote) {
			continue
		}
		kept := 0
		for _, d := range dgs[:n] {
			if !e.v6 {
				d.Data = d.Data[min(len(d.Data), int(first(d.Data)&0x0f)*4):]
			}
			if e.own(d.Data) {
				dgs[kept] = d
				kept++
			}
		}
		if kept > 0 || err != nil {
			return kept, err
		}
	}
}

func first(b []byte) byte {
	if len(b) == 0 {
		return 0
	}
	return b[0]
}

// own says whether a message has the identifier.
func (e *rawEcho) own(msg []byte) bool {
	return len(msg) >= echoHeaderSize && binary.BigEndian.Uint16(msg[4:]) == e.id.value
}
