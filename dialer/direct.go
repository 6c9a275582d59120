package dialer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// A path that is dead is found within 15 s and never left silent (tcp(7)):
// probes find it where nothing is sent, the user timeout where something is.
// It overrides the count of probes, and at 15 s would wait for one more.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 3 * time.Second, Count: 3}

const userTimeout = 14 * time.Second

// Mark is an fwmark under a mask.
type Mark struct{ Value, Mask uint32 }

// Direct is the outbound without a proxy: kernel sockets of the namespace that
// cgtun runs in, by the main table, or by one interface, from one source
// address, with one fwmark. It dials the address that it is asked for and that
// alone: to choose among several is the client's part (RFC 8305). It holds
// nothing open, so that nothing is to be closed. Safe for concurrent use.
//
// Own sockets are not captured: the selector exempts cgtun's own cgroup, and
// Direct never sets a mark that captures nor takes a route of cgtun's.
type Direct struct {
	name   string
	path   []string
	via    *uplink // nil: any interface
	source netip.Addr
	mark   uint32

	listening atomic.Int32 // dials that listen for who ends them
}

// maxListening bounds them: each has one more descriptor, and where thousands dial
// nobody looks who it was.
const maxListening = 16

// NewDirect makes an outbound of TypeDirect. It looks nothing up: an interface
// or a source address that is not there may come later, and State says so.
// capture has the marks that lead into a tun; to send with one of them would be
// a loop, and is an error.
func NewDirect(c Config, capture ...Mark) (*Direct, error) {
	if c.Type != TypeDirect && c.Type != "" {
		return nil, fmt.Errorf("make outbound %q: type %q is not direct", c.Name, c.Type)
	}
	if c.MPTCP {
		return nil, fmt.Errorf("make outbound %q: mptcp is not in this version", c.Name)
	}
	if c.Mark != 0 && captures(c.Mark, capture) {
		return nil, fmt.Errorf("make outbound %q: mark %#x is one that [route] captures by; take another one", c.Name, c.Mark)
	}
	d := &Direct{name: c.Name, path: []string{c.Name}, source: c.Source.Unmap(), mark: c.Mark}
	if c.Interface != "" {
		d.via = &uplink{name: c.Interface, source: d.source, mark: c.Mark, capture: capture}
	}
	return d, nil
}

func captures(mark uint32, capture []Mark) bool {
	for _, m := range capture {
		if (mark^m.Value)&m.Mask == 0 {
			return true
		}
	}
	return false
}

// Name implements Outbound.
func (d *Direct) Name() string { return d.name }

// Type implements Hop.
func (d *Direct) Type() string { return TypeDirect }

// Path implements Hop.
func (d *Direct) Path() []string { return d.path }

// Leaves implements Leaver.
func (d *Direct) Leaves() []Leave {
	l := Leave{Source: d.source, Mark: d.mark}
	if d.via != nil {
		l.Interface = d.via.name
	}
	return []Leave{l}
}

// DialStream implements Outbound. The deadline of ctx is that of the connect;
// when it is over, ctx has no hold on the conn.
func (d *Direct) DialStream(ctx context.Context, t Target) (*Conn, error) {
	dst := netip.AddrPortFrom(t.Addr.Addr().Unmap(), t.Addr.Port())
	w, err := d.way(dst.Addr())
	if err != nil {
		return nil, d.fail("route", dst, err)
	}
	dialer := net.Dialer{KeepAliveConfig: keepAlive}
	if w.special() {
		dialer.Control = w.control
	}
	var c *net.TCPConn
	switch {
	case t.isProbe():
		c, err = dialProbe(ctx, dialer, w, t.Flow.TTL, dst)
	case t.Flow != nil && d.listen():
		c, err = dialProbe(ctx, dialer, w, kernelTTL, dst)
		d.listening.Add(-1)
	default:
		c, err = dialer.DialTCP(ctx, "tcp", w.local(), dst)
	}
	if err != nil {
		failed := d.fail("connect", dst, WhyEnded(ctx, err))
		if !t.isProbe() {
			// What somebody on this path has said is not what the target says.
			failed.Reason = flow.ReasonOf(failed.Err)
		}
		return nil, failed
	}
	// Not before the connect, which has a deadline of its own.
	if err := configure(c); err != nil {
		_ = c.Close()
		return nil, d.fail("configure", dst, err)
	}
	return &Conn{Conn: flow.NewTCPConn(c), Path: d.path}, nil
}

// listen takes one of the places of maxListening, if there is one.
func (d *Direct) listen() bool {
	if d.listening.Add(1) <= maxListening {
		return true
	}
	d.listening.Add(-1)
	return false
}

// fail makes an Error. The kernel's word on what was tried is better than ours.
func (d *Direct) fail(op string, dst netip.AddrPort, err error) *Error {
	if d.via != nil && errors.Is(err, unix.EADDRNOTAVAIL) {
		d.via.forget()
	}
	var call *os.SyscallError
	if errors.As(err, &call) {
		switch call.Syscall {
		case "bind":
			op = "bind"
		case "socket":
			op = "open"
		case "setsockopt":
			op = "configure"
		}
	}
	// What net says around it ("dial tcp 192.0.2.1:80->…") the Error says.
	said := flow.Said(err)
	var outer *net.OpError
	if errors.As(err, &outer) && outer.Err != nil {
		err = outer.Err
	}
	if said != nil {
		err = fmt.Errorf("%w: %w", err, said)
	}
	return &Error{Hop: d.name, Op: op, Addr: dst, Reason: saidReason(flow.ReasonOf(err), said, dst.Addr().Is4()), Err: err}
}

// configure sets what a connected socket needs. Urgent bytes come in line
// (RFC 6093 §6): otherwise they would lie between the others as a hole that
// SIOCINQ does not see behind.
func configure(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = os.NewSyscallError("setsockopt", errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds())),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)))
	})
	return errors.Join(err, failed)
}

// way is how a socket leaves: what is set on it before it connects.
type way struct {
	device string     // SO_BINDTODEVICE of socket(7); empty: any
	source netip.Addr // bound to; zero: the kernel's choice
	mark   uint32     // SO_MARK; 0: none
}

// way returns how a socket to dst must leave, or a *noWay: there is none.
func (d *Direct) way(dst netip.Addr) (way, error) {
	if d.source.IsValid() && d.source.Is4() != dst.Is4() {
		return way{}, &noWay{fmt.Sprintf("source %s is of the other family", d.source)}
	}
	if d.via != nil {
		return d.via.way(dst)
	}
	return way{source: d.source, mark: d.mark}, nil
}

func (w *way) special() bool { return *w != way{} }

func (w *way) local() netip.AddrPort {
	if !w.source.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(w.source, 0)
}

// control is for net.Dialer and net.ListenConfig.
func (w *way) control(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) { failed = w.apply(int(fd)) })
	return errors.Join(err, failed)
}

// apply sets what the way wants on a socket that is not bound yet.
func (w *way) apply(fd int) error {
	if w.mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(w.mark)); err != nil {
			return fmt.Errorf("set mark %#x: %w", w.mark, os.NewSyscallError("setsockopt", err))
		}
	}
	if w.device != "" {
		if err := unix.BindToDevice(fd, w.device); err != nil {
			return fmt.Errorf("bind to interface %s: %w", w.device, os.NewSyscallError("setsockopt", err))
		}
	}
	if w.source.IsValid() {
		// The port is chosen by connect(2), per destination: bind(2) would
		// take one of 28,000 from all of them.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

// State says whether the outbound can be used at all, and if not why, in words
// for the user. It asks the kernel anew each time.
func (d *Direct) State() (up bool, reason string) {
	if d.source.IsValid() {
		if reason := missingSource(d.source); reason != "" {
			return false, reason
		}
	}
	if d.via == nil {
		return true, ""
	}
	if reason := d.via.down(); reason != "" {
		return false, reason
	}
	return true, ""
}
