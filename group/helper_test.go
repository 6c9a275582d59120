package group_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
)

// fake is an outbound whose network is a function: how long a connect takes,
// and what it says. Conns count those that are open.
type fake struct {
	name    string
	connect func(dst netip.AddrPort) (time.Duration, error)
	open    atomic.Int32
	state   atomic.Pointer[string]

	mu    sync.Mutex
	dials []time.Time
}

const never = 1000 * time.Hour

var (
	errRefused     = os("connect", unix.ECONNREFUSED)
	errUnreachable = os("connect", unix.EHOSTUNREACH)
	errExpired     = &dialer.Error{Hop: "fake", Op: "connect", Reason: flow.Expired, Err: &flow.ICMPError{Type: 11}}
	errAccount     = &dialer.Error{Hop: "fake", Op: "ask", Reason: flow.Prohibited, Err: dialer.ErrAccount}
)

func os(op string, errno unix.Errno) error {
	return &dialer.Error{Hop: "fake", Op: op, Reason: flow.ReasonOf(errno), Err: errno}
}

// in returns what connects after d.
func in(d time.Duration) func(netip.AddrPort) (time.Duration, error) {
	return func(netip.AddrPort) (time.Duration, error) { return d, nil }
}

// says returns what fails after d.
func says(d time.Duration, err error) func(netip.AddrPort) (time.Duration, error) {
	return func(netip.AddrPort) (time.Duration, error) { return d, err }
}

func (f *fake) Name() string { return f.name }

// set changes the network.
func (f *fake) set(connect func(netip.AddrPort) (time.Duration, error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.connect = connect
}

// asked returns how often it was dialled since the last call.
func (f *fake) asked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.dials)
	f.dials = nil
	return n
}

func (f *fake) wait(ctx context.Context, dst netip.AddrPort) error {
	f.mu.Lock()
	f.dials = append(f.dials, time.Now())
	connect := f.connect
	f.mu.Unlock()
	d, err := connect(dst)
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return err
	case <-ctx.Done():
		return &dialer.Error{Hop: f.name, Op: "connect", Addr: dst, Reason: flow.ReasonOf(ctx.Err()), Err: ctx.Err()}
	}
}

func (f *fake) DialStream(ctx context.Context, t dialer.Target) (*dialer.Conn, error) {
	if err := f.wait(ctx, t.Addr); err != nil {
		return nil, err
	}
	f.open.Add(1)
	return &dialer.Conn{Conn: &fakeConn{f: f}, Path: []string{f.name}}, nil
}

func (f *fake) OpenPackets(ctx context.Context, t dialer.Target) (*dialer.PacketConn, error) {
	if err := f.wait(ctx, t.Addr); err != nil {
		return nil, err
	}
	return &dialer.PacketConn{Path: []string{f.name}}, nil
}

func (f *fake) State() (bool, string) {
	if s := f.state.Load(); s != nil {
		return false, *s
	}
	return true, ""
}

type fakeConn struct {
	flow.Conn
	f *fake
}

func (c *fakeConn) Close() error { c.f.open.Add(-1); return nil }

// settings are those of a group that is named after its type.
func settings(kind string) group.Config {
	c := group.DefaultConfig()
	c.Name, c.Type = kind, kind
	return c
}

// board makes Scores that log into the test.
func board(t *testing.T) *group.Scores {
	return group.NewScores(slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
}

func newGroup(t *testing.T, c group.Config, s *group.Scores, members ...dialer.Outbound) *group.Group {
	t.Helper()
	g, err := group.New(c, members, s)
	if err != nil {
		t.Fatal(err)
	}
	s.Use([]*group.Group{g})
	return g
}

func dst(n int) dialer.Target {
	return dialer.Target{Addr: netip.MustParseAddrPort(fmt.Sprintf("203.0.113.%d:443", n))}
}

// dial dials, reports an answer if it works, and returns who it was and how long
// it took. The conn is ended as one that was carried well.
func dial(t *testing.T, g *group.Group, target dialer.Target) (by string, took time.Duration, err error) {
	t.Helper()
	began := time.Now()
	c, err := g.DialStream(context.Background(), target)
	took = time.Since(began)
	if err != nil {
		return "", took, err
	}
	c.Tell(dialer.Outcome{News: dialer.Answered, After: time.Millisecond})
	c.Tell(dialer.Outcome{News: dialer.Ended, Reason: flow.Closed, Up: 100, Down: 100_000, Lasted: time.Millisecond})
	_ = c.Close()
	return c.Path[0], took, nil
}

func reasonOf(err error) flow.Reason {
	if err == nil {
		return 0
	}
	return flow.ReasonOf(err)
}

var errUnsupported = fmt.Errorf("carry that: %w", errors.ErrUnsupported)
