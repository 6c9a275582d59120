package dns

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
	"cgtun/flow"
)

// Who is asked, what the client gets, and how long that takes.
func TestAnswers(t *testing.T) {
	v4 := answers(0, "300 A 192.0.2.7")
	tests := []struct {
		name       string
		udp, udp2  serve // of the server that is asked, and of the host's
		tcp        serve
		noUDP      bool
		want       string
		took       time.Duration
		asked      int // questions to the server that was asked
		elsewhere  int
		overStream int
	}{
		{name: "plain", udp: v4, want: "NOERROR 300 192.0.2.7", asked: 1},
		{name: "slow", udp: late(200*time.Millisecond, v4), udp2: answers(0, "9 A 192.0.2.9"), want: "NOERROR 300 192.0.2.7", took: 200 * time.Millisecond, asked: 1},
		{name: "dead", udp: silent, udp2: v4, want: "NOERROR 300 192.0.2.7", took: 250 * time.Millisecond, asked: 1, elsewhere: 1},
		{name: "SERVFAIL", udp: answers(2), udp2: v4, want: "NOERROR 300 192.0.2.7", asked: 1, elsewhere: 1},
		{name: "REFUSED", udp: answers(5), udp2: v4, want: "NOERROR 300 192.0.2.7", asked: 1, elsewhere: 1},
		{name: "both fail", udp: answers(5), udp2: answers(2), want: "REFUSED", asked: 1, elsewhere: 1},
		{name: "no such name", udp: answers(3, "60 SOA ns. root. 1 1 1 1 30"), udp2: v4, want: "NXDOMAIN", asked: 1},
		{name: "nothing of this type", udp: answers(0, "60 SOA ns. root. 1 1 1 1 30"), udp2: v4, want: "NOERROR", asked: 1},
		{name: "lost once", udp: onlyAfter(900*time.Millisecond, v4), udp2: silent, want: "NOERROR 300 192.0.2.7", took: 1250 * time.Millisecond, asked: 2, elsewhere: 1},
		{name: "truncated", udp: truncated, tcp: v4, want: "NOERROR 300 192.0.2.7", asked: 1, overStream: 1},
		{name: "no datagrams", noUDP: true, tcp: v4, want: "NOERROR 300 192.0.2.7", overStream: 1},
		{name: "before EDNS", udp: noEDNS(v4), want: "NOERROR 300 192.0.2.7", asked: 2},
		{name: "wrong id, then the true one", udp: forged(v4, func(m *wire.Msg) { m.Id++ }), want: "NOERROR 300 192.0.2.7", asked: 1},
		{name: "wrong name, then the true one", udp: forged(v4, func(m *wire.Msg) { m.Question[0].Name = "evil." }), want: "NOERROR 300 192.0.2.7", asked: 1},
		{name: "wrong type, then the true one", udp: forged(v4, func(m *wire.Msg) { m.Question[0].Qtype++ }), want: "NOERROR 300 192.0.2.7", asked: 1},
		{name: "a question for an answer", udp: forged(v4, func(m *wire.Msg) { m.Response = false }), want: "NOERROR 300 192.0.2.7", asked: 1},
		{name: "all dead", udp: silent, udp2: silent, want: "SERVFAIL", took: giveUp},
		{name: "an alias of itself", udp: answers(0, "300 CNAME name.example.", "300 CNAME name.example."), want: "NOERROR 300 name.example. 300 name.example.", asked: 1},
		{name: "loopback for a public name", udp: answers(0, "300 A 127.0.0.1"), want: "NOERROR 300 127.0.0.1", asked: 1},
		{name: "4 kB", udp: answers(0, slices.Repeat([]string{"300 A 192.0.2.7"}, 250)...), want: "NOERROR truncated", asked: 1},
		{name: "alias", udp: answers(0, "300 CNAME www.example."), want: "NOERROR 300 www.example.", asked: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(nil)
				l.udp[asked], l.udp[other], l.tcp[asked], l.noUDP = tt.udp, tt.udp2, tt.tcp, tt.noUDP
				m, took := l.ask(question("name.example", wire.TypeA))
				if got := show(m); got != tt.want || took != tt.took {
					t.Errorf("%s after %v, want %s after %v", got, took, tt.want, tt.took)
				}
				n := map[string]int{}
				for _, q := range l.questions() {
					n[strings.TrimSuffix(q, " name.example.")]++
				}
				if tt.asked+tt.elsewhere+tt.overStream > 0 && (n["udp "+asked.String()] != tt.asked || n["udp "+other.String()] != tt.elsewhere || n["tcp "+asked.String()] != tt.overStream) {
					t.Errorf("asked %v, want %d, %d elsewhere, %d by TCP", n, tt.asked, tt.elsewhere, tt.overStream)
				}
			})
		})
	}
}

// What cannot be read is no answer, whatever else it has.
func TestAnswersThatAreNone(t *testing.T) {
	q, ok := parseQuery(mustPack(question("name.example", wire.TypeA)), false)
	if !ok {
		t.Fatal("no question")
	}
	head := q.upstream(7, false)
	head[2] |= 0x80
	record := func(name string) string { return name + "\x00\x01\x00\x01\x00\x00\x01\x2c\x00\x04\xc0\x00\x02\x07" }
	at := string([]byte{0xc0, byte(len(head))}) // a pointer to the record itself
	for _, tt := range []struct {
		name, rest string
		good       bool
	}{
		{"a record", record("\xc0\x0c"), true},
		{"a name that points to itself", record(at), false},
		{"a name that points ahead", record("\xc0\xff"), false},
		{"a name that begins with itself", record("\x01a" + at), false},
		{"a record that is cut off", record("\xc0\x0c")[:10], false},
		{"nothing", "", false},
		{"more than is said", record("\xc0\x0c") + record("\xc0\x0c"), false},
	} {
		msg := append(append([]byte(nil), head...), tt.rest...)
		msg[7] = 1 // answers
		if _, err := q.parseAnswer(msg, 7); (err == nil) != tt.good {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func mustPack(m *wire.Msg) []byte {
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func truncated(q *wire.Msg, send func(*wire.Msg)) {
	m := new(wire.Msg).SetReply(q)
	m.Truncated = true
	send(m)
}

// onlyAfter answers what comes that long after the world began.
func onlyAfter(d time.Duration, s serve) serve {
	var once sync.Once
	var began time.Time
	return func(q *wire.Msg, send func(*wire.Msg)) {
		once.Do(func() { began = time.Now() })
		if time.Since(began) >= d {
			s(q, send)
		}
	}
}

func noEDNS(s serve) serve {
	return func(q *wire.Msg, send func(*wire.Msg)) {
		if q.IsEdns0() != nil {
			m := new(wire.Msg).SetRcode(q, wire.RcodeFormatError)
			send(m)
			return
		}
		s(q, send)
	}
}

// forged sends a spoiled answer first.
func forged(s serve, spoil func(*wire.Msg)) serve {
	return func(q *wire.Msg, send func(*wire.Msg)) {
		answers(0, "300 A 6.6.6.6")(q, func(m *wire.Msg) { spoil(m); send(m) })
		s(q, send)
	}
}

// What another peer says is not listened to.
func TestAnswerOfAnotherPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		l.udp[asked] = answers(0, "300 A 6.6.6.6")
		l.forged = netip.MustParseAddrPort("203.0.113.66:53")
		if m, _ := l.ask(question("name.example", wire.TypeA)); show(m) != "SERVFAIL" {
			t.Errorf("got %s", show(m))
		}
		if l.r.Counters().Strange == 0 {
			t.Error("not counted")
		}
	})
}

// An answer is kept for its TTL, by the server and the question, and grows old.
func TestCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		l.udp[asked], l.udp[other] = answers(0, "100 A 192.0.2.7", "200 A 192.0.2.8"), answers(0, "100 A 192.0.2.9")
		steps := []struct {
			after time.Duration
			to    netip.AddrPort
			name  string
			want  string
			asked int // in all
		}{
			{0, asked, "name.example", "NOERROR 100 192.0.2.7 200 192.0.2.8", 1},
			{40 * time.Second, asked, "NAME.example", "NOERROR 60 192.0.2.7 160 192.0.2.8", 1},
			{0, other, "name.example", "NOERROR 100 192.0.2.9", 2},
			{59 * time.Second, asked, "name.Example", "NOERROR 1 192.0.2.7 101 192.0.2.8", 2},
			{time.Second, asked, "name.example", "NOERROR 100 192.0.2.7 200 192.0.2.8", 3},
			{0, asked, "another.example", "NOERROR 100 192.0.2.7 200 192.0.2.8", 4},
		}
		for i, s := range steps {
			time.Sleep(s.after)
			m, _ := l.askAs(me, s.to, question(s.name, wire.TypeA))
			if got, n := show(m), len(l.questions()); got != s.want || n != s.asked {
				t.Errorf("step %d: %s with %d questions, want %s with %d", i, got, n, s.want, s.asked)
			}
		}
	})
}

// What other servers have said is not what those of a reloaded file say.
func TestReloadAsksTheNewServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := DefaultConfig()
		l := newLab(nil)
		l.udp[asked], l.udp[other] = answers(0, "300 A 192.0.2.7"), answers(0, "300 A 192.0.2.9")
		for i, step := range []struct {
			upstream, route string
			want            string
		}{
			{"udp://203.0.113.53", "", "NOERROR 300 192.0.2.7"},
			{"udp://198.51.100.53", "", "NOERROR 300 192.0.2.9"},
			{"udp://198.51.100.53", "udp://203.0.113.53", "NOERROR 299 192.0.2.7"},
			{"udp://203.0.113.53", "udp://198.51.100.53", "NOERROR 298 192.0.2.9"},
		} {
			c.Upstreams, c.Route = []string{step.upstream}, nil
			if step.route != "" {
				c.Route = []Route{{DomainSuffix: []string{"example"}, Upstreams: []string{step.route}}}
			}
			l.r.Reload(c, map[string]dialer.Outbound{direct: l.world})
			if m, _ := l.ask(question("name.example", wire.TypeA)); show(m) != step.want {
				t.Errorf("step %d: %s, want %s", i, show(m), step.want)
			}
			if i > 0 {
				time.Sleep(time.Second)
			}
		}
		if n := len(l.questions()); n != 2 {
			t.Errorf("%d questions, want 2: what the same servers said is kept", n)
		}
	})
}

// What is not there is kept for as long as its SOA says (RFC 2308), and without
// one not at all; no more is what has a TTL of 0, or failed.
func TestWhatIsNotKept(t *testing.T) {
	tests := []struct {
		name   string
		answer serve
		keeps  time.Duration
	}{
		{"no such name", answers(3, "600 SOA ns. root. 1 1 1 1 30"), 30 * time.Second},
		{"no such type", answers(0, "20 SOA ns. root. 1 1 1 1 600"), 20 * time.Second},
		{"no such name, a long time", answers(3, "999999 SOA ns. root. 1 1 1 1 999999"), 3 * time.Hour},
		{"no SOA", answers(3), 0},
		{"TTL 0", answers(0, "0 A 192.0.2.7"), 0},
		{"failed", answers(2), 0},
		{"a long time", answers(0, "999999 A 192.0.2.7"), 24 * time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(func(c *Config) { c.Upstreams = []string{"udp://203.0.113.53"} })
				l.udp[asked] = tt.answer
				q := question("name.example", wire.TypeA)
				l.ask(q)
				n := len(l.questions())
				if tt.keeps > 0 {
					time.Sleep(tt.keeps - time.Second)
					if l.ask(q); len(l.questions()) != n {
						t.Errorf("asked again before %v", tt.keeps)
					}
					time.Sleep(time.Second)
				}
				if l.ask(q); len(l.questions()) == n {
					t.Errorf("not asked again after %v", tt.keeps)
				}
			})
		})
	}
}

// When nothing answers an old answer is given, for 30 s, after 1.8 s at first
// and at once then; when something does, its answer.
func TestStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		up := true
		var mu sync.Mutex
		l.udp[asked] = func(q *wire.Msg, send func(*wire.Msg)) {
			mu.Lock()
			defer mu.Unlock()
			if up {
				answers(0, "100 A 192.0.2.7")(q, send)
			}
		}
		set := func(on bool) { mu.Lock(); up = on; mu.Unlock() }
		steps := []struct {
			up    bool
			after time.Duration
			name  string
			want  string
			took  time.Duration
		}{
			{true, 0, "name.example", "NOERROR 100 192.0.2.7", 0},
			{false, 101 * time.Second, "name.example", "NOERROR 30 192.0.2.7", staleAfter},
			{false, time.Second, "name.example", "NOERROR 30 192.0.2.7", 0},
			{false, time.Second, "unknown.example", "SERVFAIL", giveUp},
			{true, time.Minute, "name.example", "NOERROR 100 192.0.2.7", 0},
			{false, 26 * time.Hour, "name.example", "SERVFAIL", giveUp},
		}
		for i, s := range steps {
			set(s.up)
			time.Sleep(s.after)
			if m, took := l.ask(question(s.name, wire.TypeA)); show(m) != s.want || took != s.took {
				t.Errorf("step %d: %s after %v, want %s after %v", i, show(m), took, s.want, s.took)
			}
		}
	})
}

// An upstream that did not answer goes last for the next questions: it costs a
// stagger once.
func TestDeadUpstreamCostsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(func(c *Config) { c.Upstreams = []string{"udp://203.0.113.53", "udp://198.51.100.53"} })
		l.udp[asked], l.udp[other] = silent, late(20*time.Millisecond, answers(0, "300 A 192.0.2.7"))
		var all time.Duration
		for i := range 20 {
			_, took := l.ask(question(fmt.Sprintf("n%d.example", i), wire.TypeA))
			all += took
		}
		if want := maxStagger + 20*20*time.Millisecond; all != want {
			t.Errorf("20 questions took %v, want %v", all, want)
		}
	})
}

// Those who ask the same at the same time are answered by one question; and if
// the one who asked goes away, the next one asks.
func TestOneQuestionForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(func(c *Config) { c.Upstreams = []string{"udp://203.0.113.53"} })
		l.udp[asked] = late(100*time.Millisecond, answers(0, "0 A 192.0.2.7"))
		first, leave := context.WithCancel(context.Background())
		var all sync.WaitGroup
		b, _ := question("name.example", wire.TypeA).Pack()
		answered := make(chan struct{}, 50)
		for i := range 50 {
			all.Go(func() {
				ctx := context.Background()
				if i == 0 {
					ctx = first
				} else {
					time.Sleep(time.Millisecond)
				}
				_, wait, _ := l.r.Take(&flow.Flow{Proto: flow.UDP, Src: me, Dst: asked}, b, l.way)
				wait(ctx, func(b []byte) {
					if b[3]&0xf == 0 {
						answered <- struct{}{}
					}
				})
			})
		}
		time.Sleep(10 * time.Millisecond)
		leave()
		all.Wait()
		if len(answered) != 49 || len(l.questions()) != 2 {
			t.Errorf("%d were answered by %d questions, want 49 by 2", len(answered), len(l.questions()))
		}
	})
}

// Of a flood no more wait, and no more upstreams are asked at a time, than there
// is room for; the cache is bounded too.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(func(c *Config) { c.Upstreams, c.Cache = []string{"udp://203.0.113.53"}, 100 })
		l.r.waiting, l.r.asking = newShares(200), newShares(10)
		var now, most int
		var mu sync.Mutex
		l.udp[asked] = func(q *wire.Msg, send func(*wire.Msg)) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			now--
			mu.Unlock()
			answers(0, "300 A 192.0.2.7")(q, send)
		}
		var all sync.WaitGroup
		for i := range 1000 {
			all.Go(func() { l.ask(question(fmt.Sprintf("n%d.example", i), wire.TypeA)) })
		}
		all.Wait()
		c := l.r.Counters()
		if most != 5 || c.Dropped != 900 || c.Answered != 100 || len(l.r.cache.byKey) > 100 {
			t.Errorf("%d at a time, %d dropped, %d answered, %d kept", most, c.Dropped, c.Answered, len(l.r.cache.byKey))
		}
	})
}

// A client that asks a dead server as much as it can takes neither the places of
// others nor makes them wait.
func TestOneClientLeavesRoomForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(func(c *Config) { c.Upstreams = []string{"udp://203.0.113.53"} })
		l.r.waiting, l.r.asking = newShares(200), newShares(10)
		l.udp[asked] = func(q *wire.Msg, send func(*wire.Msg)) {
			if strings.HasPrefix(q.Question[0].Name, "good") {
				answers(0, "0 A 192.0.2.7")(q, send)
			}
		}
		var all sync.WaitGroup
		for i := range 1000 {
			all.Go(func() { l.ask(question(fmt.Sprintf("dead%d.example", i), wire.TypeA)) })
		}
		synctest.Wait()
		for i := range 50 {
			from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(100 + i)}), 4000)
			if m, took := l.askAs(from, asked, question(fmt.Sprintf("good%d.example", i), wire.TypeA)); show(m) != "NOERROR 0 192.0.2.7" || took != 0 {
				t.Errorf("another client: %s after %v", show(m), took)
			}
		}
		all.Wait()
		if s := l.r.asking; s.free != 10 || len(s.taken)+len(s.queues) != 0 || l.r.waiting.free != 200 || len(l.r.waiting.taken) != 0 {
			t.Errorf("places are not given back: %+v, %+v", s, l.r.waiting)
		}
	})
}

// twoWays is a group of which a datagram goes by one member, the best that is not
// to be avoided.
type twoWays struct{ first, second *world }

func (g twoWays) Name() string        { return "group" }
func (g twoWays) Order() []string     { return []string{g.first.name, g.second.name} }
func (g twoWays) Outbounds() []string { return []string{g.second.name, g.first.name} }
func (g twoWays) pick(t dialer.Target) *world {
	if slices.Contains(t.Avoid, g.first.name) {
		return g.second
	}
	return g.first
}
func (g twoWays) DialStream(ctx context.Context, t dialer.Target) (*dialer.Conn, error) {
	return g.pick(t).DialStream(ctx, t)
}
func (g twoWays) OpenPackets(ctx context.Context, t dialer.Target) (*dialer.PacketConn, error) {
	return g.pick(t).OpenPackets(ctx, t)
}

// The server that was asked is asked by each path of a group, before another
// server is; and a path that loses questions goes last from then on.
func TestPathsOfAGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		dead, good := &world{name: "dead", udp: map[netip.AddrPort]serve{}}, &world{name: "good", udp: map[netip.AddrPort]serve{}}
		good.udp[asked], good.udp[other] = answers(0, "300 A 192.0.2.7"), answers(0, "300 A 192.0.2.9")
		group := twoWays{dead, good}
		ask := func(name string) (string, time.Duration) {
			f := &flow.Flow{Proto: flow.UDP, Src: me, Dst: asked, Attachment: "home"}
			began := time.Now()
			var m wire.Msg
			_, wait, _ := l.r.Take(f, mustPack(question(name, wire.TypeA)), func(netip.AddrPort, flow.Proto) (dialer.Outbound, error) { return group, nil })
			wait(t.Context(), func(b []byte) {
				if err := m.Unpack(b); err != nil {
					t.Error(err)
				}
			})
			return show(&m), time.Since(began)
		}
		for i, want := range []time.Duration{maxStagger / 2, 0} {
			if got, took := ask(fmt.Sprintf("n%d.example", i)); got != "NOERROR 300 192.0.2.7" || took != want {
				t.Errorf("question %d: %s after %v, want %v", i, got, took, want)
			}
		}
		good.udp[asked] = silent
		if got, took := ask("dead.example"); got != "NOERROR 300 192.0.2.9" || took > 300*time.Millisecond {
			t.Errorf("where the server is dead: %s after %v", got, took)
		}
	})
}
