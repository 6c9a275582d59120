// Package dialer has the outbounds: one way out each. An Outbound dials the
// target of a flow and says which path the connection took and, when it fails,
// at which hop and why.
//
// It owns the outbound sockets until they are handed out. It knows nothing of
// captures: a flow's target is all that it is given. router and group call it;
// cmd makes the outbounds.
package dialer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"cgtun/flow"
)

// Target is what a flow wants. Addr is the address that the client dialled and
// the one that is dialled.
type Target struct {
	Flow  *flow.Flow // nil: for cgtun itself, such as a probe, or a connection to the server of a proxy
	Addr  netip.AddrPort
	Name  string   // as which the client itself looked Addr up; a proxy may be asked for it
	Avoid []string // outbounds that failed this flow already: groups leave them out
}

// Outbound is one way out, or a group that looks like one. Safe for concurrent
// use.
type Outbound interface {
	Name() string
	// DialStream connects a TCP flow. The caller closes the Conn. Errors are
	// or wrap *Error.
	DialStream(context.Context, Target) (*Conn, error)
	// OpenPackets makes a socket for one source, to be used for all of its
	// peers of Addr's family. The caller closes it. ErrUnsupported: this
	// outbound cannot carry datagrams.
	OpenPackets(context.Context, Target) (*PacketConn, error)
}

// Echoer is an Outbound that can carry ICMP echo.
type Echoer interface {
	// OpenEcho is OpenPackets for echo: requests out, replies back, each as a
	// whole ICMP message.
	OpenEcho(context.Context, Target) (*PacketConn, error)
}

// OpenEcho opens o for ICMP echo. ErrUnsupported: it cannot carry that.
func OpenEcho(ctx context.Context, o Outbound, t Target) (*PacketConn, error) {
	if err := CanEcho(o); err != nil {
		return nil, err
	}
	return o.(Echoer).OpenEcho(ctx, t)
}

// CanEcho says that o cannot carry ICMP echo, with ErrUnsupported, or nil.
func CanEcho(o Outbound) error {
	_, ok := o.(Echoer)
	if e, is := o.(interface{ CarriesEcho() bool }); !ok || is && !e.CarriesEcho() {
		return fmt.Errorf("outbound %q: carry ICMP: %w", o.Name(), errors.ErrUnsupported)
	}
	return nil
}

// CanOpenPackets says that o cannot carry datagrams, with ErrUnsupported, or nil:
// as far as that is known beforehand.
func CanOpenPackets(o Outbound) error {
	if p, ok := o.(interface{ CarriesPackets() bool }); ok && !p.CarriesPackets() {
		return fmt.Errorf("outbound %q: carry datagrams: %w", o.Name(), errors.ErrUnsupported)
	}
	return nil
}

// Leave is how sockets leave this machine, as far as an outbound says so; the zero
// Leave is how every socket does.
type Leave struct {
	Interface string     // bound to it; empty: to none
	Source    netip.Addr // zero: the kernel's choice
	Mark      uint32
}

// Leaver is an Outbound that says how its sockets leave. A group says it for all
// of its members.
type Leaver interface{ Leaves() []Leave }

// Leaves returns how the sockets of o leave. The caller does not change it.
func Leaves(o Outbound) []Leave {
	if l, ok := o.(Leaver); ok {
		return l.Leaves()
	}
	return []Leave{{}}
}

// Meter is told of dials. Safe for concurrent use; it does not block.
type Meter interface {
	// Dialled is called for a stream that outbound was asked for, when that took
	// so long. why is flow.Closed if it connected.
	Dialled(outbound string, took time.Duration, why flow.Reason)
}

// Conn is a connected outbound stream.
type Conn struct {
	flow.Conn
	Path []string // outbound names, the nearest hop first
	// Report, if not nil, wants to hear how the conn does; Ended once and
	// last. Safe for concurrent use; it returns at once.
	Report func(Outcome)

	ended atomic.Bool // that was told
}

// Tell reports, if somebody wants to hear it. Ended is told once.
func (c *Conn) Tell(o Outcome) {
	if c.Report == nil || o.News == Ended && c.ended.Swap(true) {
		return
	}
	c.Report(o)
}

// Close closes the conn. Who has not told of its end has no more to say than that.
func (c *Conn) Close() error {
	c.Tell(Outcome{News: Ended})
	return c.Conn.Close()
}

// Packets moves datagrams through an outbound. ReadBatch may be called beside
// WriteBatch, but neither beside itself. An error that is a *flow.PeerError
// concerns one peer; the conn goes on.
type Packets interface {
	ReadBatch([]flow.Datagram) (int, error)
	WriteBatch([]flow.Datagram) (int, error)
	Close() error
}

// PacketConn is an open outbound for datagrams.
type PacketConn struct {
	Packets
	Path []string
	// Local is the address of this machine that the socket is bound to, which the
	// kernel does not end it with; zero: to none.
	Local   netip.Addr
	Sockets int // descriptors that it holds; 0: one
}

// Error is a failed dial.
type Error struct {
	Hop    string         // the outbound at which it failed
	Op     string         // what was tried: "connect", "bind", "open", "configure", "resolve", "greet", "ask", "associate"
	Addr   netip.AddrPort // with which; zero: no address was known yet
	Reason flow.Reason
	Err    error
}

func (e *Error) Error() string {
	if !e.Addr.IsValid() {
		return fmt.Sprintf("outbound %q: %s: %v", e.Hop, e.Op, e.Err)
	}
	return fmt.Sprintf("outbound %q: %s %s: %v", e.Hop, e.Op, e.Addr, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// FlowReason lets flow.ReasonOf find the reason.
func (e *Error) FlowReason() flow.Reason { return e.Reason }
