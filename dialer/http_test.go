package dialer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cgtun/flow"
)

// readRequest returns what a client says up to an empty line.
func readRequest(c net.Conn) string {
	var all strings.Builder
	r := bufio.NewReaderSize(c, 16)
	for !strings.HasSuffix(all.String(), "\r\n\r\n") {
		b, err := r.ReadByte()
		if err != nil {
			return all.String() + err.Error()
		}
		all.WriteByte(b)
	}
	return all.String()
}

// The request, byte for byte. Nothing of a target can end a line or make a field.
func TestConnectRequest(t *testing.T) {
	for _, tt := range []struct {
		name, addr, known string
		config            Config
		want              string
	}{
		{"address", "192.0.2.1:443", "known.example", Config{}, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n\r\n"},
		{"address of IPv6", "[2001:db8::1]:80", "", Config{}, "CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n"},
		{"IPv4 in IPv6", "[::ffff:192.0.2.1]:80", "", Config{}, "CONNECT 192.0.2.1:80 HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n"},
		{"zone", "[fe80::1%a\r\nX: y]:80", "", Config{}, "CONNECT [fe80::1]:80 HTTP/1.1\r\nHost: [fe80::1]:80\r\n\r\n"},
		{
			"account", "192.0.2.1:443", "", Config{Username: "Aladdin", Password: NewSecret("open sesame")},
			"CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n",
		},
		{"name", "192.0.2.1:443", "known_1.example.", Config{RemoteDNS: true}, "CONNECT known_1.example.:443 HTTP/1.1\r\nHost: known_1.example.:443\r\n\r\n"},
		{"no name", "192.0.2.1:443", "", Config{RemoteDNS: true}, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n\r\n"},
		{"smuggled field", "192.0.2.1:443", "a\r\nX-Smuggled: y", Config{RemoteDNS: true}, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n\r\n"},
		{"smuggled port", "192.0.2.1:443", "a:22#", Config{RemoteDNS: true}, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n\r\n"},
		{"long name", "192.0.2.1:443", strings.Repeat("a.", 200) + "example", Config{RemoteDNS: true}, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, err := netip.ParseAddrPort(tt.addr)
			if err != nil {
				t.Fatal(err)
			}
			asked := make(chan string, 1)
			f := newFakeProxy(t, func(c *net.TCPConn) {
				asked <- readRequest(c)
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			})
			tt.config.Type = TypeHTTP
			mustDial(t, f.outbound(t, tt.config), Target{Addr: addr, Name: tt.known, Flow: &flow.Flow{Attachment: flow.Home, Src: netip.MustParseAddrPort("127.0.0.1:9")}})
			if got := <-asked; got != tt.want {
				t.Errorf("asked\n%q, want\n%q", got, tt.want)
			}
		})
	}
}

// What comes behind the answer is the target's, whether it comes with it or
// later, and it is still in the socket, where relay moves it in the kernel.
func TestBytesBehindTheAnswer(t *testing.T) {
	for name, head := range map[string]string{
		"plain":       "HTTP/1.1 200 Connection established\r\n\r\n",
		"old":         "HTTP/1.0 200 Connection established\r\nProxy-agent: x\r\n\r\n",
		"bare":        "HTTP/1.1 204\r\n\r\n",
		"lines":       "HTTP/1.1 200 OK\nA: b\n\n",
		"interim":     "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
		"length":      "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
		"empty value": "HTTP/1.1 200 OK\r\nA:\r\nno colon\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			const first, second = "\r\nSSH-2.0-x\r\n\r\n", "and more"
			for _, say := range []func(io.Writer, string){say, sayInCrumbs} {
				f := newFakeProxy(t, func(c *net.TCPConn) {
					readRequest(c)
					say(c, head+first)
					_, _ = io.Copy(c, c)
				})
				c := mustDial(t, f.outbound(t, Config{Type: TypeHTTP}), somewhere)
				if _, ok := c.Conn.(flow.TCPConn); !ok || strings.Join(c.Path, ">") != "relay" {
					t.Errorf("the conn is a %T of path %q", c.Conn, c.Path)
				}
				_, _ = io.WriteString(c, second)
				_ = c.CloseWrite()
				if got, err := io.ReadAll(c); err != nil || string(got) != first+second {
					t.Errorf("got %q, %v", got, err)
				}
			}
		})
	}
}

// Each answer that is no tunnel has a reason that the client is told.
func TestReasonsOfAnswers(t *testing.T) {
	for _, tt := range []struct {
		head string
		want flow.Reason
	}{
		{"403 Forbidden", flow.Prohibited},
		{"401 Unauthorized", flow.Prohibited},
		{"407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"", flow.Prohibited},
		{"407 No\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", flow.Prohibited},
		{"404 Not Found", flow.HostUnreachable},
		{"405 Method Not Allowed", flow.HostUnreachable},
		{"408 Request Timeout", flow.TimedOut},
		{"302 Found\r\nLocation: http://portal.example/", flow.HostUnreachable},
		{"500 Unable to connect", flow.HostUnreachable},
		{"502 Bad Gateway", flow.HostUnreachable},
		{"503 Service Unavailable", flow.HostUnreachable},
		{"504 Gateway Timeout", flow.TimedOut},
		{"503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 111", flow.Refused},
		{"503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 101", flow.NetUnreachable},
		{"503 Service Unavailable\r\nx-squid-error:ERR_CONNECT_FAIL 113", flow.HostUnreachable},
		{"503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 110", flow.TimedOut},
		{"503 Service Unavailable\r\nX-Squid-Error: ERR_DNS_FAIL 0", flow.HostUnreachable},
		{"503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 4294967407", flow.HostUnreachable},
		{"503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 104", flow.HostUnreachable},
		{"502 Bad Gateway\r\nProxy-Status: far; error=dns_error, near; error=connection_refused; details=\"x\"", flow.Refused},
		{"502 Bad Gateway\r\nProxy-Status: near; error=destination_ip_unroutable", flow.NetUnreachable},
		{"502 Bad Gateway\r\nProxy-Status: near; error=http_request_denied", flow.Prohibited},
		{"504 Gateway Timeout\r\nProxy-Status: near; error=something_new", flow.TimedOut},
	} {
		t.Run(tt.head, func(t *testing.T) {
			f := newFakeProxy(t, func(c *net.TCPConn) {
				readRequest(c)
				_, _ = io.WriteString(c, "HTTP/1.1 "+tt.head+"\r\n\r\n<html>")
			})
			_, err := dialWithin(t, f.outbound(t, Config{Type: TypeHTTP}), somewhere)
			wantReason(t, err, tt.want)
		})
	}
}

// The account is named by what is wrong with it, and by nothing else.
func TestErrorsHaveNoAccount(t *testing.T) {
	f := newFakeProxy(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "HTTP/1.1 407 "+readRequest(c)+"\r\n\r\n")
	})
	for want, c := range map[string]Config{
		"it does not take the username and password":                     {Type: TypeHTTP, Username: "joe", Password: NewSecret("hunter2")},
		"it asks for a username and password, and the outbound has none": {Type: TypeHTTP},
		"the answer is not HTTP/1":                                       {Type: TypeHTTP, Username: "bad", Password: NewSecret("hunter2"), Name: "other"},
	} {
		g := f
		if c.Name != "" {
			g = newFakeProxy(t, func(c *net.TCPConn) { _, _ = io.WriteString(c, readRequest(c)+"\r\n\r\n") })
		}
		o := g.outbound(t, c)
		_, err := dialWithin(t, o, somewhere)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		socks, errSOCKS := newSOCKS5(c)
		for _, text := range []string{fmt.Sprint(errSOCKS), fmt.Sprintf("%+v %#v", socks, socks), fmt.Sprint(err), fmt.Sprintf("%+v %#v", o, o), fmt.Sprintf("%+v", o.protocol)} {
			if strings.Contains(text, "hunter2") || strings.Contains(text, "aHVudGVyM") || strings.Contains(text, "Basic") {
				t.Errorf("shown: %s", text)
			}
		}
	}
}

// What a hostile proxy can do ends by the deadline at the latest, and takes no
// more than the bound of a head.
func TestHostileAnswers(t *testing.T) {
	endless := func(text string) func(net.Conn) {
		block := bytes.Repeat([]byte(text), 1+4096/len(text))
		return func(c net.Conn) {
			for range 100 << 20 / len(block) {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}
	}
	say := func(text string) func(net.Conn) {
		return func(c net.Conn) {
			_, _ = io.WriteString(c, text)
			_, _ = io.Copy(io.Discard, c)
		}
	}
	for _, tt := range []struct {
		name  string
		serve func(net.Conn)
		want  error // nil: any
		why   flow.Reason
	}{
		{"a head of 100 MB", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n"); endless("A: b\r\n")(c) }, errLongHead, flow.Unknown},
		{"a line of 100 MB", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n"); endless("A")(c) }, errLongHead, flow.Unknown},
		{"interim answers without end", endless("HTTP/1.1 100 Continue\r\n\r\n"), errNoEnding, flow.Unknown},
		{"empty lines without end", endless("\r\n"), errNoHTTP, flow.Unknown},
		{"another protocol", say("SSH-2.0-OpenSSH_9.2\r\n"), errNoHTTP, flow.Unknown},
		{"SOCKS", say("\x05\xff\n"), errNoHTTP, flow.Unknown},
		{"another version", say("HTTP/2 200 OK\r\n\r\n"), errNoHTTP, flow.Unknown},
		{"no number", say("HTTP/1.1 2x0 OK\r\n\r\n"), errNoHTTP, flow.Unknown},
		{"a number too large", say("HTTP/1.1 1200 OK\r\n\r\n"), errNoHTTP, flow.Unknown},
		{"a number that is none", say("HTTP/1.1 099 OK\r\n\r\n"), errNoHTTP, flow.Unknown},
		{"a switch of protocol", say("HTTP/1.1 101 Switching Protocols\r\n\r\n"), errSwitching, flow.Unknown},
		{"nothing", func(net.Conn) {}, io.EOF, flow.HostUnreachable},
		{"half an answer", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n") }, io.EOF, flow.HostUnreachable},
		{"a reset", func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0) }, nil, flow.HostUnreachable},
		{"silence", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, nil, flow.TimedOut},
		{"a byte now and then", func(c net.Conn) {
			for range 100 {
				if _, err := io.WriteString(c, "H"); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}, nil, flow.TimedOut},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFakeProxy(t, func(c *net.TCPConn) {
				readRequest(c)
				tt.serve(c)
			})
			began := time.Now()
			_, err := dialWithin(t, f.outbound(t, Config{Type: TypeHTTP}), somewhere)
			wantReason(t, err, tt.why)
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// A dial that is given up lets go of the proxy at once.
func TestDialGivenUp(t *testing.T) {
	over := make(chan error, 1)
	f := newFakeProxy(t, func(c *net.TCPConn) {
		readRequest(c)
		_, err := io.Copy(io.Discard, c)
		over <- err
	})
	o := f.outbound(t, Config{Type: TypeHTTP})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for f.count() == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	_, err := o.DialStream(ctx, somewhere)
	wantReason(t, err, flow.Canceled)
	<-over
}

// Whatever the bytes: no panic, and a tunnel only behind a final answer of 2xx,
// of which not a byte too many is read.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\n\r\nrest", "HTTP/1.0 407 No\nProxy-Status: a; error=dns_error\n\n", "HTTP/1.1 100 C\r\n\r\nHTTP/1.1 204\r\n\r\n",
		"HTTP/1.1 503 x\r\nX-Squid-Error: ERR_CONNECT_FAIL 111\r\n\r\n", "SSH-2.0\r\n", "\r\n\r\n", "HTTP/1.1 101 x\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		a, err := readHead(r)
		read := data[:len(data)-r.Len()]
		if err != nil {
			if len(read) > maxHead {
				t.Errorf("read %d bytes", len(read))
			}
			return
		}
		if a.status < 200 || a.status > 599 {
			t.Errorf("status %d", a.status)
		}
		if !bytes.HasSuffix(read, []byte("\n\n")) && !bytes.HasSuffix(read, []byte("\n\r\n")) {
			t.Errorf("ended behind %q", read)
		}
		if _, err := readHead(bytes.NewReader(read[:len(read)-1])); err == nil {
			t.Errorf("%q has an end before its end", read)
		}
		if a.status/100 != 2 {
			if why := flow.ReasonOf(a.err(true)); why == flow.Unknown || why == flow.Reset || why == flow.Closed {
				t.Errorf("reason %v of %q", why, read)
			}
		}
	})
}
