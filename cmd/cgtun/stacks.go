package main

import (
	"context"
	"sync"

	"cgtun/attach"
	"cgtun/control"
	"cgtun/flow"
	"cgtun/stack"
)

// stacks are the netstacks of the attachments, and what those have counted that
// have ended.
type stacks struct {
	mu    sync.Mutex
	live  map[*stack.Stack]bool
	ended control.Counts
}

// serve runs the netstack of an attachment until ctx or the device ends. Options
// have what is the same for all.
func (s *stacks) serve(ctx context.Context, a *attach.Attachment, h flow.Handler, o stack.Options) error {
	var queues []stack.Queue
	for _, q := range a.Device.Queues() {
		queues = append(queues, q)
	}
	o.Attachment, o.MTU, o.Local = a.ID, a.Device.MTU(), a.Local
	o.UDP.Left = a.Left
	o.Addresses = nil
	for _, p := range a.Device.Addresses() {
		o.Addresses = append(o.Addresses, p.Addr())
	}
	one, err := stack.New(queues, h, o)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.live == nil {
		s.live, s.ended = map[*stack.Stack]bool{}, control.Counts{}
	}
	s.live[one] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.live, one)
		count(s.ended, one.Stats())
	}()
	return one.Run(ctx)
}

// addTo adds what all of them have turned away.
func (s *stacks) addTo(c control.Counts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, n := range s.ended {
		c[name] += n
	}
	for one := range s.live {
		count(c, one.Stats())
	}
}

// count adds what one netstack has turned away. The names are in docs/cli.md.
func count(c control.Counts, n stack.Stats) {
	for name, n := range map[string]uint64{
		"not_local": n.NotLocal,
		"malformed": n.Malformed + n.UDP.Malformed + n.Echo.Malformed, "bad_checksum": n.BadChecksum + n.UDP.BadSum,
		"expired": n.Expired, "multicast": n.Multicast, "other_protocol": n.OtherProtocol, "icmp": n.ICMP,
		"unread": n.Unread, "unwritten": n.Unwritten + n.UDP.Unwritten + n.Echo.Unwritten, "icmp_rate": n.ICMPErrorsLimited + n.UDP.ICMPLimit + n.Echo.ICMPLimit,
		"late_syn": n.LateSYN, "receive_cut": n.Cut, "tcp_fragments": n.Fragmented,
		"odd_syn": n.OddSYN, "udp_queue": n.UDP.QueueFull, "udp_sessions": n.UDP.Evicted,
		"echo_queue": n.Echo.QueueFull, "echo_sessions": n.Echo.Evicted,
		"pending": n.Evicted, "pending_source": n.EvictedSource, "pending_destination": n.EvictedDest,
	} {
		c[name] += n
	}
}
