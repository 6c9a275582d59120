package stack

import "sync/atomic"

// Stats says what a stack holds and what it turned away. All but the gauges
// only grow.
type Stats struct {
	// Packets that never reached netstack.
	NotLocal      uint64 // from an address that is not of the namespace
	Malformed     uint64 // impossible headers
	BadChecksum   uint64 // wrong sums of raw sockets
	Expired       uint64 // may pass no router any more: answered with time exceeded
	Multicast     uint64 // to more than one host, or to none in particular
	OtherProtocol uint64 // neither TCP, UDP nor ICMP: answered with protocol unreachable
	Fragmented    uint64 // TCP segments in fragments that made room for others
	ICMP          uint64 // ICMP that is no echo request
	Unread        uint64 // reads of the device that failed
	Unwritten     uint64 // packets that the device did not take

	// Streams.
	OddSYN            uint64 // SYN with FIN or RST
	LateSYN           uint64 // SYN for ports whose last connection does not end, or too many to wait for that
	Pending           int    // gauge: clients that wait for their outbound or their handshake
	Evicted           uint64 // pending, ended for room in all
	EvictedSource     uint64 // for room of their source
	EvictedDest       uint64 // for room of their destination
	GaveUp            uint64 // the client stopped asking
	Cut               uint64 // receive buffers made smaller than was promised, for want of memory
	Accepted          uint64
	Conns             int // gauge: accepted and not closed by us
	ICMPErrorsLimited uint64

	UDP, Echo UDPCounters
}

type counters struct {
	notLocal, malformed, badSum, multicast, otherProto, icmp, expired, unread, unwritten, fragmented atomic.Uint64

	oddSYN, lateSYN, evicted, evictedSource, evictedDest, gaveUp atomic.Uint64
	cut, accepted, rejected, limited                             atomic.Uint64
	conns                                                        atomic.Int64
}

// Stats returns what has been counted so far.
func (s *Stack) Stats() Stats {
	c := &s.count
	return Stats{
		NotLocal:          c.notLocal.Load(),
		Malformed:         c.malformed.Load(),
		BadChecksum:       c.badSum.Load(),
		Expired:           c.expired.Load(),
		Multicast:         c.multicast.Load(),
		OtherProtocol:     c.otherProto.Load(),
		Fragmented:        c.fragmented.Load(),
		ICMP:              c.icmp.Load(),
		Unread:            c.unread.Load(),
		Unwritten:         c.unwritten.Load(),
		OddSYN:            c.oddSYN.Load(),
		LateSYN:           c.lateSYN.Load(),
		Pending:           s.tcp.table.len(),
		Evicted:           c.evicted.Load(),
		EvictedSource:     c.evictedSource.Load(),
		EvictedDest:       c.evictedDest.Load(),
		GaveUp:            c.gaveUp.Load(),
		Cut:               c.cut.Load(),
		Accepted:          c.accepted.Load(),
		Conns:             int(c.conns.Load()),
		ICMPErrorsLimited: c.limited.Load(),
		UDP:               s.udp.counters(),
		Echo:              s.echo.counters(),
	}
}
