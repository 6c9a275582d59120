package dialer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"cgtun/flow"
)

// An association (RFC 1928 §7), theory of operation.
//
// One TCP connection to the proxy asks for it, gets the address of a relay, and
// does nothing more than live: the association ends with it, from either side.
// Datagrams go to the relay and come from it with a header each that names the
// far end, through whatever reaches the proxy: a kernel's socket, or another
// association, whose header comes around.
//
// Batches stay batches. What goes out is copied behind headers, joined datagrams
// as joined ones whose parts have a header each, and the socket below joins more
// of them. What comes in is cut in place.

// associator is a protocol with datagrams.
type associator interface {
	// associate asks for a relay and returns where it is, as the proxy sees it.
	// That the proxy has none is errors.ErrUnsupported.
	associate(ctx context.Context, c flow.Conn, v6 bool) (socksAddr, error)
}

// associate implements associator. The address from which datagrams will come is
// not known, which zeros say (RFC 1928 §7).
func (s *socks5) associate(_ context.Context, c flow.Conn, v6 bool) (socksAddr, error) {
	from := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	if v6 {
		from = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	}
	return socksAsk(c, socksAssociate, Target{Addr: from})
}

// withoutFor is how long a proxy that has no datagrams is not asked again: the
// client is to be told at once.
const withoutFor = time.Minute

// CarriesPackets says whether the proxy can carry datagrams, and what leads to it:
// not, where it has said so lately.
func (p *Proxy) CarriesPackets() bool {
	_, ok := p.protocol.(associator)
	if since := p.without.Load(); !ok || since != nil && time.Since(*since) < withoutFor {
		return false
	}
	return CanOpenPackets(p.next) == nil
}

// OpenPackets implements Outbound: an association for peers of the family of t.
func (p *Proxy) OpenPackets(ctx context.Context, t Target) (_ *PacketConn, err error) {
	if err := CanOpenPackets(p); err != nil {
		return nil, err
	}
	asks := p.lockDial(t)
	pass, err := p.account.enter(asks)
	if err != nil {
		return nil, p.fail("greet", netip.AddrPort{}, err)
	}
	defer func() { p.account.leave(pass, asks, err) }()
	c, server, err := p.reach(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := p.associate(ctx, c, server, t)
	if err == nil {
		return conn, nil
	}
	_ = c.Close()
	if errors.Is(err, errors.ErrUnsupported) {
		now := time.Now()
		p.without.Store(&now)
		return nil, CanOpenPackets(p)
	}
	return nil, err
}

// associate makes an association over c, which it owns if there is no error.
func (p *Proxy) associate(ctx context.Context, c *Conn, server netip.AddrPort, t Target) (*PacketConn, error) {
	asking, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	var bound socksAddr
	err := during(asking, c.Conn, func(ctx context.Context) (err error) {
		bound, err = p.protocol.(associator).associate(ctx, c.Conn, server.Addr().Is6())
		return err
	})
	var said *refusal
	if errors.As(err, &said) && !errors.Is(err, errors.ErrUnsupported) {
		return nil, &Error{Hop: p.name, Op: "associate", Addr: server, Reason: said.reason, Err: said}
	}
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		err = p.fail("associate", server, err)
	}
	if err != nil {
		return nil, err
	}
	relay, err := p.relayAt(bound, server)
	if err != nil {
		return nil, p.fail("associate", server, err)
	}
	below, err := p.next.OpenPackets(ctx, Target{Addr: relay})
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, err
	}
	if err != nil {
		return nil, p.unreached(relay, err)
	}
	a := &association{control: c.Conn, below: below.Packets, relay: relay, v6: t.Addr.Addr().Unmap().Is6(), own: t.Flow == nil}
	a.lent, _ = below.Packets.(lendingPackets)
	a.watch.Go(a.endWithControl)
	return &PacketConn{Packets: a, Path: c.Path, Local: below.Local, Sockets: max(below.Sockets, 1) + 1}, nil
}

// relayAt is where to send what is for the relay. An address of no host is the
// proxy's own; so is one that a proxy elsewhere can only have chosen for what it
// is here: one of this machine or of its containers, or a private one where its own
// is public, which is also what those behind a NAT take for theirs.
func (p *Proxy) relayAt(bound socksAddr, server netip.AddrPort) (netip.AddrPort, error) {
	addr, port, own := bound.addr.Addr(), bound.addr.Port(), server.Addr()
	if port == 0 {
		return netip.AddrPort{}, errors.New("the proxy names a relay without a port")
	}
	switch {
	case bound.name != "", !addr.IsGlobalUnicast(), addr.IsPrivate() && !own.IsPrivate(), addr != own && p.ofMachine(netip.AddrPortFrom(addr, port)):
		addr = own
	}
	return netip.AddrPortFrom(addr, port), nil
}

// association is Packets, and lends as what is below it does.
type association struct {
	control flow.Conn
	below   Packets
	lent    lendingPackets // below, if it can lend
	relay   netip.AddrPort
	v6      bool // the family of the peers
	own     bool // of cgtun's own: a relay behind it may be at any address
	watch   sync.WaitGroup
	closing sync.Once

	// Of the reader.
	got    [recvBatch]flow.Datagram
	ready  []flow.Datagram // of those, not handed out yet
	spare  []flow.Datagram // the array of ready
	buffer []byte          // if below does not lend
}

// endWithControl closes the datagrams when the proxy closes the connection, or
// says anything: there is nothing more to be said.
func (a *association) endWithControl() {
	var b [1]byte
	_, _ = a.control.Read(b[:])
	_ = a.below.Close()
}

// Close implements Packets.
func (a *association) Close() (err error) {
	a.closing.Do(func() {
		err = errors.Join(a.below.Close(), a.control.Close())
		a.watch.Wait()
	})
	return err
}

// ReadBatch is as Packets says. A datagram that is longer than its place is cut.
func (a *association) ReadBatch(dgs []flow.Datagram) (int, error) {
	var lent [recvBatch]flow.Datagram
	n, err := a.ReadLent(lent[:min(len(dgs), recvBatch)])
	for i, d := range lent[:n] {
		d.Data = dgs[i].Data[:copy(dgs[i].Data, d.Data)]
		dgs[i] = d
	}
	return n, err
}

// ReadLent is as udpSocket's.
func (a *association) ReadLent(dgs []flow.Datagram) (int, error) {
	for len(a.ready) == 0 {
		n, err := a.read()
		if err != nil {
			return 0, a.failed(err)
		}
		a.spare = a.spare[:0]
		for i := range a.got[:n] {
			if d := &a.got[i]; d.Peer == a.relay {
				a.take(d.Data, d.Segment)
			}
		}
		a.ready = a.spare
	}
	n := copy(dgs, a.ready)
	a.ready = a.ready[n:]
	return n, nil
}

func (a *association) read() (int, error) {
	if a.lent != nil {
		return a.lent.ReadLent(a.got[:])
	}
	if a.buffer == nil {
		a.buffer = make([]byte, wholeDatagram)
	}
	a.got[0] = flow.Datagram{Data: a.buffer}
	return a.below.ReadBatch(a.got[:1])
}

// failed says what an error below means: of the relay, for there is no other peer.
// A path that carries less than was sent is for the socket below to remember;
// anything else ends the association.
func (a *association) failed(err error) error {
	var peer *flow.PeerError
	if !errors.As(err, &peer) {
		return err
	}
	if peer.Reason == flow.TooBig {
		return &flow.PeerError{Reason: flow.TooBig, Err: peer.Err} // nobody's: the client is not told
	}
	return fmt.Errorf("relay %s: %w", a.relay, peer.Err)
}

// take cuts the headers off a datagram, or of the parts of a joined one. Parts of
// one peer in a row move together and stay joined.
func (a *association) take(data []byte, segment int) {
	if segment == 0 {
		segment = max(len(data), 1)
	}
	first := len(a.spare)
	joined := -1 // in spare
	end := 0     // of its data, in base
	var base []byte
	for len(data) > 0 {
		part := data[:min(segment, len(data))]
		data = data[len(part):]
		peer, payload, ok := cutSocksHeader(part)
		if !ok || !a.from(peer) {
			joined = -1
			continue
		}
		if joined >= 0 {
			d := &a.spare[joined]
			if d.Peer == peer && len(payload) > 0 && len(payload) <= d.Segment {
				copy(base[end:], payload)
				end += len(payload)
				d.Data = base[:end]
				if len(payload) < d.Segment {
					joined = -1
				}
				continue
			}
		}
		a.spare = append(a.spare, flow.Datagram{Peer: peer, Data: payload, Segment: len(payload)})
		joined, base, end = len(a.spare)-1, payload[:cap(payload)], len(payload)
		if len(payload) == 0 {
			joined = -1
		}
	}
	for i := range a.spare[first:] {
		if d := &a.spare[first+i]; d.Segment == len(d.Data) {
			d.Segment = 0
		}
	}
}

// from says whether a datagram can come from peer: what the client is given has
// the address of a host.
func (a *association) from(peer netip.AddrPort) bool {
	addr := peer.Addr()
	return addr.Is6() == a.v6 && (a.own || addr.IsGlobalUnicast() && peer.Port() != 0)
}

// The header of a datagram: two bytes reserved, the number of the fragment, and
// an address.
const (
	socksDatagramHead = 3
	socksHeader4      = socksDatagramHead + 1 + 4 + 2
	socksHeader6      = socksDatagramHead + 1 + 16 + 2
)

// cutSocksHeader returns the far end of a datagram and what is behind the header.
// Not ok: no header, a fragment, which nobody need reassemble (RFC 1928 §7), or a
// name where an address belongs.
func cutSocksHeader(b []byte) (peer netip.AddrPort, payload []byte, ok bool) {
	if len(b) < socksDatagramHead || b[2] != 0 {
		return peer, nil, false
	}
	a, payload, ok := cutSocksAddr(b[socksDatagramHead:])
	if !ok || a.name != "" {
		return peer, nil, false
	}
	return a.addr, payload, true
}

// enclosed is the room for datagrams with their headers.
type enclosed struct {
	dgs  [sendBatch]flow.Datagram
	from [sendBatch]int // the place in the batch of each
	used int
	data [2 * wholeDatagram]byte
	size int
}

var enclosures = sync.Pool{New: func() any { return new(enclosed) }}

func (e *enclosed) reset() {
	clear(e.dgs[:e.used])
	e.used, e.size = 0, 0
}

// WriteBatch is as Packets says.
func (a *association) WriteBatch(dgs []flow.Datagram) (int, error) {
	e := enclosures.Get().(*enclosed)
	defer func() {
		e.reset()
		enclosures.Put(e)
	}()
	for i := range dgs {
		for at, more := 0, true; more; more = at < len(dgs[i].Data) {
			if !e.fits(&dgs[i], at) {
				if n, err := a.flush(e, dgs); err != nil {
					return n, err
				}
			}
			at = e.add(&dgs[i], at)
			e.from[e.used-1] = i
			e.dgs[e.used-1].Peer = a.relay
		}
	}
	if n, err := a.flush(e, dgs); err != nil {
		return n, err
	}
	return len(dgs), nil
}

// partAt returns the part of a datagram that begins at an offset.
func partAt(d *flow.Datagram, at int) []byte {
	if d.Segment == 0 {
		return d.Data[at:]
	}
	return d.Data[at:min(at+d.Segment, len(d.Data))]
}

// fits says whether there is room for the part of d at an offset.
func (e *enclosed) fits(d *flow.Datagram, at int) bool {
	return e.used < len(e.dgs) && e.size+socksHeader6+len(partAt(d, at)) <= len(e.data)
}

// add adds the part of d at an offset, and those behind it that fit as one joined
// datagram. It returns the offset of the next one.
func (e *enclosed) add(d *flow.Datagram, at int) int {
	start, segment := e.size, 0
	for {
		part := partAt(d, at)
		b := append(e.data[:e.size], 0, 0, 0)
		b = appendSocksAddr(b, socksAddr{addr: d.Peer})
		e.size = len(append(b, part...))
		at += len(part)
		size := e.size - start
		if segment == 0 {
			segment = size
		}
		if at >= len(d.Data) || size+segment > maxPayload4 || !e.fits(d, at) {
			if size == segment {
				segment = 0
			}
			e.dgs[e.used] = flow.Datagram{Data: e.data[start:e.size], Segment: segment}
			e.used++
			return at
		}
	}
}

// flush sends what is enclosed. With an error comes the place in dgs that it
// concerns: only one that is too long for its header is a single datagram's.
func (a *association) flush(e *enclosed, dgs []flow.Datagram) (int, error) {
	n, err := a.below.WriteBatch(e.dgs[:e.used])
	if err == nil {
		e.reset()
		return 0, nil
	}
	at := e.from[min(n, e.used-1)]
	var peer *flow.PeerError
	if errors.As(err, &peer) && peer.Reason == flow.TooBig {
		return at, &flow.PeerError{Peer: dgs[at].Peer, Reason: flow.TooBig, Err: peer.Err}
	}
	return at, a.failed(err)
}
