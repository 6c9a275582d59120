package dns

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/dialer"
	"cgtun/flow"
)

// server is an upstream: how it is spoken to, and where it is.
type server struct {
	scheme   string // "udp", "tcp", "tls", "https"
	addr     netip.AddrPort
	name     string // of its certificate; "": its address
	url      string // of https
	host     string // of https, a name that is to be looked up; "": addr is it
	outbound string // "": by the rules
	asked    bool   // it is the client's choice, and nobody else's
}

// id is what is remembered of a server under.
func (s *server) id() string {
	if s.scheme == "https" {
		return s.url
	}
	return s.scheme + "://" + s.addr.String() + "#" + s.name
}

// path is a server with the outbound that leads to it.
type path struct {
	*server
	out    dialer.Outbound
	client *flow.Flow // on behalf of whom; nil: the administrator's own choice
	member string     // of out, which is a group; "": out itself
	avoid  []string   // its other members
	beside int        // how many paths there are to the server, 1 at least
}

func (p *path) target(proto flow.Proto) dialer.Target {
	t := dialer.Target{Addr: p.addr, Avoid: p.avoid}
	if p.client != nil {
		f := *p.client
		f.Proto, f.Dst = proto, p.addr
		t.Flow = &f
	}
	return t
}

// ask puts a question to one server by one outbound, until ctx ends. What is not
// the answer to it is not listened to.
func (r *Resolver) ask(ctx context.Context, p *path, q *query) (*answer, error) {
	a, err := r.askOnce(ctx, p, q, true)
	// A server from before EDNS (RFC 6891 §7).
	if err == nil && (a.rcode() == wire.RcodeFormatError || a.rcode() == wire.RcodeNotImplemented) && !q.do {
		if plain, err := r.askOnce(ctx, p, q, false); err == nil {
			return plain, nil
		}
	}
	return a, err
}

func (r *Resolver) askOnce(ctx context.Context, p *path, q *query, edns bool) (*answer, error) {
	switch p.scheme {
	case "https":
		return r.askHTTPS(ctx, p, q, edns)
	case "udp":
		a, err := r.askUDP(ctx, p, q, edns)
		if !errors.Is(err, errTruncated) && !errors.Is(err, errors.ErrUnsupported) {
			return a, err
		}
	}
	return r.askStream(ctx, p, q, edns)
}

// newID is a number that nobody can foresee (RFC 5452 §9.2).
func newID() uint16 {
	var b [2]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return binary.BigEndian.Uint16(b[:])
}

// askUDP asks from a socket of its own, and so from a port that is another each
// time (RFC 5452 §9.1).
func (r *Resolver) askUDP(ctx context.Context, p *path, q *query, edns bool) (*answer, error) {
	conn, err := p.out.OpenPackets(ctx, p.target(flow.UDP))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	id := newID()
	if _, err := conn.WriteBatch([]flow.Datagram{{Peer: p.addr, Data: q.upstream(id, edns)}}); err != nil {
		return nil, fmt.Errorf("ask %s: %w", p.addr, err)
	}
	const room = 4096
	buf := make([]byte, room)
	for {
		dgs := [1]flow.Datagram{{Data: buf}}
		n, err := conn.ReadBatch(dgs[:])
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, fmt.Errorf("read answer of %s: %w", p.addr, err)
		}
		if n == 0 || dgs[0].Peer != p.addr || dgs[0].Segment != 0 {
			r.counts.strange.Add(1)
			continue
		}
		a, err := q.parseAnswer(dgs[0].Data, id)
		if err == nil || errors.Is(err, errTruncated) {
			return a, err
		}
		r.counts.strange.Add(1) // it may be forged: the true one may come yet
	}
}

// askStream asks by TCP (RFC 7766), in TLS if the server wants that (RFC 7858).
func (r *Resolver) askStream(ctx context.Context, p *path, q *query, edns bool) (*answer, error) {
	conn, err := r.connect(ctx, p)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	id := newID()
	if err := writeMessage(conn, q.upstream(id, edns)); err != nil {
		return nil, fmt.Errorf("ask %s: %w", p.addr, err)
	}
	for {
		msg, err := readMessage(conn)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, fmt.Errorf("read answer of %s: %w", p.addr, err)
		}
		a, err := q.parseAnswer(msg, id)
		if err == nil {
			return a, nil
		}
		r.counts.strange.Add(1)
	}
}

// connect returns a connection to the server, in TLS where that is wanted.
func (r *Resolver) connect(ctx context.Context, p *path) (net.Conn, error) {
	conn, err := p.out.DialStream(ctx, p.target(flow.TCP))
	if err != nil {
		return nil, err
	}
	if p.scheme != "tls" {
		return conn, nil
	}
	name := p.name
	if name == "" {
		name = p.addr.Addr().String()
	}
	secure := tls.Client(conn, &tls.Config{ServerName: name, MinVersion: tls.VersionTLS12, RootCAs: r.opts.Roots, NextProtos: []string{"dot"}})
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("speak TLS with %s: %w", p.addr, err)
	}
	return secure, nil
}

// writeMessage and readMessage have the length before each message (RFC 1035
// §4.2.2).
func writeMessage(w io.Writer, msg []byte) error {
	b := make([]byte, 2, 2+len(msg))
	binary.BigEndian.PutUint16(b, uint16(len(msg)))
	_, err := w.Write(append(b, msg...))
	return err
}

func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

// idleHTTP is how long a connection to a DoH server is kept for the next
// question.
const idleHTTP = 30 * time.Second

// askHTTPS asks by a POST (RFC 8484), id 0 as §4.1 wants it.
func (r *Resolver) askHTTPS(ctx context.Context, p *path, q *query, edns bool) (*answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url, bytes.NewReader(q.upstream(0, edns)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/dns-message")
	req.Header.Set("Accept", "application/dns-message")
	resp, err := r.web.client(p).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask %s: HTTP status %d", p.url, resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxMessage+1))
	if err != nil {
		return nil, fmt.Errorf("read answer of %s: %w", p.url, err)
	}
	return q.parseAnswer(body, 0)
}
