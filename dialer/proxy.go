package dialer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"cgtun/flow"
)

// attempt bounds what concerns a proxy alone: the connection to its server, and
// the greeting with its credentials. How long the proxy takes to reach the
// target is for the context of the dial to bound.
const attempt = 5 * time.Second

// A protocol is how a proxy is talked to, over a connection to its server that
// has the deadline of ctx and is cut when ctx ends. Neither method closes c, or
// reads a byte beyond the proxy's answer unless the conn that it returns gives
// that byte back. Errors are *Error made by Proxy.fail, or anything else, which
// becomes one; none has a credential.
type protocol interface {
	// greet does what comes before any target: TLS, authentication. It returns
	// what to go on with, which may be c.
	greet(ctx context.Context, c flow.Conn) (flow.Conn, error)
	// connect asks for t and returns the tunnel, which may be c: for the name of
	// t if it has one, which is a well-formed host name then. An error of the
	// target's, as the proxy has told it, is a *refusal.
	connect(ctx context.Context, c flow.Conn, t Target) (flow.Conn, error)
}

// refusal is a proxy's word on why there is no way to the target.
type refusal struct {
	reason flow.Reason
	text   string
	err    error // may be nil
}

func (e *refusal) Error() string           { return e.text }
func (e *refusal) Unwrap() error           { return e.err }
func (e *refusal) FlowReason() flow.Reason { return e.reason }

// Proxy is an outbound through a server, which is itself reached by another
// outbound. It holds nothing open, so that nothing is to be closed. Safe for
// concurrent use.
type Proxy struct {
	name, kind string
	next       Outbound
	via        string // its name as it was chosen; empty: nobody did, and it is no hop of the path
	server     *server
	protocol   protocol
	names      bool // asked for names, where they are known
	account    *lockout
	judge      func(netip.AddrPort, []Leave) error
	without    atomic.Pointer[time.Time] // when it said that it has no datagrams
}

// NewProxy makes an outbound of any type but TypeDirect, whose server is reached
// by next.
func NewProxy(c Config, next Outbound, o Options) (*Proxy, error) {
	talk, err := newProtocol(c)
	if err != nil {
		return nil, fmt.Errorf("make outbound %q: %w", c.Name, err)
	}
	s, err := newServer(c.Server)
	if err != nil {
		return nil, fmt.Errorf("make outbound %q: %w", c.Name, err)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Judge == nil {
		o.Judge = func(netip.AddrPort, []Leave) error { return nil }
	}
	return &Proxy{
		name: c.Name, kind: c.Type, next: next, via: c.Via, server: s, protocol: talk, names: c.RemoteDNS,
		account: &lockout{name: c.Name, log: o.Logger}, judge: o.Judge,
	}, nil
}

// newProtocol returns the way to talk to a proxy of the configured type.
func newProtocol(c Config) (protocol, error) {
	switch c.Type {
	case TypeSOCKS5:
		return newSOCKS5(c)
	case TypeHTTP, TypeHTTPS:
		return newConnectMethod(c), nil
	}
	return nil, fmt.Errorf("type %q is not in this version", c.Type)
}

// Name implements Outbound.
func (p *Proxy) Name() string { return p.name }

// Type implements Hop.
func (p *Proxy) Type() string { return p.kind }

// Path implements Hop.
func (p *Proxy) Path() []string { return p.path(PathOf(p.next)) }

// path returns the path of a connection that reaches the server by way of
// nearer.
func (p *Proxy) path(nearer []string) []string {
	if p.via == "" {
		nearer = nil
	}
	return append(slices.Clip(nearer), p.name)
}

// PathOf returns the path that a connection by o would have, as far as it can be
// told beforehand.
func PathOf(o Outbound) []string {
	if h, ok := o.(interface{ Path() []string }); ok {
		return h.Path()
	}
	return []string{o.Name()}
}

// IsServer says whether addr is the server. One that is a name is known from when
// it was looked up first.
func (p *Proxy) IsServer(addr netip.AddrPort) bool { return p.server.is(addr) }

// AsksNames says whether the proxy is asked for names (Config.RemoteDNS).
func (p *Proxy) AsksNames() bool { return p.names }

// Run keeps the addresses of the server known until ctx ends.
func (p *Proxy) Run(ctx context.Context) error {
	p.server.run(ctx)
	return nil
}

// Refused says why the proxy does not take the outbound's account, "" if nothing
// is known of that.
func (p *Proxy) Refused() string { return p.account.state() }

// State implements Hop.
func (p *Proxy) State() (up bool, reason string) {
	if h, ok := p.next.(Hop); ok {
		return h.State()
	}
	return true, ""
}

// DialStream implements Outbound.
func (p *Proxy) DialStream(ctx context.Context, t Target) (_ *Conn, err error) {
	asks := p.lockDial(t)
	pass, err := p.account.enter(asks)
	if err != nil {
		return nil, p.fail("greet", netip.AddrPort{}, err)
	}
	defer func() { p.account.leave(pass, asks, err) }()
	c, addr, err := p.reach(ctx)
	if err != nil {
		return nil, err
	}
	tunnel := c.Conn
	t = p.named(t, addr)
	err = during(ctx, c.Conn, func(ctx context.Context) (err error) {
		tunnel, err = p.protocol.connect(ctx, tunnel, t)
		return err
	})
	if err != nil {
		_ = c.Close()
		return nil, p.asked(addr, t.Addr, err)
	}
	return &Conn{Conn: tunnel, Path: c.Path, Report: c.Report}, nil
}

// named returns t with the name that the proxy at server is to be asked for, if
// it is to be asked for one. A proxy in home would resolve as home does, and one in a
// container of this machine as that does, and so take a client from elsewhere to what
// they alone reach: such a client gets the address that it asked for.
func (p *Proxy) named(t Target, server netip.AddrPort) Target {
	t.Addr = netip.AddrPortFrom(t.Addr.Addr().Unmap(), t.Addr.Port())
	if !p.names || !hostName(t.Name) || !ofHome(t.Flow) && p.ofMachine(server) {
		t.Name = ""
	}
	return t
}

// ofHome says whether a flow is of a process in home: not of a container, and not of
// a machine behind an interface of home's.
func ofHome(f *flow.Flow) bool {
	return f != nil && f.Attachment == flow.Home && homeAddress(f.Src.Addr().Unmap())
}

// maxName is the longest host name (RFC 1035 §2.3.4).
const maxName = 253

// hostName says whether name can be sent to a proxy as it is: what came from the
// wire could be anything, also one of the many ways to write an address.
func hostName(name string) bool {
	top := strings.TrimSuffix(name, ".")
	top = top[strings.LastIndexByte(top, '.')+1:]
	if len(name) > maxName || top == "" || '0' <= top[0] && top[0] <= '9' {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// homeAddress says whether a leads to cgtun's own network namespace.
func homeAddress(a netip.Addr) bool {
	return a.IsLoopback() || a.IsUnspecified() || missingSource(a) == ""
}

// ofMachine says whether an address leads to this machine, or to what only it
// reaches.
func (p *Proxy) ofMachine(a netip.AddrPort) bool {
	return homeAddress(a.Addr()) || p.judge(a, Leaves(p.next)) != nil
}

// reach connects to the server and greets it. The path is that of what goes
// through it.
func (p *Proxy) reach(ctx context.Context) (*Conn, netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	c, addr, err := p.server.dial(ctx, p.next)
	if err != nil {
		return nil, addr, p.unreached(addr, WhyEnded(ctx, err))
	}
	greeted := c.Conn
	err = during(ctx, c.Conn, func(ctx context.Context) (err error) {
		greeted, err = p.protocol.greet(ctx, c.Conn)
		return err
	})
	if err != nil {
		_ = c.Close()
		return nil, addr, p.fail("greet", addr, err)
	}
	return &Conn{Conn: greeted, Path: p.path(c.Path), Report: below(c)}, addr, nil
}

// below tells the group that has made c, the connection to a proxy, what is of c
// alone: how a flow does behind the proxy is no news of the path to it.
func below(c *Conn) func(Outcome) {
	if c.Report == nil {
		return nil
	}
	return func(o Outcome) {
		switch o.News {
		case Quiet:
			c.Tell(o)
		case Ended:
			c.Tell(Outcome{News: Ended})
		}
	}
}

// during calls do with a conn that has the deadline of ctx and whose reads and
// writes end with ctx. Afterwards ctx has no hold on the conn.
func during(ctx context.Context, c flow.Conn, do func(context.Context) error) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(flow.Past) })
	err := do(ctx)
	if !stop() {
		return WhyEnded(ctx, ctx.Err())
	}
	if err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

// unreached is the error of a server that was not reached. That of a nearer hop
// which failed by itself stays as it is.
func (p *Proxy) unreached(addr netip.AddrPort, err error) error {
	var nearer *Error
	if !errors.As(err, &nearer) {
		return p.fail("resolve", addr, err)
	}
	if nearer.Addr != addr {
		return nearer
	}
	err = nearer.Err
	if p.via != "" {
		err = fmt.Errorf("through %q: %w", nearer.Hop, err)
	}
	return p.fail(nearer.Op, addr, err)
}

// asked is the error of a proxy that was asked for target.
func (p *Proxy) asked(addr, target netip.AddrPort, err error) error {
	var said *refusal
	if errors.As(err, &said) {
		return &Error{Hop: p.name, Op: "connect", Addr: target, Reason: said.reason, Err: said}
	}
	return p.fail("ask", addr, err)
}

// fail makes an Error of what is wrong with the proxy itself. Refused and Reset
// are words of a target, to a client and to who judges outbounds; a proxy that
// is not there or hangs up leaves the target unreachable.
func (p *Proxy) fail(op string, addr netip.AddrPort, err error) error {
	why := flow.ReasonOf(err)
	switch {
	case why == flow.Refused, why == flow.Reset, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		why = flow.HostUnreachable
	}
	return &Error{Hop: p.name, Op: op, Addr: addr, Reason: why, Err: err}
}
