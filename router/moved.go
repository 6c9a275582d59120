package router

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
)

// Datagrams that a group carries move to another of its outbounds when theirs
// seems dead: nothing has come back for a while though the client goes on
// sending, or the kernel has no way out by it any more. That costs them their
// address, as a change of networks does (RFC 9000 §9); a source that is never
// answered, by nobody's fault, moves less and less often.

const (
	silentFor    = 2 * time.Second
	maxSilentFor = time.Minute
	// avoidFor is how long a path that seemed dead is not asked by its source.
	avoidFor = 30 * time.Second
)

// several is an outbound that chooses among others: a group.
type several interface {
	// Outbounds are the names of the others. The caller does not change it.
	Outbounds() []string
}

// movable says whether there is somewhere else to go.
func movable(o dialer.Outbound) bool {
	s, ok := o.(several)
	return ok && len(s.Outbounds()) > 1
}

// silence watches one socket.
type silence struct {
	since    atomic.Int64 // when the client wrote what is not answered; ns, 0: nothing
	answered atomic.Bool  // something has come by it
	lost     atomic.Bool  // the kernel has no way out by it
}

func (s *silence) sent(now time.Time) { s.since.CompareAndSwap(0, now.UnixNano()) }

func (s *silence) heard() {
	s.since.Store(0)
	if !s.answered.Load() {
		s.answered.Store(true)
	}
}

// dead says whether a path seems dead, for who has waited so long.
func (s *silence) dead(now time.Time, patience time.Duration) bool {
	since := s.since.Load()
	return s.lost.Load() || since != 0 && now.Sub(time.Unix(0, since)) >= patience
}

// moving is what a source knows of its moves by one group.
type moving struct {
	avoid    []string
	until    time.Time
	patience time.Duration
}

// move leaves a socket whose path seems dead, and says whether it did. What its
// peers' flows were ends here: the datagram that comes next opens the next one.
func (s *source) move(out *packetOut, now time.Time) bool {
	m := s.moves[out.key]
	if m == nil {
		m = &moving{patience: silentFor}
		s.moves[out.key] = m
	}
	if out.silence.answered.Load() {
		m.patience = silentFor // its peers do answer
	}
	if !out.silence.dead(now, m.patience) {
		return false
	}
	if now.After(m.until) {
		m.avoid = nil
	}
	m.avoid, m.until = append(m.avoid, out.conn.Path[len(out.conn.Path)-1]), now.Add(avoidFor)
	m.patience = min(2*m.patience, maxSilentFor)
	s.r.log.Debug("datagrams move", "flow", s.client.Flow().ID, "from", out.conn.Path)
	s.drop(out, nil)
	return true
}

// openAway opens a socket by another path than those that seemed dead; by any if
// there is no other.
func (s *source) openAway(ctx context.Context, key outKey, t dialer.Target, open func(context.Context, dialer.Target) (*dialer.PacketConn, error)) (*dialer.PacketConn, error) {
	m := s.moves[key]
	if m == nil || len(m.avoid) == 0 || time.Now().After(m.until) {
		return open(ctx, t)
	}
	t.Avoid = slices.Clone(m.avoid)
	conn, err := open(ctx, t)
	if err == nil {
		return conn, nil
	}
	m.avoid, t.Avoid = nil, nil
	return open(ctx, t)
}

// gone tells an error of the kernel's, that there is no way out, from what
// routers say.
func gone(e *flow.PeerError) bool {
	return e.ICMP == nil && e.FlowReason() == flow.NetUnreachable
}
