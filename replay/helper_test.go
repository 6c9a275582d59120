package replay_test

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"cgtun/flow"
	"cgtun/relay"
)

// shown is a client's end that shows what it has got, as that of a netstack does.
type shown struct {
	flow.TCPConn

	mu    sync.Mutex
	cond  sync.Cond
	b     []byte
	err   error // after b
	woken bool  // a deadline has passed
	f     func(readable, writable, ended bool)
}

var _ relay.Direct = (*shown)(nil)

// show reads c in a goroutine that done counts.
func show(c *net.TCPConn, done *sync.WaitGroup) *shown {
	s := &shown{TCPConn: flow.NewTCPConn(c)}
	s.cond.L = &s.mu
	done.Go(func() {
		buf := make([]byte, 4<<10)
		for s.err == nil {
			n, err := c.Read(buf)
			s.mu.Lock()
			s.b, s.err = append(s.b, buf[:n]...), err
			s.cond.Broadcast()
			if s.f != nil {
				s.f(true, false, err != nil && err != io.EOF)
			}
			s.mu.Unlock()
		}
	})
	return s
}

func (s *shown) Notify(f func(readable, writable, ended bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.f = f
}

func (s *shown) Peek(dst [][]byte) ([][]byte, int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.b) == 0 {
		return dst, 0, s.err
	}
	half := len(s.b) / 2
	for _, part := range [][]byte{s.b[:half], s.b[half:]} {
		if len(part) > 0 {
			dst = append(dst, part)
		}
	}
	return dst, len(s.b), nil
}

func (s *shown) Discard(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = append([]byte(nil), s.b[n:]...)
}

func (s *shown) Fill(n int, read func([]byte) (int, error)) (int, error) {
	b := make([]byte, n)
	for got := 0; got < n; {
		m, err := read(b[got:])
		if err != nil {
			return 0, err
		}
		got += m
	}
	return s.Write(b)
}

func (s *shown) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.b) == 0 && s.err == nil && !s.woken {
		s.cond.Wait()
	}
	if s.woken {
		return 0, os.ErrDeadlineExceeded
	}
	if len(s.b) == 0 {
		return 0, s.err
	}
	n := copy(p, s.b)
	s.b = append([]byte(nil), s.b[n:]...)
	return n, nil
}

func (s *shown) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.woken = !t.IsZero()
	s.cond.Broadcast()
	return nil
}

func (s *shown) SetDeadline(t time.Time) error {
	_ = s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}
