package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Peer is the process that connected to the control socket, by SO_PEERCRED
// and a pidfd: a process that takes over its pid later is not it. It is valid
// during the request that it came with.
type Peer struct {
	PID      int // in the daemon's pid namespace
	UID, GID uint32
	groups   []uint32
	pidfd    int
}

// peerOf asks the kernel who connected. The caller closes the Peer.
func peerOf(c *net.UnixConn) (*Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("peer of control client: %w", err)
	}
	var p *Peer
	var inner error
	err = raw.Control(func(fd uintptr) { p, inner = readPeer(int(fd)) })
	if err = errors.Join(err, inner); err != nil {
		return nil, fmt.Errorf("peer of control client: %w", err)
	}
	return p, nil
}

func readPeer(fd int) (*Peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, os.NewSyscallError("SO_PEERCRED", err)
	}
	groups, err := peerGroups(fd)
	if err != nil {
		return nil, err
	}
	p := &Peer{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid, groups: groups, pidfd: -1}
	if p.PID == 0 {
		return p, nil // of a pid namespace that we do not see into
	}
	// SO_PEERPIDFD (6.5) names the process that connected, whatever became
	// of its pid. On older kernels the one that is opened now is the caller's
	// too, as long as the caller waits for our answer.
	if p.pidfd, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
		return p, nil
	}
	p.pidfd, err = unix.PidfdOpen(p.PID, 0)
	if err != nil {
		p.pidfd = -1 // gone already; what needs it says so
	}
	return p, nil
}

// peerGroups are the supplementary groups of the peer (SO_PEERGROUPS, 4.13).
func peerGroups(fd int) ([]uint32, error) {
	buf := make([]byte, 4*64)
	for {
		size := uint32(len(buf))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size) > len(buf):
			buf = make([]byte, size)
			continue
		case errno != 0:
			return nil, os.NewSyscallError("SO_PEERGROUPS", errno)
		}
		groups := make([]uint32, size/4)
		for i := range groups {
			groups[i] = binary.NativeEndian.Uint32(buf[4*i:])
		}
		return groups, nil
	}
}

func (p *Peer) close() {
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
		p.pidfd = -1
	}
}

// root says whether the peer may change the daemon.
func (p *Peer) root() bool { return p.UID == 0 }

// in says whether the peer is a member of a group.
func (p *Peer) in(gid uint32) bool {
	if p.GID == gid {
		return true
	}
	for _, g := range p.groups {
		if g == gid {
			return true
		}
	}
	return false
}

// Alive returns nil if the process that connected is still there.
func (p *Peer) Alive() error {
	if p.PID == 0 {
		return errors.New("the caller is in a pid namespace that the daemon does not see")
	}
	if p.pidfd < 0 {
		return fmt.Errorf("process %d has gone", p.PID)
	}
	if err := unix.PidfdSendSignal(p.pidfd, 0, nil, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("process %d has gone", p.PID)
	}
	return nil
}

// Pidfd returns a descriptor that names the process (pidfd_open(2)); the caller
// closes it. It is an error if the process has gone.
func (p *Peer) Pidfd() (*os.File, error) {
	if err := p.Alive(); err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(uintptr(p.pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate pidfd of process %d: %w", p.PID, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// Netns returns the inode of the network namespace that the peer is in.
func (p *Peer) Netns() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", p.PID), &st); err != nil {
		return 0, fmt.Errorf("network namespace of process %d: %w", p.PID, err)
	}
	return st.Ino, p.Alive()
}
