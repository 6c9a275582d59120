package router_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/router"
	"cgtun/rules"
)

// The server does not read for longer than a dead path is waited for, and then
// reads: all arrives.
func TestServerThatDoesNotReadForLongIsNotCutOff(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	direct, err := dialer.NewDirect(dialer.Config{Name: "up", Type: dialer.TypeDirect})
	if err != nil {
		t.Fatal(err)
	}
	r := router.New(router.Options{})
	reload(t, r, []rules.Config{{Use: "up"}}, direct)
	labtest.Background(t, "the router", r.Run)

	const size = 32 << 20
	c := newClient("198.51.100.1:80")
	c.flow = flow.New(flow.TCP, c.flow.Src, netip.MustParseAddrPort(l.Addr().String()), "home")
	serve(t, r, c)
	sent := make(chan error, 1)
	go func() {
		n, err := c.conn.Write(make([]byte, size))
		if n < size && err == nil {
			err = io.ErrShortWrite
		}
		sent <- errors.Join(err, c.conn.CloseWrite())
	}()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	// The one wait for a time: it is longer than the kernel's own patience.
	time.Sleep(16 * time.Second)
	n, err := io.Copy(io.Discard, server)
	if err != nil || n != size {
		t.Errorf("%d bytes arrived, %v; want %d", n, err, size)
	}
	if err := <-sent; err != nil {
		t.Errorf("the client could not send it: %v", err)
	}
}
