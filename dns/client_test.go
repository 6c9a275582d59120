package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
	"cgtun/flow"
)

// What is no question to a resolver goes on as a flow.
func TestNotOurs(t *testing.T) {
	l := newLab(nil)
	tests := map[string]func(*wire.Msg){
		"answer":          func(m *wire.Msg) { m.Response = true },
		"update":          func(m *wire.Msg) { m.Opcode = wire.OpcodeUpdate },
		"notify":          func(m *wire.Msg) { m.Opcode = wire.OpcodeNotify },
		"zone transfer":   func(m *wire.Msg) { m.Question[0].Qtype = wire.TypeAXFR },
		"zone difference": func(m *wire.Msg) { m.Question[0].Qtype = wire.TypeIXFR },
		"to an authority": func(m *wire.Msg) { m.RecursionDesired = false },
		"two questions":   func(m *wire.Msg) { m.Question = append(m.Question, m.Question[0]) },
		"another class":   func(m *wire.Msg) { m.Question[0].Qclass = wire.ClassCHAOS },
		"signed":          func(m *wire.Msg) { m.SetTsig("key.", wire.HmacSHA256, 300, 1) },
		"later EDNS":      func(m *wire.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) },
	}
	for name, change := range tests {
		m := question("name.example", wire.TypeA)
		change(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, mine := l.r.Take(&flow.Flow{Proto: flow.UDP, Src: me, Dst: asked}, b, l.way); mine {
			t.Errorf("%s: taken", name)
		}
	}
	for _, b := range []string{"", "GET / HTTP/1.0\r\n\r\n", "SSH-2.0-x\r\n", strings.Repeat("\x00", 12)} {
		if _, _, mine := l.r.Take(&flow.Flow{Proto: flow.UDP, Src: me, Dst: asked}, []byte(b), l.way); mine {
			t.Errorf("%q: taken", b)
		}
	}
}

// Answers fit the client: EDNS if it has that, as long as it takes, with the
// bits of DNSSEC, and cut where they are too long.
func TestClientSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		var records []string
		for i := range 60 {
			records = append(records, fmt.Sprintf("300 A 192.0.2.%d", i))
		}
		l.udp[asked] = answers(0, records...)
		for _, size := range []uint16{0, 100, 512, 1232, 4096} {
			q := question("name.example", wire.TypeA)
			if size > 0 {
				q.SetEdns0(size, true)
				q.IsEdns0().Option = append(q.IsEdns0().Option, &wire.EDNS0_COOKIE{Code: wire.EDNS0COOKIE, Cookie: "0123456789abcdef"})
			}
			m, _ := l.ask(q)
			o := m.IsEdns0()
			if short := size < 1232; m.Truncated != short || short == (len(m.Answer) == 60) {
				t.Errorf("size %d: truncated %t with %d records", size, m.Truncated, len(m.Answer))
			}
			if (o != nil) != (size > 0) || o != nil && (!o.Do() || len(o.Option) > 0) {
				t.Errorf("size %d: EDNS %v", size, o)
			}
		}
	})
}

// Unknown types, signatures and the options of the question's ends pass as they
// are.
func TestUntouched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		rrs := []string{
			`name.example. 300 IN TYPE65300 \# 4 deadbeef`,
			"name.example. 300 IN RRSIG A 8 2 300 20300101000000 20200101000000 1 example. AAAA",
		}
		l.udp[asked] = func(q *wire.Msg, send func(*wire.Msg)) {
			o := q.IsEdns0()
			if o == nil || !o.Do() || o.UDPSize() != upstreamSize || !q.CheckingDisabled || len(o.Option) != 1 || o.Option[0].Option() != wire.EDNS0SUBNET {
				return
			}
			m := new(wire.Msg).SetReply(q)
			m.AuthenticatedData = true
			for _, text := range rrs {
				rr, err := wire.NewRR(text)
				if err != nil {
					panic(err)
				}
				m.Answer = append(m.Answer, rr)
			}
			m.SetEdns0(1232, true)
			m.IsEdns0().Option = []wire.EDNS0{&wire.EDNS0_EDE{InfoCode: 3, ExtraText: "x"}}
			m.Extra = append(m.Extra, m.Answer[0]) // OPT is not the last one
			send(m)
		}
		q := question("name.example", 65300)
		q.CheckingDisabled = true
		q.SetEdns0(1232, true)
		q.IsEdns0().Option = []wire.EDNS0{
			&wire.EDNS0_COOKIE{Code: wire.EDNS0COOKIE, Cookie: "0123456789abcdef"},
			&wire.EDNS0_SUBNET{Code: wire.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0).To4()},
		}
		m, _ := l.ask(q)
		if m == nil || len(m.Answer) != 2 {
			t.Fatalf("got %v", m)
		}
		for i, rr := range m.Answer {
			want, _ := wire.NewRR(rrs[i])
			if rr.String() != want.String() {
				t.Errorf("got %s, want %s", rr, want)
			}
		}
		if !m.AuthenticatedData || len(m.Extra) != 2 {
			t.Errorf("AD %t, %d additional records", m.AuthenticatedData, len(m.Extra))
		}
	})
}

// The names of the configuration, and names that other servers know.
func TestConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(func(c *Config) {
			c.Hosts = map[string][]netip.Addr{"Mirror.lab": {netip.MustParseAddr("192.0.2.70"), netip.MustParseAddr("2001:db8::70")}}
			c.Upstreams = []string{"tcp://198.51.100.53"}
			c.Route = []Route{{DomainSuffix: []string{"corp.example"}, Upstreams: []string{"udp://203.0.113.53"}}}
		})
		l.udp[asked], l.tcp[other] = answers(0, "300 A 192.0.2.7"), answers(0, "300 A 192.0.2.8")
		for _, tt := range []struct {
			name string
			kind uint16
			want string
		}{
			{"mirror.LAB", wire.TypeA, "NOERROR 60 192.0.2.70"},
			{"mirror.lab", wire.TypeAAAA, "NOERROR 60 2001:db8::70"},
			{"mirror.lab", wire.TypeMX, "NOERROR"},
			{"www.Corp.example", wire.TypeA, "NOERROR 300 192.0.2.7"},
			{"corp.example", wire.TypeA, "NOERROR 300 192.0.2.7"},
			{"notcorp.example", wire.TypeA, "NOERROR 300 192.0.2.8"},
		} {
			if m, _ := l.ask(question(tt.name, tt.kind)); show(m) != tt.want {
				t.Errorf("%s: %s, want %s", tt.name, show(m), tt.want)
			}
		}
	})
}

// What the rules deny is refused, or not answered.
func TestDenied(t *testing.T) {
	l := newLab(nil)
	b, _ := question("name.example", wire.TypeA).Pack()
	for why, want := range map[flow.Reason]string{flow.Prohibited: "REFUSED", flow.Dropped: "nothing"} {
		deny := func(netip.AddrPort, flow.Proto) (dialer.Outbound, error) {
			return nil, &dialer.Error{Reason: why, Err: io.EOF}
		}
		answer, wait, mine := l.r.Take(&flow.Flow{Proto: flow.UDP, Src: me, Dst: asked}, b, deny)
		var m *wire.Msg
		if answer != nil {
			m = new(wire.Msg)
			_ = m.Unpack(answer)
		}
		if wait != nil || !mine || show(m) != want {
			t.Errorf("%v: %s, want %s", why, show(m), want)
		}
	}
}

// A client's flows have the names that it was given the addresses under, and
// others' have not.
func TestNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		l.udp[asked] = answers(0, "300 A 192.0.2.7")
		dst := netip.MustParseAddrPort("192.0.2.7:443")
		name := func(src, attachment string) string {
			name, sure, _ := l.r.Name(&flow.Flow{Src: netip.MustParseAddrPort(src), Dst: dst, Attachment: attachment})
			if name != "" && !sure {
				name += "?"
			}
			return name
		}
		l.ask(question("WWW.example", wire.TypeA))
		for _, tt := range []struct{ src, attachment, want string }{
			{"192.0.2.1:5", "home", "www.example"},
			{"192.0.2.2:5", "home", ""},
			{"192.0.2.1:5", "lab", ""},
		} {
			if got := name(tt.src, tt.attachment); got != tt.want {
				t.Errorf("%s in %s: %q, want %q", tt.src, tt.attachment, got, tt.want)
			}
		}
		l.ask(question("other.example", wire.TypeA))
		if got := name("192.0.2.1:5", "home"); got != "other.example?" {
			t.Errorf("after another answer: %q", got)
		}
		time.Sleep(nameFor + 299*time.Second)
		if got := name("192.0.2.1:5", "home"); got != "other.example?" {
			t.Errorf("before its time: %q", got)
		}
		time.Sleep(2 * time.Second)
		if got := name("192.0.2.1:5", "home"); got != "" {
			t.Errorf("after its time: %q", got)
		}
		for i := range 2 * maxNames {
			l.r.names.note("home", me.Addr(), "", "x", []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})}, 0, time.Now())
			l.r.names.note(fmt.Sprint(i), me.Addr(), "", "x", []netip.Addr{me.Addr()}, 0, time.Now())
		}
		if n := len(l.r.names.clients); n > maxClients {
			t.Errorf("%d clients are remembered", n)
		}
		l.r.Forget("home")
		for key := range l.r.names.clients {
			if key.attachment == "home" {
				t.Error("not forgotten")
			}
		}
	})
}

// The messages of a connection: answered as they come, until one is not ours.
func TestStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		l.udp[asked] = func(q *wire.Msg, send func(*wire.Msg)) {
			if strings.HasPrefix(q.Question[0].Name, "slow") {
				time.Sleep(100 * time.Millisecond)
			}
			answers(0, "300 A 192.0.2.7")(q, send)
		}
		axfr := question("example", wire.TypeAXFR)
		for _, tt := range []struct {
			name string
			send func(io.Writer)
			want string
			pass string
		}{
			{"pipelined", func(w io.Writer) { sendAll(w, question("slow.example", 1), question("fast.example", 1)) }, "fast.example. slow.example.", ""},
			{"zone transfer behind", func(w io.Writer) { sendAll(w, question("slow2.example", 1), axfr) }, "slow2.example.", framed(axfr)},
			{"not DNS", func(w io.Writer) { io.WriteString(w, "GET / HTTP/1.0\r\n\r\n") }, "", "GET / HTTP/1.0"},
			{"short", func(w io.Writer) { io.WriteString(w, "hi") }, "", "hi"},
		} {
			here, there := net.Pipe()
			type end struct {
				read []byte
				pass bool
			}
			ended := make(chan end)
			go func() {
				read, pass, _ := l.r.Serve(context.Background(), &flow.Flow{Proto: flow.TCP, Src: me, Dst: asked}, there, l.way)
				there.Close()
				ended <- end{read, pass}
			}()
			go func() {
				tt.send(here)
				time.Sleep(2 * time.Second)
				here.Close()
			}()
			var got []string
			for {
				b, err := readMessage(here)
				if err != nil {
					break
				}
				m := new(wire.Msg)
				if err := m.Unpack(b); err != nil {
					t.Fatal(err)
				}
				got = append(got, m.Question[0].Name)
			}
			e := <-ended
			if strings.Join(got, " ") != tt.want || e.pass != (tt.pass != "") || string(e.read) != tt.pass {
				t.Errorf("%s: answered %q, passed on %q", tt.name, got, e.read)
			}
		}
		time.Sleep(3 * time.Second) // the clients end
	})
}

// What a client asks for can be any bytes; flows show it as zone files do.
func TestNamesAreShownSafely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		l.udp[asked] = answers(0, "300 A 192.0.2.7")
		l.ask(question(`x\027[2J\010%s\"\195\164\226\128\174.example`, wire.TypeA))
		f := &flow.Flow{Src: me, Dst: netip.MustParseAddrPort("192.0.2.7:80"), Attachment: "home"}
		if name, _, _ := l.r.Name(f); name != `x\027[2j\010%s\"\195\164\226\128\174.example` {
			t.Errorf("%q", name)
		}
	})
}

// A client that takes no answers is let go in time, and holds no end up.
func TestUnreadAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(nil)
		l.udp[asked] = answers(0, "300 A 192.0.2.7")
		for _, tt := range []struct {
			name      string
			stop, end time.Duration
		}{
			{"the end comes", time.Second, time.Second},
			{"no end", time.Hour, giveUp},
		} {
			ctx, cancel := context.WithTimeout(context.Background(), tt.stop)
			here, there := net.Pipe()
			go sendAll(here, question("name.example", 1))
			began := time.Now()
			_, pass, _ := l.r.Serve(ctx, &flow.Flow{Proto: flow.TCP, Src: me, Dst: asked}, there, l.way)
			if took := time.Since(began); took != tt.end || pass {
				t.Errorf("%s: it took %v, want %v (passed on: %v)", tt.name, took, tt.end, pass)
			}
			cancel()
			here.Close()
			there.Close()
		}
	})
}

// Whoever ends a connection of questions, it is told.
func TestStreamEndsForItsReason(t *testing.T) {
	r := newLab(nil).r
	for _, tt := range []struct {
		name string
		end  func(client *net.TCPConn, cancel context.CancelFunc)
		want flow.Reason
	}{
		{"closed", func(c *net.TCPConn, _ context.CancelFunc) { c.Close() }, flow.Closed},
		{"reset", func(c *net.TCPConn, _ context.CancelFunc) { _ = c.SetLinger(0); c.Close() }, flow.Reset},
		{"canceled", func(_ *net.TCPConn, cancel context.CancelFunc) { cancel() }, flow.Canceled},
	} {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		client, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		tt.end(client.(*net.TCPConn), cancel)
		if _, pass, err := r.Serve(ctx, &flow.Flow{Proto: flow.TCP, Src: me, Dst: asked}, server, nil); pass || flow.ReasonOf(err) != tt.want {
			t.Errorf("%s: passed on %t, %v", tt.name, pass, err)
		}
		cancel()
		client.Close()
		server.Close()
		ln.Close()
	}
}

func framed(m *wire.Msg) string {
	b, _ := m.Pack()
	return string(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
}

func sendAll(w io.Writer, all ...*wire.Msg) {
	for _, m := range all {
		io.WriteString(w, framed(m))
	}
}

// The host's resolvers, with systemd-resolved or without.
func TestHostServers(t *testing.T) {
	for _, tt := range []struct{ etc, resolved, want string }{
		{"nameserver 192.0.2.1\nnameserver\t192.0.2.2\noptions x\n", "nameserver 9.9.9.9", "[192.0.2.1:53 192.0.2.2:53]"},
		{"nameserver 127.0.0.53\n", "nameserver 192.0.2.3\nnameserver 2001:db8::1\n", "[192.0.2.3:53 [2001:db8::1]:53]"},
		{"nameserver 127.0.0.53\n", "", "[127.0.0.53:53]"},
		{"nameserver 127.0.0.1\n", "nameserver 192.0.2.3", "[127.0.0.1:53]"},
		{"", "", "[]"},
	} {
		h := &host{read: func(path string) ([]byte, error) {
			return []byte(map[string]string{resolvConf: tt.etc, resolvedConf: tt.resolved}[path]), nil
		}}
		if got := fmt.Sprint(h.servers(time.Now())); got != tt.want {
			t.Errorf("%q and %q: %s, want %s", tt.etc, tt.resolved, got, tt.want)
		}
	}
}

// The files are read again when they have changed, a second later at most.
func TestHostServersAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		text := "nameserver 192.0.2.1"
		h := &host{read: func(string) ([]byte, error) { return []byte(text), nil }}
		h.servers(time.Now())
		text = "nameserver 192.0.2.2"
		time.Sleep(hostEvery)
		if got := fmt.Sprint(h.servers(time.Now())); got != "[192.0.2.2:53]" {
			t.Errorf("got %s", got)
		}
	})
}

// Addresses to which there is no way are left out where there are others, and only
// there.
func TestFamilyWithoutAWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, no6 := range []bool{true, false} {
			l := newLab(nil)
			l.no6 = no6
			l.udp[asked] = func(q *wire.Msg, send func(*wire.Msg)) {
				record := map[uint16]string{wire.TypeA: "300 A 192.0.2.7", wire.TypeAAAA: "300 AAAA 2001:db8::7"}[q.Question[0].Qtype]
				switch name := q.Question[0].Name; {
				case name == "both.example.", name == "six.example." && q.Question[0].Qtype == wire.TypeAAAA:
					answers(0, record)(q, send)
				case name == "local.example.":
					answers(0, map[uint16]string{wire.TypeA: "300 A 192.0.2.7", wire.TypeAAAA: "300 AAAA fe80::7"}[q.Question[0].Qtype])(q, send)
				default:
					answers(0, "60 SOA ns. root. 1 1 1 1 30")(q, send)
				}
			}
			left := "NOERROR"
			if !no6 {
				left = "NOERROR 300 2001:db8::7"
			}
			for range 2 { // from the server, and from the cache
				for _, tt := range []struct {
					name string
					kind uint16
					want string
				}{
					{"both.example", wire.TypeAAAA, left},
					{"both.example", wire.TypeA, "NOERROR 300 192.0.2.7"},
					{"six.example", wire.TypeAAAA, "NOERROR 300 2001:db8::7"},
					{"six.example", wire.TypeA, "NOERROR"},
					{"local.example", wire.TypeAAAA, "NOERROR 300 fe80::7"},
				} {
					if m, _ := l.ask(question(tt.name, tt.kind)); show(m) != tt.want {
						t.Errorf("%s %s, no way by IPv6: %v: %s, want %s", tt.name, wire.TypeToString[tt.kind], no6, show(m), tt.want)
					}
				}
			}
			c := l.r.Counters()
			if sum := c.Cached + c.Stale + c.Answered + c.Failed + c.Refused + c.Dropped + c.Passed; sum != c.Queries || l.r.waiting.free != 4096 {
				t.Errorf("counters %+v, %d places", c, l.r.waiting.free)
			}
		}
	})
}
