package dns

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"cgtun/dialer"
)

// web has an HTTP client for each DoH server and outbound.
type web struct {
	roots *x509.CertPool
	look  func(ctx context.Context, host string) ([]netip.Addr, error)

	mu      sync.Mutex
	clients map[webKey]*http.Client
}

type webKey struct {
	url string
	out dialer.Outbound
}

// client returns the client that reaches p's server by p's outbound.
func (w *web) client(p *path) *http.Client {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := webKey{p.url, p.out}
	if c := w.clients[key]; c != nil {
		return c
	}
	out, host, addr := p.out, p.host, p.addr
	const streams = 4
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, giveUp) // net/http has no end of its own
			defer cancel()
			return w.dial(ctx, out, host, addr)
		},
		TLSHandshakeTimeout: giveUp,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: w.roots},
		ForceAttemptHTTP2:   true,
		IdleConnTimeout:     idleHTTP,
		MaxConnsPerHost:     streams,
	}
	c := &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	w.clients[key] = c
	return c
}

// dial connects to a DoH server. Its name is looked up by the host's resolvers,
// directly, as those of all of the configuration's servers.
func (w *web) dial(ctx context.Context, out dialer.Outbound, host string, addr netip.AddrPort) (net.Conn, error) {
	addrs := []netip.Addr{addr.Addr()}
	if host != "" {
		var err error
		if addrs, err = w.look(ctx, host); err != nil {
			return nil, fmt.Errorf("look up DoH server %q: %w", host, err)
		}
	}
	var last error
	for _, a := range addrs {
		c, err := out.DialStream(ctx, dialer.Target{Addr: netip.AddrPortFrom(a.Unmap(), addr.Port()), Name: host})
		if err == nil {
			return c, nil
		}
		last = err
	}
	return nil, last
}

// close ends the connections that wait, and forgets the clients.
func (w *web) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, c := range w.clients {
		c.CloseIdleConnections()
		delete(w.clients, key)
	}
}
