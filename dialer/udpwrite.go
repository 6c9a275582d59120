package dialer

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

const (
	// sendTries bounds how often a message is sent again because the socket
	// had the ICMP error of another one to tell: each error that is read makes it tell
	// of the next one. A refusal is never of what is being sent; the others can be.
	sendTries, refusedTries = 16, 1000
	// joinAgain is when a size that was refused is joined again: path MTUs are
	// forgotten after ten minutes, routes change.
	joinAgain = time.Minute
)

// udpWrites is the writer's half of a udpSocket.
type udpWrites struct {
	out      *sender
	sent     int // messages of out that are done
	writeErr unix.Errno
	writeFn  func(uintptr) bool
	// joinBelow is the size from which on datagrams are not joined, because
	// the kernel refused it: the path MTU is smaller, or the device cannot
	// (then it is 0).
	joinBelow int
	refused   time.Time

	// How the socket sends now, and how the messages of out want to be sent.
	v6           bool
	ttl, wantTTL uint8 // kernelTTL: as the kernel would
	whole        int   // as of setOptions
	wantWhole    int
	asked        bool                 // for the TTLs of what comes
	mtu          func(netip.Addr) int // the path's
}

// kernelTTL leaves the TTL to the kernel.
const kernelTTL = 0

// The states of "do not fragment".
const (
	wholeUnset = iota
	wholeNo
	wholeYes
)

// position is a place in a batch: a datagram, and a byte of it where it is
// joined and takes several messages.
type position struct{ index, offset int }

// WriteBatch is as Packets says. With a *flow.PeerError the datagram behind
// those that it counts was not sent; the caller goes on with the one after it. A
// datagram for which the device has no room is lost and counts as sent.
func (s *udpSocket) WriteBatch(dgs []flow.Datagram) (int, error) {
	if s.joinBelow < wholeDatagram && time.Since(s.refused) > joinAgain {
		s.joinBelow = wholeDatagram
	}
	s.out = senders.Get().(*sender)
	defer func() {
		s.out.reset()
		senders.Put(s.out)
		s.out = nil
	}()
	for at := (position{}); at.index < len(dgs); {
		if d := &dgs[at.index]; d.Segment == 0 && len(d.Data) > s.most {
			return at.index, &flow.PeerError{Peer: d.Peer, Reason: flow.TooBig, Err: unix.EMSGSIZE}
		}
		at = s.fill(dgs, at)
		if failed, err := s.flush(dgs); err != nil {
			return failed, err
		}
	}
	return len(dgs), nil
}

// fill puts as much as fits from at on into messages, which are sent alike, and
// returns where it stopped.
func (s *udpSocket) fill(dgs []flow.Datagram, at position) position {
	s.out.reset()
	first := &dgs[at.index]
	s.wantTTL, s.wantWhole = first.TTL, wholeNo
	if first.DontFragment {
		s.wantWhole = wholeYes
	}
	for at.index < len(dgs) {
		d := &dgs[at.index]
		if !sentAlike(d, first) {
			return at
		}
		if d.Segment != 0 {
			if s.out.full(1) {
				return at
			}
			at = s.addJoined(d, at)
			continue
		}
		if len(d.Data) > s.most {
			return at
		}
		n := s.joinable(dgs[at.index:])
		if s.out.full(n) {
			return at
		}
		p := part{from: at.index, to: at.index + n}
		if n > 1 {
			p.segment = len(d.Data)
		}
		s.out.begin(d.Peer, p)
		for _, d := range dgs[p.from:p.to] {
			if len(d.Data) > 0 {
				s.out.add(d.Data)
			}
		}
		at.index = p.to
	}
	return at
}

// sentAlike says whether a socket need not be changed between two datagrams.
func sentAlike(a, b *flow.Datagram) bool {
	return a.TTL == b.TTL && a.DontFragment == b.DontFragment
}

// setOptions makes the socket send as the messages want.
func (s *udpSocket) setOptions(fd int) unix.Errno {
	level, ttl, discover := unix.SOL_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER
	yes, no := unix.IP_PMTUDISC_DO, unix.IP_PMTUDISC_DONT
	if s.v6 {
		level, ttl, discover = unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER
		yes, no = unix.IPV6_PMTUDISC_DO, unix.IPV6_PMTUDISC_DONT
	}
	if s.ttl != s.wantTTL {
		value := int(s.wantTTL)
		if s.wantTTL == kernelTTL {
			value = -1
		}
		if err := unix.SetsockoptInt(fd, level, ttl, value); err != nil {
			return errnoOf(err)
		}
		s.ttl = s.wantTTL
		if s.ttl != kernelTTL && s.ttl < probeTTL && !s.asked {
			// Who counts routers counts them on the way back too.
			_ = askTTLs(fd, s.v6)
			s.asked = true
		}
	}
	if s.whole != s.wantWhole {
		value := no
		if s.wantWhole == wholeYes {
			value = yes
		}
		if err := unix.SetsockoptInt(fd, level, discover, value); err != nil {
			return errnoOf(err)
		}
		s.whole = s.wantWhole
	}
	return 0
}

func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return unix.EINVAL
}

// addJoined adds one message for a joined datagram, or for the next part of one
// that is too long for a message.
func (s *udpSocket) addJoined(d *flow.Datagram, at position) position {
	segment := min(d.Segment, s.most)
	size := len(d.Data) - at.offset
	if segment >= s.joinBelow {
		size = min(size, segment)
	}
	size = min(size, segment*maxSegments, max(s.most/segment, 1)*segment)
	p := part{from: at.index, to: at.index + 1, offset: at.offset, size: size}
	if size > segment {
		p.segment = segment
	}
	s.out.begin(d.Peer, p)
	if size > 0 {
		s.out.add(d.Data[at.offset : at.offset+size])
	}
	if at.offset += size; at.offset >= len(d.Data) {
		return position{index: at.index + 1}
	}
	return at
}

// joinable counts the datagrams at the front that can share a message: to one
// peer, all as long as the first but for the last, which may be shorter.
func (s *udpSocket) joinable(dgs []flow.Datagram) int {
	first := &dgs[0]
	size := len(first.Data)
	if size == 0 || size >= s.joinBelow {
		return 1
	}
	total := size
	most := min(len(dgs), maxSegments)
	for n := 1; n < most; n++ {
		next := &dgs[n]
		length := len(next.Data)
		total += length
		if next.Segment != 0 || next.Peer != first.Peer || !sentAlike(next, first) || length == 0 || length > size || total > s.most {
			return n
		}
		if length < size {
			return n + 1
		}
	}
	return most
}

// flush sends the messages. With an error comes the index of the last datagram
// that it concerns.
func (s *udpSocket) flush(dgs []flow.Datagram) (int, error) {
	tries := 0
	for s.sent = 0; s.sent < s.out.used; {
		before := s.sent
		if err := s.raw.Write(s.writeFn); err != nil {
			return s.out.parts[min(s.sent, s.out.used-1)].from, fmt.Errorf("send datagrams: %w", err)
		}
		if s.writeErr == 0 {
			return 0, nil
		}
		if s.sent > before {
			tries = 0
		}
		p := s.out.parts[s.sent]
		switch errno := s.writeErr; {
		case errno == unix.ENOBUFS || errno == unix.ENOMEM:
			s.sent++
			tries = 0
		case p.segment != 0 && joinRefused(errno):
			s.refuse(p.segment, errno)
			if err := s.sendSingly(dgs, p); err != nil {
				return p.to - 1, err
			}
			s.sent++
			tries = 0
		case pending(errno) && tries < sendTries, errno == unix.ECONNREFUSED && tries < refusedTries:
			tries++
		default:
			return p.to - 1, s.sendError(&dgs[p.from], errno)
		}
	}
	return 0, nil
}

// sendError is that of a datagram that the kernel did not take.
func (s *udpSocket) sendError(d *flow.Datagram, errno unix.Errno) *flow.PeerError {
	e := &flow.PeerError{Peer: d.Peer, Reason: flow.ReasonOf(errno), Err: errno}
	if e.Reason == flow.TooBig && s.mtu != nil {
		e.ICMP = tooBig(s.mtu(d.Peer.Addr()), s.v6)
		e.ICMP.Quote = d.Data[:min(len(d.Data), maxQuote)]
	}
	return e
}

// transmit tries to send. False: wait for the socket.
func (s *udpSocket) transmit(fd uintptr) bool {
	if s.writeErr = s.setOptions(int(fd)); s.writeErr != 0 {
		return true
	}
	for s.sent < s.out.used {
		n, errno := s.out.send(fd, s.sent)
		switch errno {
		case 0:
			s.sent += n
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			s.writeErr = errno
			return true
		}
	}
	s.writeErr = 0
	return true
}

// joinRefused says whether errno is how a kernel refuses UDP_SEGMENT: a datagram
// larger than the path MTU (EINVAL, EMSGSIZE), a device without checksums (EIO),
// or no such thing.
func joinRefused(errno unix.Errno) bool {
	switch errno {
	case unix.EINVAL, unix.EMSGSIZE, unix.EIO, unix.EOPNOTSUPP, unix.ENOPROTOOPT:
		return true
	}
	return false
}

// refuse remembers that datagrams of this size cannot be joined.
func (s *udpSocket) refuse(segment int, errno unix.Errno) {
	s.refused = time.Now()
	s.joinBelow = min(s.joinBelow, segment)
	if errno != unix.EINVAL && errno != unix.EMSGSIZE {
		s.joinBelow = 0
	}
}

// sendSingly sends the datagrams of a message each by itself.
func (s *udpSocket) sendSingly(dgs []flow.Datagram, p part) error {
	out, sent := s.out, s.sent
	s.out = senders.Get().(*sender)
	defer func() {
		s.out.reset()
		senders.Put(s.out)
		s.out, s.sent = out, sent
	}()
	for i := p.from; i < p.to; i++ {
		data := dgs[i].Data
		if p.size != 0 {
			data = data[p.offset : p.offset+p.size]
		}
		for len(data) > 0 {
			n := min(p.segment, len(data))
			if s.out.full(1) {
				if _, err := s.flush(dgs); err != nil {
					return err
				}
				s.out.reset()
			}
			s.out.begin(dgs[i].Peer, part{from: i, to: i + 1})
			s.out.add(data[:n])
			data = data[n:]
		}
	}
	_, err := s.flush(dgs)
	return err
}
