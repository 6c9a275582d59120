package dns

import (
	"context"
	stdtls "crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
	"cgtun/flow"
)

// real is an outbound of kernel sockets: whatever address is dialled, the server
// of the test is who answers.
type real struct {
	to    string
	dials atomic.Int32
}

func (*real) Name() string { return "real" }

func (r *real) DialStream(ctx context.Context, _ dialer.Target) (*dialer.Conn, error) {
	r.dials.Add(1)
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", r.to)
	if err != nil {
		return nil, err
	}
	return &dialer.Conn{Conn: flow.NewTCPConn(c.(*net.TCPConn))}, nil
}

func (*real) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	return nil, errors.ErrUnsupported
}

// secure starts a server by HTTPS (RFC 8484) and one by TLS (RFC 7858) with the
// same certificate, for example.com and 127.0.0.1.
func secure(t *testing.T, answer func(*wire.Msg) *wire.Msg) (doh, dot string, roots *x509.CertPool, versions *atomic.Value) {
	t.Helper()
	versions = new(atomic.Value)
	web := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		versions.Store(req.Proto)
		b, _ := io.ReadAll(req.Body)
		q := new(wire.Msg)
		if req.Method != http.MethodPost || req.URL.Path != "/dns-query" || req.Header.Get("Content-Type") != "application/dns-message" || q.Unpack(b) != nil || q.Id != 0 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		packed, _ := answer(q).Pack()
		w.Header().Set("Content-Type", "application/dns-message")
		_, _ = w.Write(packed)
	}))
	web.EnableHTTP2 = true
	web.StartTLS()
	t.Cleanup(web.Close)
	ln, err := stdtls.Listen("tcp", "127.0.0.1:0", &stdtls.Config{Certificates: web.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if b, err := readMessage(c); err == nil {
				q := new(wire.Msg)
				if q.Unpack(b) == nil {
					packed, _ := answer(q).Pack()
					_ = writeMessage(c, packed)
				}
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-served })
	roots = x509.NewCertPool()
	roots.AddCert(web.Certificate())
	return web.Listener.Addr().String(), ln.Addr().String(), roots, versions
}

// Upstreams by TLS and HTTPS are asked, over the outbound that is named, and
// believed only with the certificate of their name.
func TestSecureUpstreams(t *testing.T) {
	doh, dot, roots, versions := secure(t, func(q *wire.Msg) *wire.Msg {
		m := new(wire.Msg).SetReply(q)
		rr, _ := wire.NewRR(q.Question[0].Name + " 300 IN A 192.0.2.7")
		m.Answer = append(m.Answer, rr)
		return m
	})
	for _, tt := range []struct {
		upstream, to string
		want         string
		dials        int32 // for two questions
	}{
		{"https://example.com/dns-query", doh, "NOERROR 300 192.0.2.7", 1},
		{"https://127.0.0.1/dns-query", doh, "NOERROR 300 192.0.2.7", 1},
		{"https://other.example/dns-query", doh, "SERVFAIL", -1},
		{"https://example.com/other", doh, "SERVFAIL", -1},
		{"tls://192.0.2.1#example.com", dot, "NOERROR 300 192.0.2.7", 2},
		{"tls://127.0.0.1", dot, "NOERROR 300 192.0.2.7", 2},
		{"tls://192.0.2.1#other.example", dot, "SERVFAIL", -1},
	} {
		out := &real{to: tt.to}
		r := New(Options{Roots: roots, host: &host{read: func(string) ([]byte, error) { return nil, io.EOF }}})
		r.web.look = func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
		}
		conf := DefaultConfig()
		conf.Upstreams, conf.Outbound = []string{tt.upstream}, "real"
		r.Reload(conf, map[string]dialer.Outbound{"real": out, direct: out})
		for _, name := range []string{"a.example", "b.example"} {
			b, _ := question(name, wire.TypeA).Pack()
			_, wait, mine := r.Take(&flow.Flow{Proto: flow.UDP, Src: me, Dst: asked}, b, func(netip.AddrPort, flow.Proto) (dialer.Outbound, error) { return nil, io.EOF })
			if !mine || wait == nil {
				t.Fatalf("%s: not asked", tt.upstream)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			wait(ctx, func(b []byte) {
				m := new(wire.Msg)
				if err := m.Unpack(b); err != nil || show(m) != tt.want {
					t.Errorf("%s: %s (%v), want %s", tt.upstream, show(m), err, tt.want)
				}
			})
			cancel()
		}
		if n := out.dials.Load(); tt.dials >= 0 && n != tt.dials {
			t.Errorf("%s: %d connections, want %d", tt.upstream, n, tt.dials)
		}
		if strings.HasPrefix(tt.upstream, "https") && tt.dials > 0 && versions.Load() != "HTTP/2.0" {
			t.Errorf("%s: %v", tt.upstream, versions.Load())
		}
		ended, end := context.WithCancel(context.Background())
		end()
		if err := r.Run(ended); err != nil {
			t.Error(err)
		}
	}
}
