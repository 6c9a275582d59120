// Package flow holds the words that capture, routing and outbounds share: what
// a flow is, what its client end looks like, and why one fails. It owns no
// state but the counter of flow ids, and imports nothing of cgtun.
//
// A capture (stack) makes flows and hands them to a Handler (router), which
// finds an outbound (dialer) and moves the bytes (relay).
package flow

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// Proto is an IANA protocol number.
type Proto uint8

// The protocols a flow can have. ICMP stands for ICMPv6 too: the family is
// that of the addresses.
const (
	ICMP Proto = 1
	TCP  Proto = 6
	UDP  Proto = 17
)

// String returns "tcp", "udp" or "icmp".
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMP:
		return "icmp"
	}
	return "unknown"
}

// Home is the id of the attachment of the namespace that cgtun was started in.
const Home = "home"

// Flow says what a client asked for. It is immutable.
type Flow struct {
	ID         uint64 // unique in the life of the process
	Proto      Proto
	Src, Dst   netip.AddrPort // Dst is zero in the Flow of a PacketConn: it has many peers
	Attachment string         // id of the attachment it came in by
	TTL        uint8          // of a TCP flow: how many routers its SYN may still pass; 0: not known
	Start      time.Time
	// Who tells clients of one address apart: processes of home, as far as
	// somebody has looked. Empty: nobody has, or the address is one client's.
	Who string
}

var lastID atomic.Uint64

// New returns a flow that starts now, with the next id.
func New(p Proto, src, dst netip.AddrPort, attachment string) *Flow {
	return &Flow{ID: lastID.Add(1), Proto: p, Src: src, Dst: dst, Attachment: attachment, Start: time.Now()}
}

// Owner is the process behind a flow, as far as it is known. PID 0 and an
// empty Process mean unknown. Process is the path of its program or, where
// that cannot be read, the name that it has given itself: text of a program
// that may be hostile, which grants nothing.
type Owner struct {
	Cgroup   string // path from the root of cgroup2, "/a/b"
	CgroupID uint64
	PID      int
	UID      uint32
	Process  string
	// Lost says that there was somebody, and that nobody knows any more who. Then
	// nothing else is known.
	Lost bool
}

// Conn is one end of a TCP flow.
type Conn interface {
	net.Conn
	// CloseWrite ends our direction with a FIN; reads go on.
	CloseWrite() error
	// Reset ends both directions with a RST, after the peer has got what was
	// written before. It releases the conn like Close.
	Reset() error
}

// Stream is a TCP client whose SYN is not answered yet. Exactly one of Accept
// and Reject is called, once.
type Stream interface {
	Flow() *Flow
	// Begun is called before the flow waits for anybody else: of those that wait for
	// their turn the next one may begin. Accept, Reject and the end say it, too.
	Begun()
	// Accept answers the SYN. Who called it closes the Conn.
	Accept() (Conn, error)
	// Reject tells the client why: RST, an ICMP error or silence. said is as
	// in PacketConn.Unreachable.
	Reject(why Reason, said *ICMPError)
}

// Datagram is what one read or write of a PacketConn moves.
type Datagram struct {
	Peer netip.AddrPort // the remote end, seen from the client
	// Data is the payload, 0 to 65,507 bytes; of ICMP the whole message, whose
	// identifier and checksum are the sender's to write. For ReadBatch the caller
	// gives the buffer, as long as it is, and gets it back cut to length.
	Data []byte
	// Segment, if not 0, says that Data is several datagrams of that many
	// bytes each, the last one maybe shorter (UDP_SEGMENT and UDP_GRO of
	// udp(7)).
	Segment int
	// TTL is how many routers it may still pass, the IPv4 TTL or IPv6 hop limit
	// to send it with, in either direction. 0: the default of who sends it.
	TTL uint8
	// DontFragment says that nobody may cut it up: where it is too large for the
	// path, its sender is told (DF of RFC 791; of IPv6, that it came whole).
	DontFragment bool
}

// PacketConn is one client source: all datagrams from one address and port, or
// all echo requests with one identifier, which stands for the port (RFC 5508),
// to whatever peers (endpoint-independent mapping, RFC 4787 §4.1), and back
// from whatever peers (§5). ReadBatch may be called beside WriteBatch and
// Unreachable, but not beside itself.
type PacketConn interface {
	Flow() *Flow
	// Begun is as in Stream; the second ReadBatch says it, too.
	Begun()
	// ReadBatch waits for at least one datagram. io.EOF: the source was
	// idle for too long, or its attachment has gone.
	ReadBatch([]Datagram) (int, error)
	// WriteBatch sends to the client, each datagram as if from its Peer,
	// and returns how many were sent. It does not keep the data.
	WriteBatch([]Datagram) (int, error)
	// Unreachable tells the client that what it sent to peer did not get
	// there, by ICMP. said is what somebody on the way said of that, which the
	// client gets to hear as it is; nil: nobody did.
	Unreachable(peer netip.AddrPort, why Reason, said *ICMPError) error
	Close() error
}

// Handler takes the flows of a capture. Both methods are called in a goroutine
// of their own, return when the flow has ended, and end early with ctx, which
// is that of the attachment.
type Handler interface {
	ServeStream(context.Context, Stream)
	ServePackets(context.Context, PacketConn)
}
