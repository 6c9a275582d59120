package dialer

import (
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Pulse asks the peer of a socket that has fallen silent whether it is there, long
// before keepalive would: the kernel probes at once and then each second, until
// the peer answers. A server that is slow answers by its kernel; only what is
// not there does not. The socket ends no earlier for it, but with its user
// timeout.
//
// The zero value is for a socket fresh from Direct. Not safe for concurrent use.
type Pulse struct{ asked time.Time }

const (
	pulseEvery = time.Second
	// What is no answer: none to a probe for answerTime, and for some times what the
	// path takes; or to data that was sent again twice.
	answerTime  = 400 * time.Millisecond
	answerTrips = 4
	sentAgain   = 2
)

// Ask begins to ask.
func (p *Pulse) Ask(c *net.TCPConn) error {
	p.asked = time.Now()
	// As many probes as seconds: where the user timeout is lifted (Patience) their
	// number would end the socket.
	return setKeepAlive(c, net.KeepAliveConfig{Idle: pulseEvery, Interval: pulseEvery, Count: int(userTimeout.Seconds())})
}

// Dead says whether nothing comes back: of probes, or of data that was sent again
// and again.
func (p *Pulse) Dead(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	dead := false
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil || info.State != unix.BPF_TCP_ESTABLISHED && info.State != unix.BPF_TCP_FIN_WAIT2 {
			return
		}
		if info.Unacked > 0 {
			dead = info.Backoff >= sentAgain
			return
		}
		// The first probe was sent a second after the last that came, or when we asked.
		heard := time.Duration(min(info.Last_ack_recv, info.Last_data_recv)) * time.Millisecond
		since := min(heard-pulseEvery, time.Since(p.asked))
		closed := info.Notsent_bytes > 0 // a window: see Patience
		dead = !closed && info.Probes > 0 && since >= max(answerTime, answerTrips*time.Duration(info.Rtt)*time.Microsecond)
	})
	return dead
}

// Rest goes back to keepalive as it was, if somebody asked.
func (p *Pulse) Rest(c *net.TCPConn) {
	if !p.asked.IsZero() {
		p.asked = time.Time{}
		_ = setKeepAlive(c, keepAlive)
	}
}

func setKeepAlive(c *net.TCPConn, k net.KeepAliveConfig) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Count),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval.Seconds())),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle.Seconds())))
	})
	return errors.Join(err, failed)
}
