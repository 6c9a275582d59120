package replay_test

import (
	"context"
	"io"
	"net"
	"testing"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/replay"
)

// spoken is a client that has said something, as the end of a netstack shows it.
type spoken struct {
	flow.Conn
	said []byte
}

func (*spoken) Notify(func(readable, writable, ended bool)) {}
func (s *spoken) Discard(n int)                             { s.said = s.said[n:] }
func (s *spoken) Peek(dst [][]byte) ([][]byte, int, error) {
	if len(s.said) == 0 {
		return dst, 0, nil
	}
	return append(dst, s.said), len(s.said), nil
}

// BenchmarkBegin is an exchange with a server without replay and with it.
func BenchmarkBegin(b *testing.B) {
	ln, _ := net.Listen("tcp4", "127.0.0.1:0")
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var workers flow.Workers
	go workers.Run(ctx)
	for _, on := range []bool{false, true} {
		name := "without"
		if on {
			name = "with"
		}
		b.Run(name, func(b *testing.B) {
			srv, err := net.Dial("tcp4", ln.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			request := []byte(get)
			buf := make([]byte, len(get))
			server := flow.NewTCPConn(srv.(*net.TCPConn))
			for b.Loop() {
				if on {
					client := &spoken{said: request}
					replay.Begin(ctx, client, &dialer.Conn{Conn: server, Path: []string{"a"}}, replay.Options{Port: 80, Workers: &workers})
				} else {
					_, _ = server.Write(request)
				}
				_, _ = io.ReadFull(server, buf)
			}
			srv.Close()
		})
	}
}
