package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables/binaryutil"
	mdl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Origins tells whom a client meant that chain names has led to loopback, by
// the kernel's table of connections (linux/netfilter/nfnetlink_conntrack.h).
// Safe for concurrent use.
type Origins struct {
	mu sync.Mutex
	// fd is a plain socket: what the kernel says of one connection is flagged as
	// one part of many, and mdlayher/netlink would wait for the others.
	fd     int
	number uint32 // of the last question
	buf    [4096]byte
}

// The messages and attributes of that table that are needed here.
const (
	ctGet = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1

	ctOrig, ctReply   = 1, 2
	ctIP, ctProto     = 1, 2
	ctSrc4, ctDst4    = 1, 2
	ctSrc6, ctDst6    = 3, 4
	ctNumber          = 1
	ctSrcPort, ctDest = 2, 3
)

// OpenOrigins opens a socket in the namespace of the calling thread. The error
// says that the kernel does not tell. The caller closes it.
func OpenOrigins() (*Origins, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack netlink: %w", err)
	}
	o := &Origins{fd: fd}
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	if err == nil {
		nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 1)
		_, err = o.Of(unix.IPPROTO_UDP, nobody, nobody)
	}
	if !errors.Is(err, unix.ENOENT) {
		return nil, errors.Join(err, o.Close())
	}
	return o, nil
}

// Close closes the socket.
func (o *Origins) Close() error { return unix.Close(o.fd) }

// Of returns the address to which from has sent what came to here, by the
// protocol of that IANA number. It takes microseconds.
func (o *Origins) Of(proto uint8, from, here netip.AddrPort) (netip.AddrPort, error) {
	src, dst, family := uint16(ctSrc4), uint16(ctDst4), byte(unix.AF_INET)
	if here.Addr().Is6() {
		src, dst, family = ctSrc6, ctDst6, unix.AF_INET6
	}
	e := mdl.NewAttributeEncoder()
	e.Nested(ctReply, func(e *mdl.AttributeEncoder) error {
		e.Nested(ctIP, func(e *mdl.AttributeEncoder) error {
			e.Bytes(src, here.Addr().AsSlice())
			e.Bytes(dst, from.Addr().AsSlice())
			return nil
		})
		e.Nested(ctProto, func(e *mdl.AttributeEncoder) error {
			e.Uint8(ctNumber, proto)
			e.Bytes(ctSrcPort, bigEndian(here.Port()))
			e.Bytes(ctDest, bigEndian(from.Port()))
			return nil
		})
		return nil
	})
	attributes, err := e.Encode()
	if err != nil {
		return netip.AddrPort{}, err
	}
	answer, err := o.ask(append([]byte{family, 0, 0, 0}, attributes...))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("look up the connection of %s: %w", from, err)
	}
	var meant netip.AddrPort
	d, err := mdl.NewAttributeDecoder(answer)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for d.Next() {
		if d.Type() == ctOrig {
			d.Nested(func(d *mdl.AttributeDecoder) error { meant = destination(d, dst); return nil })
		}
	}
	if !meant.IsValid() {
		return meant, fmt.Errorf("look up the connection of %s: %w", from, unix.ENOENT)
	}
	return meant, nil
}

// ask sends a message, and returns the attributes of the answer.
func (o *Origins) ask(data []byte) ([]byte, error) {
	const header, nfgenmsg = 16, 4 // of netlink; and family, version, number
	o.mu.Lock()
	defer o.mu.Unlock()
	o.number++
	m := mdl.Message{Header: mdl.Header{Length: uint32(header + len(data)), Type: ctGet, Flags: mdl.Request, Sequence: o.number}, Data: data}
	b, err := m.MarshalBinary()
	if err != nil {
		return nil, err
	}
	if err := unix.Sendto(o.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	for {
		n, _, err := unix.Recvfrom(o.fd, o.buf[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := m.UnmarshalBinary(o.buf[:n]); err != nil {
			return nil, err
		}
		switch {
		case m.Header.Sequence != o.number:
		case m.Header.Type == mdl.Error && len(m.Data) >= 4:
			return nil, unix.Errno(-int32(binaryutil.NativeEndian.Uint32(m.Data)))
		case len(m.Data) < nfgenmsg:
			return nil, unix.EBADMSG
		default:
			return slices.Clone(m.Data[nfgenmsg:]), nil
		}
	}
}

// destination reads one direction of a connection.
func destination(d *mdl.AttributeDecoder, dst uint16) netip.AddrPort {
	var addr netip.Addr
	var port uint16
	for d.Next() {
		switch d.Type() {
		case ctIP:
			d.Nested(func(d *mdl.AttributeDecoder) error {
				for d.Next() {
					if d.Type() == dst {
						addr, _ = netip.AddrFromSlice(d.Bytes())
					}
				}
				return nil
			})
		case ctProto:
			d.Nested(func(d *mdl.AttributeDecoder) error {
				for d.Next() {
					if b := d.Bytes(); d.Type() == ctDest && len(b) == 2 {
						port = uint16(b[0])<<8 | uint16(b[1])
					}
				}
				return nil
			})
		}
	}
	if !addr.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr, port)
}

func bigEndian(v uint16) []byte { return []byte{byte(v >> 8), byte(v)} }
