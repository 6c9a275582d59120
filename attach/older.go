package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
	"cgtun/steer"
)

// More of sock_diag(7) and linux/inet_diag.h.
const (
	sockDestroy     = 21
	inetDiagMark    = 15
	stateOffset     = 1
	idOffset        = 4 // struct inet_diag_sockid, in the answer
	localPortOffset = 4
	remoteOffset    = 24
	requestIDOffset = 8 // in the request
	tcpTimeWait     = 6
	tcpListen       = 10
)

// cutOlder ends the connections that selected processes made before a closed route
// was steered, to what is not bypassed: they would go on by the old way for as long
// as they live. Those that came in from outside, to a port that is listened at, stay.
func (s *site) cutOlder(a *Attachment) error {
	s.mu.Lock()
	plan := a.plan
	s.mu.Unlock()
	if !plan.Closed {
		return nil
	}
	var cut int
	err := a.asking(func(asker *asker) error {
		all, err := asker.list(unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		alone := slices.Concat(steer.Builtin(), plan.Bypass)
		listened := map[uint16]bool{}
		for _, c := range all {
			listened[c.local] = listened[c.local] || c.state == tcpListen
		}
		var errs []error
		for _, c := range all {
			if listened[c.local] || c.state == tcpTimeWait || c.mark&plan.Mask == plan.Mark || !s.isOf(a, &plan, alone, c) {
				continue
			}
			err := asker.destroy(c)
			if err == nil {
				cut++
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	if cut > 0 {
		s.m.opts.Logger.Info("connections that are older than cgtun were cut, as on_exit is \"closed\"", "attachment", s.id, "route", a.Route, "connections", cut)
	}
	if errors.Is(err, netns.ErrGone) {
		return nil
	}
	return err
}

// isOf says whether a connection is one that the plan captures: not to prefixes that
// are left alone.
func (s *site) isOf(a *Attachment, plan *steer.Plan, alone []netip.Prefix, c connection) bool {
	if slices.ContainsFunc(alone, func(p netip.Prefix) bool { return p.Contains(c.remote) }) {
		return false
	}
	if c.remote.Is4() && plan.No4 || c.remote.Is6() && plan.No6 {
		return false
	}
	if plan.All {
		return c.cgroup != plan.Self.ID
	}
	if s.m.opts.Selection == nil {
		return false
	}
	selection, ok := s.m.opts.Selection(c.cgroup)
	return ok && selection == a.selection
}

// connection is a socket of TCP, or one of UDP, as sock_diag shows it.
type connection struct {
	family, state uint8
	local         uint16
	remote        netip.Addr
	mark          uint32
	cgroup        uint64
	id            []byte // struct inet_diag_sockid
}

// list lists all sockets of TCP or UDP of the asker's namespace.
func (a *asker) list(proto uint8) (all []connection, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := nl.NewNetlinkRequest(sockDiagByFamily, unix.NLM_F_DUMP)
		req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: a.socket}
		req.AddData(&diagRequest{family: family, proto: proto})
		answers, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0)
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		for _, msg := range answers {
			if c, ok := parseConnection(msg); ok {
				all = append(all, c)
			}
		}
	}
	return all, nil
}

func parseConnection(msg []byte) (c connection, ok bool) {
	if len(msg) < inetDiagMsgLen {
		return c, false
	}
	c = connection{family: msg[0], state: msg[stateOffset], local: binary.BigEndian.Uint16(msg[localPortOffset:]), id: msg[idOffset : idOffset+48]}
	remote := msg[remoteOffset : remoteOffset+16]
	if c.family == unix.AF_INET {
		remote = remote[:4]
	}
	addr, _ := netip.AddrFromSlice(remote)
	c.remote = addr.Unmap()
	attrs, err := nl.ParseRouteAttr(msg[inetDiagMsgLen:])
	for _, attr := range attrs {
		switch {
		case attr.Attr.Type == inetDiagMark && len(attr.Value) >= 4:
			c.mark = binary.NativeEndian.Uint32(attr.Value)
		case attr.Attr.Type == inetDiagCgroupID && len(attr.Value) >= 8:
			c.cgroup = binary.NativeEndian.Uint64(attr.Value)
		}
	}
	return c, err == nil
}

// destroy ends a connection: its process sees an error, the other side a reset. It is
// no error if it has ended.
func (a *asker) destroy(c connection) error {
	req := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: a.socket}
	b := (&diagRequest{family: c.family, proto: unix.IPPROTO_TCP}).Serialize()
	copy(b[requestIDOffset:], c.id)
	req.AddRawData(b)
	if _, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cut the connection to %s: %w", c.remote, err)
	}
	return nil
}
