package steer

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// probeEvery is how often gateways that stand for each other are asked for.
const probeEvery = 5 * time.Second

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
		wg.Go(func() { s.signs(ctx, c, again) })
	}
	defer wg.Wait()
	defer closeAll(conns)

	probes := time.NewTicker(probeEvery)
	defer probes.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-probes.C:
			// What it finds comes as an event; there is none where it fails.
			_ = s.probeGateways()
			continue
		case <-again:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
		what, err := s.Repair()
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
			unix.RTNLGRP_LINK,
		},
		unix.NETLINK_NETFILTER: {unix.NFNLGRP_NFTABLES},
	}
	if s.chooses() {
		groups[unix.NETLINK_ROUTE] = append(groups[unix.NETLINK_ROUTE], unix.RTNLGRP_NEIGH)
	}
	var conns []*mdl.Conn
	err := s.ns.Do(func() error {
		for protocol, list := range groups {
			c, err := mdl.Dial(protocol, nil)
			if err != nil {
				return err
			}
			conns = append(conns, c)
			if s.buffer > 0 {
				if err := c.SetReadBuffer(s.buffer); err != nil {
					return err
				}
			}
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

// signs turns whatever comes into one sign, until ctx has ended and the socket
// is closed. What the messages say does not matter, nor whether some were lost:
// an error, as that of a buffer that has overflowed, is a sign like any other.
func (s *Steering) signs(ctx context.Context, c *mdl.Conn, again chan<- struct{}) {
	for {
		_, err := c.Receive()
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, unix.ENOBUFS) {
			s.overflows.Add(1)
		}
		select {
		case again <- struct{}{}:
		default:
		}
		if err != nil {
			time.Sleep(settle) // should it come at once again
		}
	}
}

// Repair compares the namespace with the plan in force, and says what it had
// to put back; "" is nothing. It is for namespaces in which no Run may hold
// sockets, and for a caller who asks about once a second. The error wraps
// netns.ErrGone if the namespace has ended.
func (s *Steering) Repair() (what string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil || s.plan == nil {
		return "", nil
	}
	var tableErr error
	err = withRoutes(s.ns, func(h *netlink.Handle) error {
		found, err := s.repair(h)
		changed, restoreErr := s.table.restore()
		if changed {
			found = append(found, "nft table")
		}
		what, tableErr = strings.Join(found, ", "), restoreErr
		return err
	})
	return what, errors.Join(err, tableErr)
}

// repair is Repair of all but the nft table.
func (s *Steering) repair(h *netlink.Handle) (what []string, err error) {
	w, err := s.findWay(h, s.plan)
	if err != nil {
		return nil, err
	}
	moved := s.moved(w)
	changed, err := setRoutes(h, s.plan, w)
	if changed && !moved {
		what = append(what, "routes")
	}
	if err != nil {
		return what, err
	}
	changed, stale, err := setRules(h, s.plan, w)
	if changed && !moved {
		what = append(what, "ip rules")
	}
	if err != nil {
		return what, err
	}
	if moved {
		if err := s.table.apply(newRuleset(s.plan, w, s.table.at)); err != nil {
			return what, err
		}
	}
	s.way = w
	return what, delRules(h, stale)
}

// moved says whether a way by the kernel is another one than before: routes
// that follow it were not taken away by anybody.
func (s *Steering) moved(w *way) bool {
	if w.ours {
		return false
	}
	return w.dev != s.way.dev || w.link != s.way.link || !maps.Equal(w.gw, s.way.gw) || (w.down == nil) != (s.way.down == nil)
}

// chooses says whether the plan has gateways that stand for each other.
func (s *Steering) chooses() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan != nil && (len(s.plan.Via.Gateway) > 1 || len(s.plan.Via.Gateway6) > 1)
}

// probeGateways keeps what the kernel knows of several gateways new.
func (s *Steering) probeGateways() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.plan == nil || s.way == nil || s.way.ours || s.way.link == 0 {
		return nil
	}
	return withRoutes(s.ns, func(h *netlink.Handle) error {
		probe(h, &s.plan.Via, s.way.link)
		return nil
	})
}
