package dialer

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/relay"
)

// authority makes certificates for a test.
type testCA struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  []byte
}

func newTestCA(t *testing.T) *testCA {
	t.Helper()
	a := &testCA{t: t}
	a.key, a.cert = a.make(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "lab"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	})
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
	return a
}

func (a *testCA) make(c *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	parent, by := a.cert, a.key
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	if err != nil {
		a.t.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, made
}

// serve is the configuration of a server at an address.
func (a *testCA) serve(at net.IP, protocols ...string) *tls.Config {
	key, cert := a.make(&x509.Certificate{SerialNumber: big.NewInt(2), IPAddresses: []net.IP{at}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}, NextProtos: protocols}
}

var here = net.IPv4(127, 0, 0, 1)

// newTLSProxy says yes to each CONNECT over TLS; then the conn is serve's.
func newTLSProxy(t *testing.T, config *tls.Config, serve func(*tls.Conn)) *fakeProxy {
	t.Helper()
	return newFakeProxy(t, func(c *net.TCPConn) {
		server := tls.Server(c, config)
		if server.Handshake() != nil {
			return
		}
		readRequest(server)
		_, _ = io.WriteString(server, "HTTP/1.1 200 OK\r\n\r\n")
		serve(server)
	})
}

// trusting is an https outbound that believes an authority.
func (a *testCA) trusting(c Config) Config {
	a.t.Helper()
	c.Type = TypeHTTPS
	if what := c.SetCA(a.pem); what != "" {
		a.t.Fatal(what)
	}
	return c
}

func TestServerIsVerified(t *testing.T) {
	ca, other := newTestCA(t), newTestCA(t)
	for _, tt := range []struct {
		name   string
		server *tls.Config
		client Config
		want   string // "" for a tunnel
	}{
		{"known", ca.serve(here), ca.trusting(Config{}), ""},
		{"speaks http/1.1", ca.serve(here, "h2", "http/1.1"), ca.trusting(Config{}), ""},
		{"unknown authority", other.serve(here), ca.trusting(Config{}), "unknown authority"},
		{"system's authorities", ca.serve(here), Config{Type: TypeHTTPS}, "unknown authority"},
		{"another address", ca.serve(net.IPv4(192, 0, 2, 1)), ca.trusting(Config{}), "127.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newTLSProxy(t, tt.server, func(c *tls.Conn) { _, _ = io.Copy(c, c); _ = c.CloseWrite() })
			c, err := dialWithin(t, f.outbound(t, tt.client), somewhere)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "greet") {
					t.Errorf("%v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(c, "hello")
			_ = c.CloseWrite()
			if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// A server that speaks no TLS, or does not come to its end, is left.
func TestHostileGreetings(t *testing.T) {
	ca := newTestCA(t)
	record := func(kind byte, body ...byte) []byte {
		return append([]byte{kind, 3, 3, byte(len(body) >> 8), byte(len(body))}, body...)
	}
	endless := func(record []byte) func(*net.TCPConn) {
		return func(c *net.TCPConn) {
			block := bytes.Repeat(record, 1+4096/len(record))
			for range 100 << 20 / len(block) {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}
	}
	for _, tt := range []struct {
		name  string
		serve func(*net.TCPConn)
		want  flow.Reason
	}{
		{"HTTP", func(c *net.TCPConn) { _, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n") }, flow.Unknown},
		{"warnings without end", endless(record(21, 1, 100)), flow.Unknown},
		{"a message of 16 MB", endless(record(22, append([]byte{2, 0xff, 0xff, 0xff}, make([]byte, 1000)...)...)), flow.Unknown},
		{"an end", func(c *net.TCPConn) { _ = c.CloseWrite() }, flow.HostUnreachable},
		{"a reset", func(c *net.TCPConn) { _ = c.SetLinger(0) }, flow.HostUnreachable},
		{"silence", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }, flow.TimedOut},
		{"a byte now and then", func(c *net.TCPConn) {
			for _, b := range record(22, make([]byte, 1000)...) {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}, flow.TimedOut},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFakeProxy(t, func(c *net.TCPConn) {
				_, _ = c.Read(make([]byte, 1<<16))
				tt.serve(c)
			})
			_, err := dialWithin(t, f.outbound(t, ca.trusting(Config{})), somewhere)
			wantReason(t, err, tt.want)
		})
	}
}

func TestCertificatesOfAFile(t *testing.T) {
	var c Config
	if what := c.SetCA([]byte("-----BEGIN CERTIFICATE-----\nnonsense")); what == "" {
		t.Error("nonsense was taken")
	}
}

// An end is one only if the peer has said so: an end of the conn below, which
// anybody on the way can make, is a reset, as a reset is. All bytes before it
// come.
func TestEndsOverTLS(t *testing.T) {
	ca := newTestCA(t)
	for _, tt := range []struct {
		name string
		end  func(*tls.Conn)
		want flow.Reason
	}{
		{"close_notify", func(c *tls.Conn) { _ = c.CloseWrite() }, flow.Closed},
		{"a FIN alone", func(c *tls.Conn) { _ = c.NetConn().(*net.TCPConn).CloseWrite() }, flow.Reset},
		{"a reset", func(c *tls.Conn) {
			_ = c.NetConn().(*net.TCPConn).SetLinger(0)
			_ = c.NetConn().Close()
		}, flow.Reset},
	} {
		t.Run(tt.name, func(t *testing.T) {
			read := make(chan struct{})
			f := newTLSProxy(t, ca.serve(here), func(c *tls.Conn) {
				_, _ = io.WriteString(c, "all of it")
				<-read
				tt.end(c)
				_, _ = io.Copy(io.Discard, c)
			})
			c := mustDial(t, f.outbound(t, ca.trusting(Config{})), somewhere)
			got := make([]byte, 9)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "all of it" {
				t.Fatalf("got %q, %v", got, err)
			}
			close(read)
			_, err := c.Read(got)
			if err == io.EOF {
				err = nil
			}
			if why := flow.ReasonOf(err); why != tt.want {
				t.Errorf("ended by %v: %v, want %v", why, err, tt.want)
			}
			_ = c.Reset()
		})
	}
}

// Our half of the conn ends by close_notify, the other half goes on, and a
// reset is a reset.
func TestHalfCloseAndResetOverTLS(t *testing.T) {
	ca := newTestCA(t)
	result := make(chan error, 1)
	f := newTLSProxy(t, ca.serve(here), func(c *tls.Conn) {
		asked, err := io.ReadAll(c)
		if err == nil && string(asked) != "question" {
			err = errors.New("asked " + string(asked))
		}
		_, _ = io.WriteString(c, "answer")
		_, below := c.NetConn().Read(make([]byte, 1)) // what follows close_notify
		result <- errors.Join(err, below)
	})
	c := mustDial(t, f.outbound(t, ca.trusting(Config{})), somewhere)
	if flow.Socket(c.Conn) == nil {
		t.Error("nobody could look after the socket")
	}
	_, _ = io.WriteString(c, "question")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 6)
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "answer" {
		t.Fatalf("got %q, %v", answer, err)
	}
	if err := c.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; flow.ReasonOf(err) != flow.Reset {
		t.Errorf("the proxy saw %v, want a reset", err)
	}
}

// relay moves every byte both ways at once, and a chain of TLS in TLS is one
// more conn.
func TestChainOverTLS(t *testing.T) {
	ca := newTestCA(t)
	inner := newTLSProxy(t, ca.serve(here), func(c *tls.Conn) { _, _ = io.Copy(c, c); _ = c.CloseWrite() })
	// A proxy in fact: it connects to whom it is asked for, the inner one.
	outer := newTLSProxy(t, ca.serve(here), func(c *tls.Conn) {
		to, err := net.Dial("tcp", inner.addr.String())
		if err != nil {
			return
		}
		defer to.Close()
		done := make(chan struct{})
		go func() {
			_, _ = io.Copy(to, c)
			_ = to.(*net.TCPConn).CloseWrite()
			close(done)
		}()
		_, _ = io.Copy(c, to)
		_ = c.CloseWrite()
		<-done
	})
	first := outer.outbound(t, ca.trusting(Config{Name: "outer"}))
	second, err := NewProxy(ca.trusting(Config{Name: "inner", Server: inner.addr.String(), Via: "outer"}), first, Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := mustDial(t, second, somewhere)
	if got := strings.Join(c.Path, ">"); got != "outer>inner" {
		t.Errorf("path %s", got)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	data := make([]byte, 8<<20)
	_, _ = rand.Read(data)
	sent := make(chan struct{})
	go func() {
		_, _ = client.Write(data)
		_ = client.(*net.TCPConn).CloseWrite()
		close(sent)
	}()
	got := make(chan []byte, 1)
	go func() {
		all, _ := io.ReadAll(client)
		got <- all
	}()
	_ = c.SetDeadline(time.Time{})
	var up atomic.Int64
	result := relay.Streams(t.Context(), flow.NewTCPConn(accepted.(*net.TCPConn)), c.Conn, &relay.Options{Up: &up})
	<-sent
	_ = accepted.Close()
	if all := <-got; !bytes.Equal(all, data) || result.Reason != flow.Closed {
		t.Errorf("%d of %d bytes came back as they were sent; %+v", len(all), len(data), result)
	}
}
