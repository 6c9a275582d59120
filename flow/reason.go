package flow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Reason is why a flow ended or could not be made.
type Reason uint8

// The reasons, with what a client is told.
const (
	Unknown         Reason = iota // an error nobody has a word for: host unreachable
	Refused                       // RST, or port unreachable
	HostUnreachable               // ICMP host (v4) or address (v6) unreachable
	NetUnreachable                // ICMP net unreachable, no route
	Prohibited                    // ICMP administratively prohibited
	TimedOut                      // the deadline passed: host unreachable
	Reset                         // RST
	Dropped                       // silence, as a rule wanted
	TooBig                        // a datagram larger than the path carries
	Expired                       // ICMP time exceeded: it wanted to pass no more routers than it did
	Closed                        // both sides ended in order
	Canceled                      // the client gave up, or we stop
)

var reasonText = [...]string{
	Unknown: "unknown", Refused: "refused", HostUnreachable: "host unreachable",
	NetUnreachable: "network unreachable", Prohibited: "prohibited", TimedOut: "timed out",
	Reset: "reset", Dropped: "dropped", TooBig: "too big", Expired: "hop limit exceeded", Closed: "closed", Canceled: "canceled",
}

// String returns the reason in words, as in logs and JSON.
func (r Reason) String() string {
	if int(r) < len(reasonText) {
		return reasonText[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Reasoner is an error that knows its reason, such as dialer.Error.
type Reasoner interface{ FlowReason() Reason }

// ReasonOf finds the reason in a chain of errors. It is the only place where
// an errno becomes a Reason. A nil error is Closed.
func ReasonOf(err error) Reason {
	if err == nil {
		return Closed
	}
	var known Reasoner
	if errors.As(err, &known) {
		return known.FlowReason()
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		switch errno {
		case unix.ECONNREFUSED:
			return Refused
		case unix.EHOSTUNREACH, unix.EHOSTDOWN:
			return HostUnreachable
		case unix.ENETUNREACH, unix.ENETDOWN, unix.ENONET, unix.EADDRNOTAVAIL:
			return NetUnreachable
		case unix.EACCES, unix.EPERM:
			return Prohibited
		case unix.ETIMEDOUT:
			return TimedOut
		case unix.ECONNRESET, unix.EPIPE, unix.ECONNABORTED:
			return Reset
		case unix.EMSGSIZE:
			return TooBig
		}
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return TimedOut
	}
	return Unknown
}

// PeerError is a failure of one peer of a PacketConn: the conn goes on.
type PeerError struct {
	Peer   netip.AddrPort
	Reason Reason
	ICMP   *ICMPError // what somebody on the way said; nil: nobody did
	Err    error
}

func (e *PeerError) Error() string { return fmt.Sprintf("send to %s: %v", e.Peer, e.Err) }
func (e *PeerError) Unwrap() error { return e.Err }

// FlowReason lets ReasonOf find the reason.
func (e *PeerError) FlowReason() Reason { return e.Reason }

// ICMPError is an ICMP error about what a client sent (RFC 792, RFC 4443).
type ICMPError struct {
	From       netip.Addr // who said it; zero: the kernel here, for its own part
	Type, Code uint8      // of the family of what was sent
	TTL        uint8      // as a Datagram's: of the error itself
	Info       uint32     // the MTU of "too big", the pointer of "parameter problem", else 0
	// Quote is the beginning of what could not be sent on, as the outbound sent
	// it: of UDP the payload, of ICMP the message, of TCP nothing.
	Quote []byte
}

func (e *ICMPError) Error() string {
	if !e.From.IsValid() {
		return fmt.Sprintf("ICMP type %d code %d", e.Type, e.Code)
	}
	return fmt.Sprintf("ICMP type %d code %d from %s", e.Type, e.Code, e.From)
}

// Said returns what somebody on the way said in a chain of errors, or nil.
func Said(err error) *ICMPError {
	var e *ICMPError
	if errors.As(err, &e) {
		return e
	}
	return nil
}
