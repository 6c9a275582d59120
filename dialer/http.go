package dialer

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"net/netip"
	"strconv"

	"cgtun/flow"
)

// connectMethod talks to a proxy by the CONNECT method of HTTP/1.1 (RFC 9110
// §9.3.6), over TLS if tls is set. Credentials go with the first request
// (RFC 7617): a 407 is an answer, not a question.
type connectMethod struct {
	authorization Secret // the field's value; zero: none
	tls           *tls.Config
}

func newConnectMethod(c Config) *connectMethod {
	m := &connectMethod{}
	if c.Username != "" {
		pair := c.Username + ":" + c.Password.Reveal()
		m.authorization = NewSecret("Basic " + base64.StdEncoding.EncodeToString([]byte(pair)))
	}
	if c.Type == TypeHTTPS {
		m.tls = tlsConfig(c)
	}
	return m
}

// greet implements protocol.
func (m *connectMethod) greet(_ context.Context, c flow.Conn) (flow.Conn, error) {
	if m.tls == nil {
		return c, nil
	}
	return startTLS(c, m.tls)
}

// connect implements protocol. The conn that it returns is c: what the target
// says is not read, so that a kernel socket can be relayed in the kernel.
func (m *connectMethod) connect(_ context.Context, c flow.Conn, t Target) (flow.Conn, error) {
	if _, err := c.Write(m.request(t)); err != nil {
		return nil, err
	}
	head, err := readHead(c)
	if err != nil {
		return nil, err
	}
	if head.status/100 == 2 {
		return c, nil // a length is no length here: RFC 9110 §9.3.6
	}
	return nil, head.err(!m.authorization.IsZero())
}

func (m *connectMethod) request(t Target) []byte {
	to := authority(t)
	b := make([]byte, 0, 256)
	b = append(b, "CONNECT "+to+" HTTP/1.1\r\nHost: "+to+"\r\n"...)
	if !m.authorization.IsZero() {
		b = append(b, "Proxy-Authorization: "+m.authorization.Reveal()+"\r\n"...)
	}
	return append(b, "\r\n"...)
}

// authority is HOST:PORT of a target, of characters that cannot end a line or
// begin another field.
func authority(t Target) string {
	if t.Name != "" { // Proxy.named has looked at it
		return t.Name + ":" + strconv.Itoa(int(t.Addr.Port()))
	}
	// A zone is a name of this machine's, and can hold anything.
	return netip.AddrPortFrom(t.Addr.Addr().Unmap().WithZone(""), t.Addr.Port()).String()
}
