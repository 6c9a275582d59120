package dialer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// What changes ways out: rtnetlink(7)'s links, addresses, routes and ip rules.
var changeGroups = []int{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE,
}

// Changes come in bursts: changed is called once for those within this time.
const burst = 10 * time.Millisecond

// FollowChanges calls changed at first, and then whenever links, addresses,
// routes or ip rules of the namespace that cgtun runs in may have changed: a path
// may be lost, or be back. It returns when ctx ends, or with an error.
func FollowChanges(ctx context.Context, changed func()) error {
	f, err := changeSocket()
	if err != nil {
		return fmt.Errorf("follow changes of links and routes: %w", err)
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(flow.Past) })
	defer stop()
	buf := make([]byte, 16) // what has changed is looked up
	for ctx.Err() == nil {
		changed()
		if err := waitChange(f, buf); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("follow changes of links and routes: %w", err)
		}
		quiet := time.NewTimer(burst)
		select {
		case <-ctx.Done():
		case <-quiet.C:
		}
		quiet.Stop()
		drainChanges(f, buf)
	}
	return nil
}

func changeSocket() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		f.Close()
		return nil, os.NewSyscallError("bind", err)
	}
	for _, group := range changeGroups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			f.Close()
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	return f, nil
}

// waitChange waits for one message. That some were lost is a change too.
func waitChange(f *os.File, buf []byte) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		_, _, failed = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
		return !errors.Is(failed, unix.EAGAIN) && !errors.Is(failed, unix.EINTR)
	})
	if err != nil {
		return err
	}
	if errors.Is(failed, unix.ENOBUFS) {
		return nil
	}
	return os.NewSyscallError("recvfrom", failed)
}

// drainChanges takes what is there already.
func drainChanges(f *os.File, buf []byte) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	const most = 1024
	_ = raw.Control(func(fd uintptr) {
		for range most {
			if _, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT); err != nil {
				return
			}
		}
	})
}
