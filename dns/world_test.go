package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	wire "github.com/miekg/dns"
	"go.uber.org/goleak"

	"cgtun/dialer"
	"cgtun/flow"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	asked = netip.MustParseAddrPort("203.0.113.53:53")
	other = netip.MustParseAddrPort("198.51.100.53:53")
	me    = netip.MustParseAddrPort("192.0.2.1:40000")
)

// serve is what a server of the tests does with a question: it sends any number
// of datagrams, whenever it likes.
type serve func(q *wire.Msg, send func(*wire.Msg))

// world is an outbound with servers behind it.
type world struct {
	name   string
	noUDP  bool
	no6    bool
	mu     sync.Mutex
	udp    map[netip.AddrPort]serve
	tcp    map[netip.AddrPort]serve
	got    []string // "udp 203.0.113.53:53 name." for each question
	forged netip.AddrPort
}

func (w *world) Name() string { return w.name }

func (w *world) Carries(a netip.Addr) bool { return !w.no6 || a.Is4() }

func (w *world) questions() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.got)
}

func (w *world) asks(proto string, to netip.AddrPort, q *wire.Msg) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got = append(w.got, fmt.Sprintf("%s %s %s", proto, to, q.Question[0].Name))
}

type socket struct {
	w      *world
	in     chan flow.Datagram
	closed chan struct{}
	once   sync.Once
}

func (w *world) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	if w.noUDP {
		return nil, fmt.Errorf("open: %w", errors.ErrUnsupported)
	}
	return &dialer.PacketConn{Packets: &socket{w: w, in: make(chan flow.Datagram, 16), closed: make(chan struct{})}}, nil
}

func (s *socket) WriteBatch(dgs []flow.Datagram) (int, error) {
	for _, d := range dgs {
		q := new(wire.Msg)
		if err := q.Unpack(d.Data); err != nil {
			return 0, err
		}
		s.w.asks("udp", d.Peer, q)
		answer := s.w.udp[d.Peer]
		if answer == nil {
			continue
		}
		peer := d.Peer
		if s.w.forged.IsValid() {
			peer = s.w.forged
		}
		go answer(q, func(m *wire.Msg) {
			b, err := m.Pack()
			if err != nil {
				panic(err)
			}
			select {
			case s.in <- flow.Datagram{Peer: peer, Data: b}:
			case <-s.closed:
			}
		})
	}
	return len(dgs), nil
}

func (s *socket) ReadBatch(dgs []flow.Datagram) (int, error) {
	select {
	case d := <-s.in:
		dgs[0] = flow.Datagram{Peer: d.Peer, Data: dgs[0].Data[:copy(dgs[0].Data, d.Data)]}
		return 1, nil
	case <-s.closed:
		return 0, net.ErrClosed
	}
}

func (s *socket) Close() error { s.once.Do(func() { close(s.closed) }); return nil }

type pipe struct{ net.Conn }

func (pipe) CloseWrite() error { return nil }
func (p pipe) Reset() error    { return p.Close() }

func (w *world) DialStream(_ context.Context, t dialer.Target) (*dialer.Conn, error) {
	answer := w.tcp[t.Addr]
	if answer == nil {
		return nil, &dialer.Error{Hop: w.name, Op: "connect", Addr: t.Addr, Reason: flow.Refused, Err: os.ErrNotExist}
	}
	here, there := net.Pipe()
	go func() {
		defer there.Close()
		for {
			b, err := readMessage(there)
			if err != nil {
				return
			}
			q := new(wire.Msg)
			if q.Unpack(b) != nil {
				return
			}
			w.asks("tcp", t.Addr, q)
			answer(q, func(m *wire.Msg) {
				b, _ := m.Pack()
				_ = writeMessage(there, b)
			})
		}
	}()
	return &dialer.Conn{Conn: pipe{here}}, nil
}

// answers gives records of the question's name: "300 A 192.0.2.7".
func answers(rcode int, records ...string) serve {
	return func(q *wire.Msg, send func(*wire.Msg)) {
		m := new(wire.Msg)
		m.SetRcode(q, rcode)
		m.Compress = true
		for _, text := range records {
			section, owner := &m.Answer, q.Question[0].Name
			if strings.Contains(text, "SOA") {
				section, owner = &m.Ns, "example."
			}
			rr, err := wire.NewRR(owner + " " + strings.Replace(text, " ", " IN ", 1))
			if err != nil {
				panic(err)
			}
			*section = append(*section, rr)
		}
		if o := q.IsEdns0(); o != nil {
			m.SetEdns0(4096, o.Do())
		}
		send(m)
	}
}

func late(by time.Duration, s serve) serve {
	return func(q *wire.Msg, send func(*wire.Msg)) { time.Sleep(by); s(q, send) }
}

func silent(*wire.Msg, func(*wire.Msg)) {}

// lab is a resolver in a world. Its host asks the second server.
type lab struct {
	*world
	r *Resolver
}

func newLab(c func(*Config)) *lab {
	w := &world{name: direct, udp: map[netip.AddrPort]serve{}, tcp: map[netip.AddrPort]serve{}}
	r := New(Options{host: &host{read: func(path string) ([]byte, error) {
		if path != resolvConf {
			return nil, os.ErrNotExist
		}
		return []byte("# of a test\nnameserver " + other.Addr().String() + "\n"), nil
	}}})
	conf := DefaultConfig()
	if c != nil {
		c(&conf)
	}
	r.Reload(conf, map[string]dialer.Outbound{direct: w})
	return &lab{w, r}
}

func (l *lab) way(netip.AddrPort, flow.Proto) (dialer.Outbound, error) { return l.world, nil }

func question(name string, kind uint16) *wire.Msg {
	return new(wire.Msg).SetQuestion(wire.Fqdn(name), kind)
}

// ask is a client's question by UDP, and how long the answer took. Nil: none.
func (l *lab) ask(q *wire.Msg) (*wire.Msg, time.Duration) { return l.askAs(me, asked, q) }

func (l *lab) askAs(from, to netip.AddrPort, q *wire.Msg) (*wire.Msg, time.Duration) {
	b, err := q.Pack()
	if err != nil {
		panic(err)
	}
	began := time.Now()
	var took time.Duration
	f := &flow.Flow{Proto: flow.UDP, Src: from, Dst: to, Attachment: "home"}
	answer, wait, mine := l.r.Take(f, b, l.way)
	if wait != nil {
		wait(context.Background(), func(b []byte) { answer, took = b, time.Since(began) })
	}
	if !mine || answer == nil {
		return nil, took
	}
	m := new(wire.Msg)
	if err := m.Unpack(answer); err != nil {
		panic(err)
	}
	if m.Id != q.Id || !m.Response || m.Question[0] != q.Question[0] {
		panic(fmt.Sprintf("not an answer to the question: %v", m))
	}
	return m, took
}

// show is an answer in a line: "NOERROR 300 192.0.2.7".
func show(m *wire.Msg) string {
	if m == nil {
		return "nothing"
	}
	s := wire.RcodeToString[m.Rcode]
	if m.Truncated {
		s += " truncated"
	}
	for _, rr := range m.Answer {
		s += fmt.Sprintf(" %d %s", rr.Header().Ttl, wire.Field(rr, 1))
	}
	return s
}
