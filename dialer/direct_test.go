package dialer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
)

// options reads back what the dialer set on a socket.
func options(c *net.TCPConn) (string, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	var values []any
	var failed error
	err = raw.Control(func(fd uintptr) {
		for _, o := range [][2]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE}, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}, {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT}, {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}, {unix.IPPROTO_TCP, unix.TCP_NODELAY},
			{unix.SOL_SOCKET, unix.SO_MARK},
		} {
			v, err := unix.GetsockoptInt(int(fd), o[0], o[1])
			failed = errors.Join(failed, err)
			values = append(values, v)
		}
	})
	return fmt.Sprintf("keepalive %d: %d s, %d s, %d; user timeout %d ms; nodelay %d; mark %d", values...), errors.Join(err, failed)
}

func TestDirectRefusesWhatWouldNotWork(t *testing.T) {
	tests := []struct {
		name    string
		c       dialer.Config
		capture []dialer.Mark
		want    string
	}{
		{"the mark that captures", dialer.Config{Mark: 101}, []dialer.Mark{{Value: 101, Mask: 0xffffffff}}, "mark 0x65 is one that [route] captures by"},
		{"under its mask", dialer.Config{Mark: 0x1065}, []dialer.Mark{{Value: 7, Mask: 0xff}, {Value: 0x65, Mask: 0xff}}, "mark 0x1065 is one that"},
		{"mptcp", dialer.Config{MPTCP: true}, nil, "mptcp is not in this version"},
		{"another type", dialer.Config{Type: dialer.TypeSOCKS5}, nil, `type "socks5" is not direct`},
		{"another mark", dialer.Config{Mark: 102}, []dialer.Mark{{Value: 101, Mask: 0xffffffff}}, ""},
		{"no mark", dialer.Config{}, []dialer.Mark{{Value: 101, Mask: 0xffffffff}}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.c.Name = "up"
			_, err := dialer.NewDirect(tt.c, tt.capture...)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func BenchmarkDialDirect(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	d, err := dialer.NewDirect(dialer.Config{Name: "up", Type: dialer.TypeDirect})
	if err != nil {
		b.Fatal(err)
	}
	addr := netip.MustParseAddrPort(l.Addr().String())
	b.ReportAllocs()
	for b.Loop() {
		c, err := d.DialStream(context.Background(), dialer.Target{Addr: addr})
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Reset()
	}
}

// An urgent byte is one of the stream's for whoever relays it.
func TestUrgentBytesComeInLine(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := dialer.NewDirect(dialer.Config{Name: "direct", Type: dialer.TypeDirect}, dialer.Mark{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.DialStream(t.Context(), dialer.Target{Addr: netip.MustParseAddrPort(l.Addr().String())})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	raw, err := server.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = errors.Join(
			unix.Sendto(int(fd), []byte("be"), 0, nil), unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil),
			unix.Sendto(int(fd), []byte("hind"), 0, nil), unix.Shutdown(int(fd), unix.SHUT_WR))
	})
	if err := errors.Join(err, failed); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "be!hind" || err != nil {
		t.Errorf("got %q, %v, want all bytes in order", got, err)
	}
}
