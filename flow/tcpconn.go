package flow

import "net"

// TCPConn is a kernel socket as a Conn. It hides nothing of the socket: relay
// finds it by TCP and moves bytes without a copy of its own.
type TCPConn struct{ *net.TCPConn }

// NewTCPConn wraps c, and owns it from now on.
func NewTCPConn(c *net.TCPConn) TCPConn { return TCPConn{c} }

// TCP returns the socket. It stays owned by the Conn.
func (c TCPConn) TCP() *net.TCPConn { return c.TCPConn }

// Reset closes the socket with a RST (SO_LINGER 0 of socket(7)). The kernel
// throws away what the peer has not acknowledged yet, so who must deliver it
// waits for the send queue first; relay does.
func (c TCPConn) Reset() error {
	if err := c.SetLinger(0); err != nil {
		return err
	}
	return c.Close()
}
