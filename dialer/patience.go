package dialer

import (
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// PatienceEvery is how often Patience.Check is to be called: some times within
// the user timeout, which counts from the moment that the window closed.
const PatienceEvery = 4 * time.Second

// Patience keeps an outbound socket alive whose peer lives and does not read.
// The user timeout, which ends a path that is dead, ends that one too: since
// Linux 5.11 it counts from the first probe of a closed window, answered or
// not (tcp_probe_timer of net/ipv4/tcp_timer.c), or from the first repetition of
// what a receiver had no memory for (tcp_rtx_probe0_timed_out). Check lifts it
// while the peer takes nothing and answers.
//
// The zero value is for a socket fresh from Direct. Not safe for concurrent
// use.
type Patience struct{ lifted bool }

const (
	// Probes without an answer after which a peer is not believed to live.
	deadProbes = 3
	// While the timeout is lifted, probes are at most this far apart, where
	// the kernel can be told so (6.15); else they back off up to 2 min, and
	// a path that dies meanwhile is found as much later.
	probeEvery = 5 * time.Second
)

// Check looks at the socket and sets its user timeout. An error means that the
// socket is closed.
func (p *Patience) Check(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = p.check(int(fd)) })
	return errors.Join(err, failed)
}

func (p *Patience) check(fd int) error {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return err
	}
	lift := p.lives(info)
	if lift == p.lifted {
		return nil
	}
	timeout := userTimeout
	if lift {
		timeout = 0
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, int(probeEvery.Milliseconds()))
	}
	p.lifted = lift
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds()))
}

// lives says whether the peer takes nothing, and answers.
func (p *Patience) lives(i *unix.TCPInfo) bool {
	if i.Unacked == 0 {
		// Something to send, nothing on its way: only a closed window does
		// that for longer than a moment.
		return i.Notsent_bytes > 0 && i.Probes < deadProbes
	}
	// What is repeated was dropped there, or is lost: an answer to the last one
	// tells. One that is on its way just now is no sign of death.
	answered := i.Last_ack_recv <= i.Last_data_sent
	lately := time.Duration(i.Last_ack_recv)*time.Millisecond < deadProbes*probeEvery
	return i.Backoff > 0 && (answered || p.lifted && lately)
}
