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

// BenchmarkBegin is an exchange over two sockets without replay and with it.
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
	for _, on := range []bool{false, true} {
		name := "without"
		if on {
			name = "with"
		}
		b.Run(name, func(b *testing.B) {
			app, end := pair(b)
			srv, err := net.Dial("tcp4", ln.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			buf := make([]byte, len(get))
			var client, server flow.Conn = flow.NewTCPConn(end), flow.NewTCPConn(srv.(*net.TCPConn))
			for b.Loop() {
				_, _ = app.Write([]byte(get))
				if on {
					replay.Begin(context.Background(), client, &dialer.Conn{Conn: server, Path: []string{"a"}}, replay.Options{})
				} else {
					_, _ = io.ReadFull(client, buf)
					_, _ = server.Write(buf)
				}
				_, _ = io.ReadFull(server, buf)
				_, _ = client.Write(buf)
				_, _ = io.ReadFull(app, buf)
			}
			app.Close()
			end.Close()
			srv.Close()
		})
	}
}
