package dialer

import (
	"net"
	"net/netip"

	"cgtun/flow"
)

// Carries says whether there is a way by o to an address, as far as that is known
// without sending anything: false where the kernel has no route. It takes
// microseconds.
func Carries(o Outbound, dst netip.Addr) bool {
	c, ok := o.(interface{ Carries(netip.Addr) bool })
	return !ok || c.Carries(dst)
}

// Carries is for the function of that name.
func (d *Direct) Carries(dst netip.Addr) bool {
	w, err := d.way(dst)
	if err == nil {
		dialer := net.Dialer{}
		if w.special() {
			dialer.Control = w.control
		}
		if local := w.local(); local.IsValid() {
			dialer.LocalAddr = net.UDPAddrFromAddrPort(local)
		}
		var c net.Conn
		const discard = 9
		if c, err = dialer.Dial("udp", netip.AddrPortFrom(dst, discard).String()); err == nil {
			c.Close()
		}
	}
	return flow.ReasonOf(err) != flow.NetUnreachable
}
