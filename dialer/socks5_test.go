package dialer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cgtun/flow"
)

// proxyServer runs serve with each connection to a listener on loopback, and
// returns its address. The connection is closed when serve returns.
func proxyServer(t *testing.T, serve func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	return newFakeProxy(t, serve).addr
}

// proxyTo makes an outbound "relay" of the type c has, whose server is addr.
func proxyTo(t *testing.T, c Config, addr netip.AddrPort) *Proxy {
	t.Helper()
	direct, err := NewDirect(Config{Name: "direct"})
	if err != nil {
		t.Fatal(err)
	}
	c.Name, c.Server = "relay", addr.String()
	p, err := NewProxy(c, direct, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// expect reads what a client is to say, and fails if that is something else.
func expect(t *testing.T, c io.Reader, want string) bool {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(c, got)
	if string(got) != want {
		t.Errorf("the proxy got %q, %v, want %q", got[:n], err, want)
	}
	return string(got) == want
}

func say(c io.Writer, text string) { _, _ = io.WriteString(c, text) }

// sayInCrumbs says a text byte by byte, each in a segment of its own.
func sayInCrumbs(c io.Writer, text string) {
	for i := range len(text) {
		say(c, text[i:i+1])
		time.Sleep(100 * time.Microsecond) // longer than the other side reads what came
	}
}

const (
	hello   = "\x05\x01\x00"
	noAuth  = "\x05\x00"
	success = "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
)

func TestSOCKS5Requests(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("192.0.2.7:443"), netip.MustParseAddrPort("[2001:db8::7]:443")
	const v4Request = "\x05\x01\x00\x01\xc0\x00\x02\x07\x01\xbb"
	const v6Request = "\x05\x01\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x01\xbb"
	const nameRequest = "\x05\x01\x00\x03\x0bexample.org\x01\xbb"
	home := &flow.Flow{Attachment: flow.Home, Src: netip.MustParseAddrPort("127.0.0.1:9")}
	with := Config{Username: "u", Password: NewSecret("secret")}
	names := Config{RemoteDNS: true}
	tests := []struct {
		name   string
		c      Config
		target Target
		script []string // what the proxy hears, and says, by turns
	}{
		{"v4", Config{}, Target{Addr: v4}, []string{hello, noAuth, v4Request, success}},
		{"v4 in v6", Config{}, Target{Addr: netip.MustParseAddrPort("[::ffff:192.0.2.7]:443")}, []string{hello, noAuth, v4Request, success}},
		{"v6", Config{}, Target{Addr: v6}, []string{hello, noAuth, v6Request, success}},
		{"password", with, Target{Addr: v4}, []string{"\x05\x02\x00\x02", "\x05\x02", "\x01\x01u\x06secret", "\x01\x00", v4Request, success}},
		{"password that nobody wants", with, Target{Addr: v4}, []string{"\x05\x02\x00\x02", noAuth, v4Request, success}},
		{"answer with a name", Config{}, Target{Addr: v4}, []string{hello, noAuth, v4Request, "\x05\x00\x00\x03\x04host\x00\x01"}},
		{"answer with v6", Config{}, Target{Addr: v4}, []string{hello, noAuth, v4Request, "\x05\x00\x00\x04" + strings.Repeat("\x00", 18)}},
		{"name", names, Target{Addr: v4, Name: "example.org", Flow: home}, []string{hello, noAuth, nameRequest, success}},
		{"name, not wanted", Config{}, Target{Addr: v4, Name: "example.org", Flow: home}, []string{hello, noAuth, v4Request, success}},
		{"name, unknown", names, Target{Addr: v4, Flow: home}, []string{hello, noAuth, v4Request, success}},
		{"name with a line", names, Target{Addr: v4, Name: "a\r\nb.org", Flow: home}, []string{hello, noAuth, v4Request, success}},
		{"name that is an address", names, Target{Addr: v4, Name: "127.0.0.1", Flow: home}, []string{hello, noAuth, v4Request, success}},
		{"name that is half an address", names, Target{Addr: v4, Name: "127.0x1", Flow: home}, []string{hello, noAuth, v4Request, success}},
		{"name from elsewhere to a proxy at home", names, Target{Addr: v4, Name: "example.org", Flow: &flow.Flow{Attachment: "lab1"}}, []string{hello, noAuth, v4Request, success}},
		{"name from behind home to a proxy at home", names, Target{Addr: v4, Name: "example.org", Flow: &flow.Flow{Attachment: flow.Home, Src: v4}}, []string{hello, noAuth, v4Request, success}},
	}
	for i := range 2 * len(tests) {
		tt, say := tests[i/2], say
		if i%2 == 1 {
			tt.name, say = tt.name+", in crumbs", sayInCrumbs
		}
		t.Run(tt.name, func(t *testing.T) {
			addr := proxyServer(t, func(c *net.TCPConn) {
				for i := 0; i < len(tt.script); i += 2 {
					if !expect(t, c, tt.script[i]) {
						return
					}
					answer := tt.script[i+1]
					if i+2 == len(tt.script) {
						answer += "first bytes" // of the target, in the same segment
					}
					say(c, answer)
				}
				_, _ = io.Copy(c, c)
			})
			tt.c.Type = TypeSOCKS5
			c, err := proxyTo(t, tt.c, addr).DialStream(t.Context(), tt.target)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, ok := c.Conn.(flow.TCPConn); !ok {
				t.Errorf("the tunnel is a %T, which the kernel cannot move bytes of", c.Conn)
			}
			say(c, " and an echo")
			_ = c.CloseWrite()
			if got, err := io.ReadAll(c); string(got) != "first bytes and an echo" || err != nil {
				t.Errorf("the tunnel gave %q, %v", got, err)
			}
			if got := strings.Join(c.Path, " "); got != "relay" {
				t.Errorf("path %q", got)
			}
		})
	}
}

// What a proxy says decides what the client is told; what a proxy is makes the
// target unreachable, never refused.
func TestSOCKS5Failures(t *testing.T) {
	const request = "\x05\x01\x00\x01\xc0\x00\x02\x07\x01\xbb"
	reply := func(text string) func(*testing.T, *net.TCPConn) {
		return func(t *testing.T, c *net.TCPConn) {
			if expect(t, c, hello) {
				say(c, noAuth)
			}
			if expect(t, c, request) {
				say(c, text)
			}
		}
	}
	greeting := func(text string) func(*testing.T, *net.TCPConn) {
		return func(t *testing.T, c *net.TCPConn) {
			if expect(t, c, hello) {
				say(c, text)
			}
		}
	}
	tests := []struct {
		name  string
		serve func(*testing.T, *net.TCPConn)
		why   flow.Reason
		op    string
		want  string
	}{
		{"refused", reply("\x05\x05\x00\x01"), flow.Refused, "connect", "connection refused"},
		{"host unreachable", reply("\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00"), flow.HostUnreachable, "connect", "host unreachable"},
		{"net unreachable", reply("\x05\x03\x00\x01"), flow.NetUnreachable, "connect", "network unreachable"},
		{"not allowed", reply("\x05\x02\x00\x01"), flow.Prohibited, "connect", "not allowed by its rules"},
		{"TTL", reply("\x05\x06\x00\x01"), flow.TimedOut, "connect", "TTL expired"},
		{"no v6", reply("\x05\x08\x00\x01"), flow.NetUnreachable, "connect", "type of address"},
		{"general", reply("\x05\x01\x00\x01"), flow.Unknown, "connect", "general failure"},
		{"unheard of", reply("\x05\xf1\x00\x01"), flow.Unknown, "connect", "error 241"},
		{"wrong version", greeting("\x04\x00"), flow.Unknown, "greet", "not SOCKS5: it begins with byte 0x04"},
		{"wrong version of the reply", reply("\x04\x5a\x00\x00\x00\x00\x00\x00"), flow.Unknown, "ask", "not SOCKS5"},
		{"method not offered", greeting("\x05\x01"), flow.Unknown, "greet", "method 1, which it was not offered"},
		{"password not offered", greeting("\x05\x02"), flow.Unknown, "greet", "method 2, which it was not offered"},
		{"password wanted", greeting("\x05\xff"), flow.Prohibited, "greet", "wants a username and password"},
		{"endless methods", func(t *testing.T, c *net.TCPConn) {
			say(c, "\x05\xfe")
			_, _ = io.Copy(c, endless{})
		}, flow.Unknown, "greet", "method 254"},
		{"banner of 1 MB", func(t *testing.T, c *net.TCPConn) {
			_, _ = io.Copy(c, io.LimitReader(endless{}, 1<<20))
		}, flow.Unknown, "greet", "not SOCKS5: it begins with byte 0x41"},
		{"no name", reply("\x05\x00\x00\x03\x00\x00\x50"), flow.Unknown, "ask", "a name of no length"},
		{"address of no type", reply("\x05\x00\x00\x09\x00\x00\x50"), flow.Unknown, "ask", "type 9, which is none"},
		{"half a reply", reply("\x05\x00\x00\x01\x7f"), flow.HostUnreachable, "ask", "unexpected EOF"},
		{"half a name", reply("\x05\x00\x00\x03"), flow.HostUnreachable, "ask", "unexpected EOF"},
		{"hangs up", func(t *testing.T, c *net.TCPConn) { expect(t, c, hello) }, flow.HostUnreachable, "greet", "EOF"},
		{"resets", func(t *testing.T, c *net.TCPConn) {
			expect(t, c, hello)
			_ = c.SetLinger(0)
			_ = c.Close()
		}, flow.HostUnreachable, "greet", "reset"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			gone := make(chan struct{})
			addr := proxyServer(t, func(c *net.TCPConn) {
				tt.serve(t, c)
				_ = c.CloseWrite()
				_, _ = io.Copy(io.Discard, c) // until the dialer has closed its end
				close(gone)
			})
			_, err := proxyTo(t, Config{Type: TypeSOCKS5}, addr).DialStream(t.Context(), Target{Addr: netip.MustParseAddrPort("192.0.2.7:443")})
			checkError(t, err, "relay", tt.op, tt.why, tt.want)
			select {
			case <-gone:
			case <-time.After(5 * time.Second):
				t.Error("the connection to the proxy was left open")
			}
		})
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return copy(b, bytes.Repeat([]byte{'A'}, len(b))), nil }

func checkError(t *testing.T, err error, hop, op string, why flow.Reason, want string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v (%T), want a *dialer.Error", err, err)
	}
	if e.Hop != hop || e.Op != op || e.Reason != why || !strings.Contains(err.Error(), want) {
		t.Errorf("%v: hop %q, op %q, %v; want hop %q, op %q, %v, and %q in it", err, e.Hop, e.Op, e.Reason, hop, op, why, want)
	}
}

func TestSOCKS5WrongPassword(t *testing.T) {
	addr := proxyServer(t, func(c *net.TCPConn) {
		expect(t, c, "\x05\x02\x00\x02")
		say(c, "\x05\x02")
		expect(t, c, "\x01\x01u\x06secret")
		say(c, "\x01\x01")
	})
	p := proxyTo(t, Config{Type: TypeSOCKS5, Username: "u", Password: NewSecret("secret")}, addr)
	_, err := p.DialStream(t.Context(), Target{Addr: netip.MustParseAddrPort("192.0.2.7:443")})
	checkError(t, err, "relay", "greet", flow.Prohibited, "refused the username and password")
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the error has the password: %v", err)
	}
}

// A proxy that gives a byte now and then has its time, and no more.
func TestSOCKS5SlowProxyIsLeft(t *testing.T) {
	left := make(chan error, 1)
	addr := proxyServer(t, func(c *net.TCPConn) {
		say(c, noAuth)
		for {
			if _, err := c.Write([]byte{5}); err != nil {
				left <- err
				return
			}
			time.Sleep(50 * time.Millisecond)
			if n, err := c.Read(make([]byte, 100)); n == 0 {
				left <- err
				return
			}
		}
	})
	p := proxyTo(t, Config{Type: TypeSOCKS5}, addr)
	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := p.DialStream(ctx, Target{Addr: netip.MustParseAddrPort("192.0.2.7:443")})
		checkError(t, err, "relay", "ask", flow.TimedOut, "")
		<-left
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err := p.DialStream(ctx, Target{Addr: netip.MustParseAddrPort("192.0.2.7:443")})
		checkError(t, err, "relay", "ask", flow.Canceled, "")
		<-left
	})
}

// A reset right behind the proxy's yes is the tunnel's.
func TestSOCKS5ResetBehindSuccess(t *testing.T) {
	addr := proxyServer(t, func(c *net.TCPConn) {
		expect(t, c, hello)
		say(c, noAuth)
		expect(t, c, "\x05\x01\x00\x01\xc0\x00\x02\x07\x01\xbb")
		say(c, success)
		time.Sleep(50 * time.Millisecond)
		_ = c.SetLinger(0)
	})
	c, err := proxyTo(t, Config{Type: TypeSOCKS5}, addr).DialStream(t.Context(), Target{Addr: netip.MustParseAddrPort("192.0.2.7:443")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadAll(c); flow.ReasonOf(err) != flow.Reset {
		t.Errorf("the tunnel ended with %v, want a reset", err)
	}
}

// A proxy that nobody runs leaves its targets unreachable: they did not refuse.
func TestProxyThatIsNotThere(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort(l.Addr().String())
	l.Close()
	_, err = proxyTo(t, Config{Type: TypeSOCKS5}, addr).DialStream(t.Context(), Target{Addr: netip.MustParseAddrPort("192.0.2.7:443")})
	checkError(t, err, "relay", "connect", flow.HostUnreachable, addr.String()+": connect: connection refused")
}

// FuzzSOCKS5Reply: whatever a proxy answers, no byte beyond the answer is read,
// and one that is understood is the one that was said.
func FuzzSOCKS5Reply(f *testing.F) {
	f.Add([]byte(success + "tunnel"))
	f.Add([]byte("\x05\x00\x00\x03\x04host\x00\x50tunnel"))
	f.Add([]byte("\x05\x00\x00\x04" + strings.Repeat("\x11", 18)))
	f.Add([]byte("\x05\x00\x00\x03\xff" + strings.Repeat("a", 255) + "\x00\x50tunnel"))
	f.Add([]byte("\x05\x05\x00\x01"))
	f.Add([]byte("\x05\x00\x00\x03\x00\x00\x50"))
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		r := bytes.NewReader(wire)
		a, err := readSocksReply(r)
		used := len(wire) - r.Len()
		if used > maxSocksSize {
			t.Fatalf("read %d bytes", used)
		}
		if err != nil {
			return
		}
		rest := wire[used:]
		again, behind, ok := cutSocksAddr(wire[3:])
		if !ok || again != a || !bytes.Equal(behind, rest) {
			t.Fatalf("%v, %q behind it; read as %v, %q", again, behind, a, rest)
		}
		if want := wire[3:used]; a.name != "" && !bytes.Equal(appendSocksAddr(nil, a), want) {
			t.Fatalf("%v goes out as %q, came as %q", a, appendSocksAddr(nil, a), want)
		}
	})
}

// counted counts what is told of its connections.
type counted struct {
	Outbound
	ended, others int
}

func (o *counted) DialStream(ctx context.Context, t Target) (*Conn, error) {
	c, err := o.Outbound.DialStream(ctx, t)
	if err == nil {
		c.Report = func(out Outcome) {
			if out.News == Ended && out.Reason == 0 {
				o.ended++
			} else {
				o.others++
			}
		}
	}
	return c, err
}

// Who has made the connection to a proxy, a group, hears when it ends, once, and
// nothing of what is behind the proxy.
func TestEndBelowAProxyIsTold(t *testing.T) {
	answer := success
	addr := proxyServer(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 100))
		say(c, noAuth)
		_, _ = c.Read(make([]byte, 100))
		say(c, answer)
		_, _ = io.Copy(io.Discard, c)
	})
	p := proxyTo(t, Config{Type: TypeSOCKS5}, addr)
	below := &counted{Outbound: p.next}
	p.next = below
	c := mustDial(t, p, somewhere)
	c.Tell(Outcome{News: Failed, Reason: flow.Reset, ByServer: true})
	c.Tell(Outcome{News: Ended, Reason: flow.Reset, ByServer: true, Down: 1})
	_ = c.Close()
	if below.ended != 1 || below.others != 0 {
		t.Errorf("told %d times of the end, and %d times of other things", below.ended, below.others)
	}
	answer = "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"
	if _, err := dialWithin(t, p, somewhere); err == nil || below.ended != 2 {
		t.Errorf("a connection that was refused: %v, told %d times of an end", err, below.ended)
	}
}

// A proxy that is a container of this machine resolves as that does: it is asked for
// the names of home alone.
func TestNamesOfOthersGoToNoContainer(t *testing.T) {
	p := proxyTo(t, Config{Type: TypeSOCKS5, RemoteDNS: true}, netip.MustParseAddrPort("198.51.100.9:1080"))
	p.judge = noContainer
	home := &flow.Flow{Attachment: flow.Home, Src: netip.MustParseAddrPort("127.0.0.1:1")}
	lab := &flow.Flow{Attachment: "lab1", Src: netip.MustParseAddrPort("10.0.0.2:1")}
	for _, tt := range []struct {
		by     *flow.Flow
		server string
		want   string
	}{
		{home, "198.51.100.9:1080", "example.org"},
		{lab, "198.51.100.9:1080", ""},
		{lab, "198.51.100.8:1080", "example.org"},
	} {
		got := p.named(Target{Addr: peer4, Name: "example.org", Flow: tt.by}, netip.MustParseAddrPort(tt.server))
		if got.Name != tt.want {
			t.Errorf("of %q the proxy at %s is asked for %q, want %q", tt.by.Attachment, tt.server, got.Name, tt.want)
		}
	}
}
