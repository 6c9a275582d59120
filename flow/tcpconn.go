package flow

import (
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

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

// Waiting looks whether a socket has something to say, and leaves it there: n is 1 for
// a byte, 0 without an error for the end; EAGAIN: nothing now. unix.Recvfrom does the
// same, and allocates an address each time.
func Waiting(fd uintptr) (n int, err error) {
	var b [1]byte
	r, _, errno := unix.Syscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
