package dialer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"

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
// each reply and each error to all of them.
const maxRawEchoes = 256

const echoHeaderSize = 8

// echoIDs are the identifiers of the raw sockets.
var echoIDs = idPool{taken: make(map[uint16]bool)}

// idPool hands out identifiers that nobody else of this process has.
type idPool struct {
	mu    sync.Mutex
	taken map[uint16]bool
}

var errManyEchoes = fmt.Errorf("%d raw sockets for pings are open: %w", maxRawEchoes, unix.EMFILE)

func (p *idPool) take() (uint16, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.taken) >= maxRawEchoes {
		return 0, errManyEchoes
	}
	for {
		if id := uint16(rand.Uint32()); !p.taken[id] {
			p.taken[id] = true
			return id, nil
		}
	}
}

func (p *idPool) give(id uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.taken, id)
}

// openRawEcho is OpenEcho by a raw socket.
func (d *Direct) openRawEcho(w way, dst netip.AddrPort) (*PacketConn, error) {
	id, err := echoIDs.take()
	if err != nil {
		return nil, d.fail("open", dst, err)
	}
	v6 := dst.Addr().Is6()
	conn, err := echoSocket(w, v6, unix.SOCK_RAW, id)
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
	raw := &rawEcho{lendingPackets: packets, id: id, v6: v6}
	raw.closed = sync.OnceFunc(func() { echoIDs.give(id) })
	return &PacketConn{Packets: raw, Path: d.path}, nil
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
	id     uint16
	v6     bool
	out    []byte // of WriteBatch
	closed func()
}

// Close is as Packets says.
func (e *rawEcho) Close() error {
	err := e.lendingPackets.Close()
	e.closed()
	return err
}

// WriteBatch is as Packets says: one by one, each with the socket's identifier.
func (e *rawEcho) WriteBatch(dgs []flow.Datagram) (int, error) {
	for i, d := range dgs {
		if len(d.Data) < echoHeaderSize {
			return i, &flow.PeerError{Peer: d.Peer, Err: unix.EINVAL}
		}
		e.out = append(e.out[:0], d.Data...)
		setEchoID(e.out, e.id)
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
	return len(msg) >= echoHeaderSize && binary.BigEndian.Uint16(msg[4:]) == e.id
}
