package dialer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	// resolvedFor is how long the addresses of a server's name are believed: the
	// host's resolver has the TTL, and does not tell it.
	resolvedFor = 30 * time.Second
	// How often it is looked up while nobody dials.
	lookAgain = 5 * time.Minute
	lookSoon  = 5 * time.Second // after a look-up that failed
	// maxServers bounds the addresses of a name that are tried.
	maxServers = 8
	// serverStagger is when the next address of a server is tried beside the
	// ones that have not answered (RFC 8305 §5).
	serverStagger = 250 * time.Millisecond
)

// server is where a proxy listens: an address, or a name that the host's
// resolver knows. Safe for concurrent use.
type server struct {
	host   string // "" where the address was written
	port   uint16
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu     sync.Mutex
	addrs  []netip.AddrPort // the one that answered last first; replaced, never changed
	looked time.Time        // of a name
}

func newServer(hostPort string) (*server, error) {
	if what := badServer(hostPort); what != "" {
		return nil, fmt.Errorf("server %s", what)
	}
	host, text, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil, err
	}
	s := &server{host: host, port: uint16(port), lookup: net.DefaultResolver.LookupNetIP}
	if a, err := netip.ParseAddr(host); err == nil {
		s.host, s.addrs = "", []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), s.port)}
	}
	return s, nil
}

// resolve returns the addresses, never none. A resolver that does not answer
// leaves the old ones in force.
func (s *server) resolve(ctx context.Context) ([]netip.AddrPort, error) {
	s.mu.Lock()
	addrs, fresh := s.addrs, s.host == "" || time.Since(s.looked) < resolvedFor
	s.mu.Unlock()
	if fresh {
		return addrs, nil
	}
	found, err := s.lookup(ctx, "ip", s.host)
	if err == nil && len(found) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		if len(addrs) > 0 {
			return addrs, nil
		}
		return nil, fmt.Errorf("look up %q: %w", s.host, err)
	}
	addrs = alternate(found, s.port)
	s.mu.Lock()
	s.addrs, s.looked = addrs, time.Now()
	s.mu.Unlock()
	return addrs, nil
}

// alternate puts the families by turns, the first one's first (RFC 8305 §4).
func alternate(found []netip.Addr, port uint16) []netip.AddrPort {
	var same, other []netip.AddrPort
	first := found[0].Unmap().Is6()
	for _, a := range found {
		a = a.Unmap()
		list := &same
		if a.Is6() != first {
			list = &other
		}
		*list = append(*list, netip.AddrPortFrom(a, port))
	}
	var addrs []netip.AddrPort
	for i := 0; i < len(same) || i < len(other); i++ {
		if i < len(same) {
			addrs = append(addrs, same[i])
		}
		if i < len(other) {
			addrs = append(addrs, other[i])
		}
	}
	return addrs[:min(len(addrs), maxServers)]
}

// prefer has the address that answered tried first.
func (s *server) prefer(addr netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.host == "" || len(s.addrs) < 2 || s.addrs[0] == addr {
		return
	}
	addrs := []netip.AddrPort{addr}
	for _, a := range s.addrs {
		if a != addr {
			addrs = append(addrs, a)
		}
	}
	s.addrs = addrs
}

// dialled is what became of one address.
type dialled struct {
	conn *Conn
	addr netip.AddrPort
	err  error
}

// dial connects to the server by next. Of several addresses the first to answer
// is taken. The address of an error is one that failed, the zero value where
// there was none.
func (s *server) dial(ctx context.Context, next Outbound) (*Conn, netip.AddrPort, error) {
	addrs, err := s.resolve(ctx)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	one := func(ctx context.Context, addr netip.AddrPort) dialled {
		c, err := next.DialStream(ctx, Target{Addr: addr})
		return dialled{c, addr, err}
	}
	if len(addrs) == 1 {
		d := one(ctx, addrs[0])
		return d.conn, d.addr, d.err
	}
	won := race(ctx, addrs, one)
	if won.err == nil {
		s.prefer(won.addr)
	}
	return won.conn, won.addr, won.err
}

// race calls one for each address, the next one when the last has failed or let
// wait for the stagger. It returns the first that worked, or the first error,
// when all calls have returned: they end with the ctx that they are given.
func race(ctx context.Context, addrs []netip.AddrPort, one func(context.Context, netip.AddrPort) dialled) (won dialled) {
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan dialled)
	running := 0
	start := func() {
		addr := addrs[0]
		addrs = addrs[1:]
		running++
		go func() { results <- one(ctx, addr) }()
	}
	defer func() {
		cancel()
		for ; running > 0; running-- {
			if late := <-results; late.err == nil {
				_ = late.conn.Close()
			}
		}
	}()
	stagger := time.NewTimer(serverStagger)
	defer stagger.Stop()
	start()
	for running > 0 {
		select {
		case d := <-results:
			running--
			if d.err == nil {
				return d
			}
			if won.err == nil {
				won = d
			}
		case <-stagger.C:
		}
		if len(addrs) > 0 && ctx.Err() == nil {
			start()
			stagger.Reset(serverStagger)
		}
	}
	return won
}

// is says whether addr is known to be the server's.
func (s *server) is(addr netip.AddrPort) bool {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	if addr.Port() != s.port {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.addrs, addr)
}

// run keeps the addresses of a name known, also while nobody dials, until ctx
// ends.
func (s *server) run(ctx context.Context) {
	for s.host != "" {
		wait := lookAgain
		looking, cancel := context.WithTimeout(ctx, attempt)
		if _, err := s.resolve(looking); err != nil {
			wait = lookSoon
		}
		cancel()
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}
