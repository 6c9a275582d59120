package dialer_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// A server that does not read for long, and reads on then, is not cut off; the
// timeout that finds dead paths is off only as long as that lasts. Whether the
// server closes its window, or has no memory for what its window allows.
func TestTimeoutIsLiftedWhileTheServerDoesNotRead(t *testing.T) {
	t.Run("its window is closed", func(t *testing.T) {
		timeoutIsLifted(t, func(*testing.T, int) {}, fill)
	})
	t.Run("it drops what comes", func(t *testing.T) {
		timeoutIsLifted(t, func(t *testing.T, fd int) {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil { // the kernel's least
				t.Error(err)
			}
		}, trickle)
	})
}

func timeoutIsLifted(t *testing.T, listening func(t *testing.T, fd int), fill func(*testing.T, *net.TCPConn)) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { listening(t, int(fd)) })
	}}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := dialer.NewDirect(dialer.Config{Name: "up", Type: dialer.TypeDirect})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := d.DialStream(context.Background(), dialer.Target{Addr: netip.MustParseAddrPort(l.Addr().String())})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	tcp := conn.Conn.(flow.TCPConn).TCP()

	var p dialer.Patience
	timeoutIs := func(want string) func() bool {
		return func() bool {
			if err := p.Check(tcp); err != nil {
				t.Fatal(err)
			}
			got, err := options(tcp)
			return err == nil && strings.Contains(got, "user timeout "+want+" ms")
		}
	}
	if !timeoutIs("14000")() {
		t.Error("the timeout is off although nothing is sent")
	}
	fill(t, tcp)
	labtest.Eventually(t, 10*time.Second, timeoutIs("0"), "the timeout is lifted")
	go func() { _, _ = io.Copy(io.Discard, server) }()
	labtest.Eventually(t, 10*time.Second, timeoutIs("14000"), "the timeout is back")
	_ = conn.Close()
	if p.Check(tcp) == nil {
		t.Error("no error from a closed socket")
	}
}

// fill writes until the peer takes no more.
func fill(t *testing.T, c *net.TCPConn) {
	t.Helper()
	block := make([]byte, 1<<20)
	for {
		if err := c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(block); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// trickle writes a byte at a time, which fills a receiver's memory before its
// window, until something has to be repeated.
func trickle(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for repeated := false; !repeated; time.Sleep(time.Millisecond) {
		_, err := c.Write([]byte("x"))
		err = errors.Join(err, raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			repeated = err == nil && info.Unacked > 0 && info.Backoff > 0
		}))
		if err != nil {
			t.Fatalf("nothing is repeated: %v", err)
		}
	}
}
