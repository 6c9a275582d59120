package dialer

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// SetCA takes the content of the file TLSCA: certificates in PEM, which are
// believed beside the system's. It says what is wrong with them.
func (c *Config) SetCA(pem []byte) (what string) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool() // no system's roots is no reason to believe in none
	}
	if !pool.AppendCertsFromPEM(pem) {
		return "holds no certificate; allowed: a file of certificates in PEM"
	}
	c.roots = pool
	return ""
}

// tlsConfig is how the server of an outbound is known: by the host in Server,
// which is a name or an address.
func tlsConfig(c Config) *tls.Config {
	host, _, _ := net.SplitHostPort(c.Server)
	return &tls.Config{
		RootCAs:            c.roots,
		ServerName:         host,
		NextProtos:         []string{"http/1.1"},
		ClientSessionCache: tls.NewLRUClientSessionCache(8),
	}
}

// startTLS does the handshake over c. Closing what it returns closes c.
func startTLS(c flow.Conn, config *tls.Config) (flow.Conn, error) {
	carrier := &carrier{Conn: c}
	t := tls.Client(carrier, config)
	if err := t.Handshake(); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return &tlsConn{Conn: t, carrier: carrier}, nil
}

// tlsConn is a Conn over TLS. The end of a direction is close_notify (RFC 8446
// §6.1); the other direction goes on, as with a FIN.
type tlsConn struct {
	*tls.Conn
	carrier *carrier
}

// Read returns io.EOF only where the peer has said so itself. What the conn
// below says, anybody on the way can say (RFC 8446 §6.1), and it is a reset.
// crypto/tls takes it for an end.
func (c *tlsConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF && c.carrier.ended.Load() {
		err = fmt.Errorf("end without close_notify: %w", unix.ECONNRESET)
	}
	return n, err
}

// Reset implements flow.Conn, by a reset of the conn below.
func (c *tlsConn) Reset() error { return c.carrier.Reset() }

// Carrier implements flow.Carried.
func (c *tlsConn) Carrier() flow.Conn { return c.carrier.Conn }

// carrier notes that the conn below has ended.
type carrier struct {
	flow.Conn
	ended atomic.Bool
}

func (c *carrier) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF {
		c.ended.Store(true)
	}
	return n, err
}
