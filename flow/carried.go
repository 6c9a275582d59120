package flow

import "net"

// Carried is a Conn whose bytes go by another one in another form, such as TLS.
type Carried interface{ Carrier() Conn }

// Socket returns the kernel socket by which the bytes of c go in the end, in
// whatever form, or nil. It is to look at and to set: bytes go by c.
func Socket(c Conn) *net.TCPConn {
	for {
		switch known := c.(type) {
		case interface{ TCP() *net.TCPConn }:
			return known.TCP()
		case Carried:
			c = known.Carrier()
		default:
			return nil
		}
	}
}
