package dialer

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// probeTTL is below every default of TTLs: who sends what may pass fewer routers
// looks for them (traceroute).
const probeTTL = 30

// isProbe says whether a connection is to get its client's TTL; others get the
// kernel's own.
func (t *Target) isProbe() bool {
	return t.Flow != nil && t.Flow.TTL > 0 && t.Flow.TTL < probeTTL && t.Addr == t.Flow.Dst
}

// probing is a connect of which the ICMP error is wanted that ends it.
type probing struct {
	way way
	ttl uint8
	v6  bool
	fd  int // of the socket too: net closes its own before it could be asked
}

// dialProbe is DialTCP for a SYN of that TTL (kernelTTL: as the kernel would). An
// error wraps a *flow.ICMPError where somebody on the way sent one. That costs a
// descriptor and five calls.
func dialProbe(ctx context.Context, d net.Dialer, w way, ttl uint8, dst netip.AddrPort) (*net.TCPConn, error) {
	p := &probing{way: w, ttl: ttl, v6: dst.Addr().Is6(), fd: -1}
	d.Control = p.control
	c, err := d.DialTCP(ctx, "tcp", w.local(), dst)
	if p.fd < 0 {
		return c, err
	}
	defer unix.Close(p.fd)
	if err != nil {
		if said := p.said(); said != nil {
			return nil, fmt.Errorf("%w: %w", said, err)
		}
		return nil, err
	}
	// An open connection is not ended by ICMP (RFC 5382 REQ-10).
	level, recvErr := p.recvErr()
	if err := unix.SetsockoptInt(p.fd, level, recvErr, 0); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (p *probing) recvErr() (level, option int) {
	if p.v6 {
		return unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	return unix.SOL_IP, unix.IP_RECVERR
}

// control is for net.Dialer.
func (p *probing) control(network, address string, c syscall.RawConn) error {
	if p.way.special() {
		if err := p.way.control(network, address, c); err != nil {
			return err
		}
	}
	var failed error
	err := c.Control(func(fd uintptr) { failed = p.apply(int(fd)) })
	if err != nil {
		return err
	}
	return failed
}

func (p *probing) apply(fd int) error {
	level, recvErr := p.recvErr()
	ttl := unix.IP_TTL
	if p.v6 {
		ttl = unix.IPV6_UNICAST_HOPS
	}
	if p.ttl != kernelTTL {
		if err := unix.SetsockoptInt(fd, level, ttl, int(p.ttl)); err != nil {
			return fmt.Errorf("set TTL %d: %w", p.ttl, err)
		}
	}
	if err := unix.SetsockoptInt(fd, level, recvErr, 1); err != nil {
		return fmt.Errorf("ask for ICMP errors: %w", err)
	}
	if p.fd >= 0 { // net tries again where it has met itself
		_ = unix.Close(p.fd)
	}
	twin, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	p.fd = twin
	return err
}

// said is the ICMP error that ended the connect.
func (p *probing) said() *flow.ICMPError {
	var oob [recvControl]byte
	_, n, _, _, err := unix.Recvmsg(p.fd, nil, oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil
	}
	for _, m := range messages {
		if errno, said := extendedError(m.Header.Level, m.Header.Type, m.Data); errno != 0 && said != nil {
			return said
		}
	}
	return nil
}
