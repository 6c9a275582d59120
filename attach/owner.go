package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// The parts of sock_diag(7) and linux/inet_diag.h that netlink does not name
// or does not parse.
const (
	sockDiagByFamily = 20
	inetDiagCgroupID = 21
	inetDiagMsgLen   = 72 // struct inet_diag_msg
	remotePortOffset = 6
	cookieOffset     = 44
	uidOffset        = 64
	inodeOffset      = 68
	anyState         = 0xffffffff
)

// asker is a socket for sock_diag. It belongs to the namespace that it was
// opened in and would keep that alive: so it is kept open at home alone. To open
// one for each question, and to look first where one is, takes four times as
// long as the question. Safe for concurrent use.
type asker struct{ socket *nl.SocketHandle }

// openAsker opens one in the namespace it runs in. The caller closes it.
func openAsker() (*asker, error) {
	s, err := nl.Subscribe(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open socket for sock_diag: %w", err)
	}
	if err := s.SetReceiveTimeout(&askTime); err != nil {
		s.Close()
		return nil, fmt.Errorf("bound answers of sock_diag: %w", err)
	}
	return &asker{&nl.SocketHandle{Socket: s}}, nil
}

// askTime is how long the kernel may take for an answer: it has them ready.
var askTime = unix.Timeval{Sec: 1}

// close lets questions under way fail.
func (a *asker) close() { a.socket.Close() }

// diagRequest is struct inet_diag_req_v2 for one socket, or, as its zero value with
// family and protocol, for all.
type diagRequest struct {
	family, proto  uint8
	local, remote  netip.AddrPort
	device         int  // sockets that are bound to another one are not meant
	swapSrcAndDest bool // as udp_diag wants it, "for historical reasons"
}

func (r *diagRequest) Len() int { return 56 }

func (r *diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0], b[1] = r.family, r.proto
	binary.NativeEndian.PutUint32(b[4:], anyState)
	src, dst := r.local, r.remote
	if r.swapSrcAndDest {
		src, dst = dst, src
	}
	binary.BigEndian.PutUint16(b[8:], src.Port())
	binary.BigEndian.PutUint16(b[10:], dst.Port())
	copy(b[12:28], src.Addr().AsSlice())
	copy(b[28:44], dst.Addr().AsSlice())
	binary.NativeEndian.PutUint32(b[44:], uint32(r.device))
	for i := 48; i < 56; i++ {
		b[i] = 0xff // INET_DIAG_NOCOOKIE
	}
	return b
}

// socket is what sock_diag says of a client's socket.
type socket struct {
	uid      uint32
	cookie   uint64
	cgroupID uint64
}

// errClosed says that there is no socket any more.
var errClosed = errors.New("its socket is closed")

// find returns the socket behind a flow that came in by a device, or errClosed. It
// returns nil for what the kernel sends itself.
func (a *asker) find(f *flow.Flow, device int) (*socket, error) {
	family := uint8(unix.AF_INET)
	if f.Src.Addr().Is6() {
		family = unix.AF_INET6
	}
	req := nl.NewNetlinkRequest(sockDiagByFamily, 0)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: a.socket}
	req.AddData(&diagRequest{
		family: family, proto: uint8(f.Proto),
		local: f.Src, remote: f.Dst, device: device, swapSrcAndDest: f.Proto == flow.UDP,
	})
	answers, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, errClosed
	}
	if err != nil {
		return nil, fmt.Errorf("ask sock_diag for the socket of %s: %w", f.Src, err)
	}
	if len(answers) == 0 || len(answers[0]) < inetDiagMsgLen {
		return nil, errClosed
	}
	msg := answers[0]
	// Where there is no connection the kernel names who listens at its port.
	if f.Proto == flow.TCP && binary.BigEndian.Uint16(msg[remotePortOffset:]) != f.Dst.Port() {
		return nil, errClosed
	}
	// What nobody has open has no inode, and root for its user: of TCP that was
	// closed and has not ended, of UDP that is the kernel's own.
	switch {
	case binary.NativeEndian.Uint32(msg[inodeOffset:]) != 0:
	case f.Proto == flow.TCP:
		return nil, errClosed
	default:
		return nil, nil
	}
	return parseSocket(msg, f)
}

func parseSocket(msg []byte, f *flow.Flow) (*socket, error) {
	s := &socket{uid: binary.NativeEndian.Uint32(msg[uidOffset:]), cookie: binary.NativeEndian.Uint64(msg[cookieOffset:])}
	attrs, err := nl.ParseRouteAttr(msg[inetDiagMsgLen:])
	if err != nil {
		return nil, fmt.Errorf("read sock_diag's answer for %s: %w", f.Src, err)
	}
	for _, a := range attrs {
		if a.Attr.Type == inetDiagCgroupID && len(a.Value) >= 8 {
			s.cgroupID = binary.NativeEndian.Uint64(a.Value)
		}
	}
	return s, nil
}

// Owner says whose flow it is, by sock_diag in the flow's namespace. Nil without an
// error: it is of no process here, but a ping, the kernel's own or of another
// machine. An error: its socket is closed, or the kernel did not tell. It takes a
// second at most, and does not begin after ctx has ended. Safe for concurrent use.
func (m *Manager) Owner(ctx context.Context, f *flow.Flow) (*flow.Owner, error) {
	if f.Proto != flow.TCP && f.Proto != flow.UDP {
		return nil, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("ask for the owner of %s: %w", f.Src, err)
	}
	a := m.find(f.Attachment)
	if a == nil {
		return nil, nil
	}
	s, err := a.ask(f)
	if _, own := a.around.Load().local[f.Src.Addr()]; errors.Is(err, errClosed) && !own {
		return nil, nil
	}
	if err != nil || s == nil {
		return nil, err
	}
	owner := &flow.Owner{CgroupID: s.cgroupID, UID: s.uid}
	if m.opts.CgroupPath != nil {
		owner.Cgroup, _ = m.opts.CgroupPath(s.cgroupID)
	}
	if m.opts.Process != nil {
		owner.PID, owner.Process, _ = m.opts.Process(s.cookie)
	}
	return owner, nil
}

// Left returns those of the sources of datagrams that no socket can be behind any
// more: they are the namespace's own, and it has none on their port. If the kernel
// does not tell, it is none of them.
func (a *Attachment) Left(sources []netip.AddrPort) (left []netip.AddrPort) {
	var sockets []connection
	err := a.asking(func(asker *asker) (err error) {
		sockets, err = asker.list(unix.IPPROTO_UDP)
		return err
	})
	if err != nil {
		return nil
	}
	ports := map[uint16]struct{}{} // of both families: a socket of IPv6 may send by IPv4
	for _, s := range sockets {
		ports[s.local] = struct{}{}
	}
	own := a.around.Load().local
	for _, src := range sources {
		_, here := own[src.Addr()]
		_, used := ports[src.Port()]
		if here && !used {
			left = append(left, src)
		}
	}
	return left
}

// ask finds the socket of a flow in the attachment's namespace.
func (a *Attachment) ask(f *flow.Flow) (s *socket, err error) {
	device := a.around.Load().device
	err = a.asking(func(asker *asker) error {
		s, err = asker.find(f, device)
		return err
	})
	return s, err
}

// asking calls f with a socket for sock_diag in the attachment's namespace.
func (a *Attachment) asking(f func(*asker) error) error {
	if a.asker != nil {
		return f(a.asker)
	}
	return a.NS.Do(func() error {
		asker, err := openAsker()
		if err != nil {
			return err
		}
		defer asker.close()
		return f(asker)
	})
}
