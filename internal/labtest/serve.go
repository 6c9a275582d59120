package labtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Server is a server of the test process inside a namespace. The lab closes it
// and waits for its connections.
type Server struct {
	Addr netip.AddrPort // where it listens

	ln      io.Closer
	mu      sync.Mutex
	closed  bool
	clients []netip.AddrPort
	conns   map[net.Conn]struct{}
	errs    []error
	wait    sync.WaitGroup
}

// Clients returns the source addresses of all connections so far, or of all
// datagrams: what the server saw, and so the way that they took.
func (s *Server) Clients() []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]netip.AddrPort(nil), s.clients...)
}

// Err returns what went wrong in the connections so far.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.errs...)
}

// Close ends the server and its connections and waits for them. The lab does
// so too.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.ln.Close()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wait.Wait()
}

// Serve calls serve in a goroutine for each connection to addr (":80"), and
// closes the connection after it. serve's error is kept for Err.
func (h *Host) Serve(addr string, serve func(*net.TCPConn) error) *Server {
	h.lab.t.Helper()
	ln := h.Listen("tcp", addr)
	s := &Server{ln: ln, conns: map[net.Conn]struct{}{}}
	s.Addr, _ = netip.ParseAddrPort(ln.Addr().String())
	s.wait.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.one(c.(*net.TCPConn), serve)
		}
	})
	h.lab.onClose(s.Close)
	return s
}

func (s *Server) one(c *net.TCPConn, serve func(*net.TCPConn) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.clients = append(s.clients, addrPort(c.RemoteAddr()))
	s.wait.Go(func() {
		err := serve(c)
		c.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
		if err != nil && !s.closed {
			s.errs = append(s.errs, err)
		}
	})
}

func addrPort(a net.Addr) netip.AddrPort {
	p, _ := netip.ParseAddrPort(a.String())
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// ServeEcho sends back what it gets, and ends its side when the client has
// ended its own.
func (h *Host) ServeEcho(addr string) *Server {
	h.lab.t.Helper()
	return h.Serve(addr, func(c *net.TCPConn) error {
		if _, err := io.Copy(c, c); err != nil {
			return err
		}
		return c.CloseWrite()
	})
}

// ServeUDPEcho sends each datagram back to its source.
func (h *Host) ServeUDPEcho(addr string) *Server {
	h.lab.t.Helper()
	pc := h.ListenPacket("udp", addr)
	s := &Server{ln: pc}
	s.Addr, _ = netip.ParseAddrPort(pc.LocalAddr().String())
	s.wait.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // an ICMP error to an earlier answer
			}
			s.mu.Lock()
			s.clients = append(s.clients, addrPort(from))
			s.mu.Unlock()
			_, _ = pc.WriteTo(buf[:n], from)
		}
	})
	h.lab.onClose(s.Close)
	return s
}

// Transfer is what two sides send each other, at the same time. Either side ends
// with a half-close.
type Transfer struct {
	Up, Down int64         // bytes
	Late     time.Duration // one side ends so long after the other has: the server
	Client   bool          // or the client
}

// tail is how much of its bytes a side that is late sends only then.
const tail = 1 << 20

// ServeExchange is the far end of Exchange: a sink, a source, or both at once.
func (h *Host) ServeExchange(addr string) *Server {
	h.lab.t.Helper()
	return h.Serve(addr, func(c *net.TCPConn) error {
		var x Transfer
		if err := binary.Read(c, binary.BigEndian, &x); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		return x.both(c, x.Down, x.Up, !x.Client)
	})
}

// halfCloser is a stream whose writing side can be ended alone.
type halfCloser interface {
	io.ReadWriter
	CloseWrite() error
}

// Exchange plays the client's side of x with a ServeExchange. It checks that every
// byte came, in order, and then the end. The server checks the same: see its Err.
func Exchange(c halfCloser, x Transfer) error {
	if err := binary.Write(c, binary.BigEndian, x); err != nil {
		return fmt.Errorf("write request: %w", err)
	}
	return x.both(c, x.Up, x.Down, x.Client)
}

func (x Transfer) both(c halfCloser, send, receive int64, late bool) error {
	sent, ended := make(chan error, 1), make(chan struct{})
	go func() {
		data, err := Pattern(send), error(nil)
		if late && x.Late > 0 {
			_, err = io.CopyN(c, data, send-min(send, tail))
			<-ended
			time.Sleep(x.Late) // what is tested is time itself
		}
		if err == nil {
			_, err = io.Copy(c, data)
		}
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	err := CheckPattern(c, receive)
	close(ended)
	return errors.Join(err, <-sent)
}

// Pattern returns n bytes that look random and depend on n alone.
func Pattern(n int64) io.Reader {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], uint64(n))
	return io.LimitReader(rand.NewChaCha8(seed), n)
}

// CheckPattern reads r to its end and compares it with Pattern(n).
func CheckPattern(r io.Reader, n int64) error {
	got, want := sha256.New(), sha256.New()
	read, err := io.Copy(got, r)
	if err != nil {
		return fmt.Errorf("read byte %d of %d: %w", read, n, err)
	}
	if read != n {
		return fmt.Errorf("read %d bytes and then the end, of %d", read, n)
	}
	_, _ = io.Copy(want, Pattern(n))
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return fmt.Errorf("the %d bytes read are not those sent", n)
	}
	return nil
}
