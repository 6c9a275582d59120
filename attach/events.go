package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// The kernel's events of all attached namespaces come by sockets of home: with
// NETLINK_LISTEN_ALL_NSID (netlink(7)) they get those of every namespace that
// has a number in home (RTM_NEWNSID, rtnetlink(7)). So none is opened inside,
// where it would keep the namespace alive; the number goes with the namespace.
//
// Events only say "look again"; what they carry is not read, nor is it of
// interest whether some were lost.

// noNumber is the number of home itself, and of a namespace without one.
const noNumber = -1

// subscription is what one socket listens to.
type subscription struct {
	protocol int
	groups   []int
	all      bool // in all namespaces, not in home alone
}

var (
	routeEvents = subscription{unix.NETLINK_ROUTE, []int{
		unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE,
		unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE,
	}, true}
	nftEvents = subscription{unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}, true}
	// neighbourEvents tell which of several gateways is alive.
	neighbourEvents = subscription{unix.NETLINK_ROUTE, []int{unix.RTNLGRP_NEIGH}, false}
)

// events are the sockets. Who opened them closes them.
type events struct {
	files []*os.File
	deaf  error // why they tell of home alone (CAP_NET_BROADCAST is missing); nil: they do not
}

// openEvents opens them in the namespace it runs in.
func openEvents(wanted ...subscription) (e events, err error) {
	for _, sub := range wanted {
		if err := e.open(sub); err != nil {
			e.close()
			return e, fmt.Errorf("follow the network: %w", err)
		}
	}
	return e, nil
}

func (e *events) open(sub subscription) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, sub.protocol)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	e.files = append(e.files, os.NewFile(uintptr(fd), "netlink"))
	// A socket without an address is taken for the kernel's own, which
	// is not told what it did itself.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if sub.all {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1); err != nil {
			e.deaf = fmt.Errorf("listen to the events of all network namespaces: %w", err)
		}
	}
	for _, group := range sub.groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

func (e events) close() {
	for _, f := range e.files {
		f.Close()
	}
}

// run calls changed with the number of the namespace in which something has
// changed, and all when that is not known, until ctx ends.
func (e events) run(ctx context.Context, log *slog.Logger, changed func(number int), all func()) {
	stop := context.AfterFunc(ctx, func() {
		for _, f := range e.files {
			_ = f.SetReadDeadline(time.Unix(1, 0))
		}
	})
	defer stop()
	var readers sync.WaitGroup
	defer readers.Wait()
	for _, f := range e.files {
		readers.Go(func() {
			if err := read(f, changed, all); err != nil && ctx.Err() == nil {
				log.Error("changes of the network are not told any more", "err", err)
			}
		})
	}
}

// read reads one socket until an error. The bodies are cut short.
func read(f *os.File, changed func(number int), all func()) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	body, control := make([]byte, 16), make([]byte, 64)
	for {
		var n int
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			_, n, _, _, failed = unix.Recvmsg(int(fd), body, control, unix.MSG_DONTWAIT)
			return !errors.Is(failed, unix.EAGAIN) && !errors.Is(failed, unix.EINTR)
		})
		switch {
		case err != nil:
			return err
		case errors.Is(failed, unix.ENOBUFS):
			all()
		case failed != nil:
			return os.NewSyscallError("recvmsg", failed)
		default:
			changed(numberIn(control[:n]))
		}
	}
}

// numberIn finds the number of a namespace in a control message.
func numberIn(control []byte) int {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return noNumber
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_NETLINK && m.Header.Type == unix.NETLINK_LISTEN_ALL_NSID && len(m.Data) >= 4 {
			return int(int32(binary.NativeEndian.Uint32(m.Data)))
		}
	}
	return noNumber
}

// number returns the number of a namespace in the one it runs in, which gets one
// if it has none.
func number(ns netns.Ref) (n int, err error) {
	n = noNumber
	err = ns.File(func(fd int) error {
		if err := netlink.SetNetNsIdByFd(fd, noNumber); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		n, err = netlink.GetNetNsIdByFd(fd)
		return err
	})
	if err != nil {
		return noNumber, fmt.Errorf("number namespace %s: %w", ns, err)
	}
	return n, nil
}
