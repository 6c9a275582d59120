package group_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
)

// plain dials as the kernel does.
type plain struct{ dials int }

func (p *plain) Name() string { return "plain" }

func (p *plain) DialStream(_ context.Context, t dialer.Target) (*dialer.Conn, error) {
	p.dials++
	c, err := net.Dial("tcp", t.Addr.String())
	if err != nil {
		return nil, err
	}
	return &dialer.Conn{Conn: flow.NewTCPConn(c.(*net.TCPConn)), Path: []string{"plain"}}, nil
}

func (p *plain) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	return nil, errUnsupported
}

// TestProbeFetches: a URL is fetched through the outbound; what a server says of
// itself is its failure from 500 on.
func TestProbeFetches(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/broken":
			w.WriteHeader(http.StatusBadGateway)
		case "/missing":
			w.WriteHeader(http.StatusNotFound)
		case "/moved":
			http.Redirect(w, r, "/broken", http.StatusFound)
		}
	}))
	defer server.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for path, good := range map[string]bool{"/": true, "/missing": true, "/moved": true, "/broken": false} {
		p := &plain{}
		err := group.Fetch(ctx, p, server.URL+path)
		if good != (err == nil) || p.dials != 1 {
			t.Errorf("%s: %v, %d dials", path, err, p.dials)
		}
	}
	gone := strings.Replace(server.URL, "http://", "https://", 1)
	if err := group.Fetch(ctx, &plain{}, gone); err == nil {
		t.Error("TLS to a server without it is good")
	}
}
