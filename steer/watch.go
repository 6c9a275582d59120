package steer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	mdl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// settle is how long Run waits after a sign of change before it looks: a tool
// that flushes and loads anew makes many signs at once.
const settle = 50 * time.Millisecond

// Run puts back what others take away — ip rules, which network managers clear,
// routes, which go when our device is set down, and an nft table that has no
// owner — within a fraction of a second. It blocks until ctx ends and then
// returns nil. repaired is told what had been missing, or the error when that
// could not be put back, once for each spell of the same error.
func (s *Steering) Run(ctx context.Context, repaired func(what string, err error)) error {
	conns, err := s.listen()
	if err != nil {
		return err
	}
	again := make(chan struct{}, 1)
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() { signs(c, again) })
	}
	defer wg.Wait()
	defer closeAll(conns)

	last := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-again:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
		what, err := s.repair()
		switch {
		case err != nil && err.Error() != last:
			last = err.Error()
			repaired(what, err)
		case err == nil:
			last = ""
			if what != "" {
				repaired(what, nil)
			}
		}
	}
}

// listen opens the sockets on which the kernel tells of changes.
func (s *Steering) listen() ([]*mdl.Conn, error) {
	groups := map[int][]uint32{
		unix.NETLINK_ROUTE: {
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_IFADDR,
			unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV6_IFADDR,
		},
		unix.NETLINK_NETFILTER: {unix.NFNLGRP_NFTABLES},
	}
	var conns []*mdl.Conn
	err := s.ns.Do(func() error {
		for protocol, list := range groups {
			c, err := mdl.Dial(protocol, nil)
			if err != nil {
				return err
			}
			conns = append(conns, c)
			for _, group := range list {
				if err := c.JoinGroup(group); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		closeAll(conns)
		return nil, fmt.Errorf("watch %s: %w", s.ns, err)
	}
	return conns, nil
}

func closeAll(conns []*mdl.Conn) {
	for _, c := range conns {
		c.Close()
	}
}

// signs turns whatever comes into one sign, until the socket is closed. What
// the messages say does not matter, nor whether some were lost.
func signs(c *mdl.Conn, again chan<- struct{}) {
	for {
		_, err := c.Receive()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		select {
		case again <- struct{}{}:
		default:
		}
	}
}

// repair compares the namespace with the plan in force, and says what it had
// to put back.
func (s *Steering) repair() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil || s.plan == nil {
		return "", nil
	}
	var what []string
	err := withRoutes(s.ns, func(h *netlink.Handle) error {
		link, v6, err := setDevice(h, s.plan.Device)
		if err != nil {
			return err
		}
		s.v6 = v6
		changed, err := setRoutes(h, s.plan, link, v6)
		if changed {
			what = append(what, "routes")
		}
		if err != nil {
			return err
		}
		changed, stale, err := setRules(h, s.plan, v6)
		if changed {
			what = append(what, "ip rules")
		}
		if err != nil {
			return err
		}
		return delRules(h, stale)
	})
	changed, tableErr := s.table.restore()
	if changed {
		what = append(what, "nft table")
	}
	return strings.Join(what, ", "), errors.Join(err, tableErr)
}
