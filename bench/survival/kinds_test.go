package survival_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// What a client sees of its path.
const (
	good        = "good"
	silent      = "silent"
	refused     = "refused"
	unreachable = "unreachable"
	broken      = "broken"
)

// seen says in one word what an error means to a client.
func seen(err error) string {
	switch {
	case err == nil:
		return good
	case errors.Is(err, os.ErrDeadlineExceeded):
		return silent
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case errors.Is(err, syscall.EHOSTUNREACH):
		return unreachable
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return broken
	}
	return err.Error()
}

// TestFaults shows that each fault of the bench is what its name says, to a client
// without cgtun: that connects, that fetches little or much, and that has a download
// under way, which goes on afterwards where nobody has ended it.
func TestFaults(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	for _, want := range []struct{ fault, connects, short, long, underWay string }{
		{"near link down", silent, "", "", silent},
		{"far link down", unreachable, "", "", silent},
		{"all dropped", silent, "", "", silent},
		{"reset of everything", refused, "", "", broken},
		{"reset past 300 kB", good, good, broken, broken},
		{"stall past 300 kB", good, good, silent, silent},
		{"30 % loss", "", "", "", ""},
		{"SOCKS server dead", refused, "", "", broken},
		{"SOCKS server never answers", silent, "", "", silent},
	} {
		i := 0
		for faults[i].name != want.fault {
			i++
		}
		f := faults[i]
		var old fetched
		labtest.Eventually(t, 10*time.Second, func() bool { // a server that was dead comes back
			var err error
			old, err = l.begin(f.proxy, 4e6)
			return err == nil
		})
		if err := old.next(1e6, 20*time.Second); err != nil {
			t.Fatalf("%s: before it: %v", f.name, err)
		}
		f.on(l, 0)
		const soon = 1500 * time.Millisecond
		if want.underWay != "" {
			if got := seen(old.next(2e6, soon)); got != want.underWay {
				t.Errorf("%s: a download that is under way is %s, want %s", f.name, got, want.underWay)
			}
		}
		if want.connects != "" {
			c, err := l.begin(f.proxy, 2e6)
			if got := seen(err); got != want.connects {
				t.Errorf("%s: a new connection is %s, want %s", f.name, got, want.connects)
			}
			if err == nil && want.short != "" {
				if got := seen(c.next(100e3, 20*time.Second)); got != want.short {
					t.Errorf("%s: 100 kB are %s, want %s", f.name, got, want.short)
				}
				if got := seen(c.next(1e6, soon)); got != want.long {
					t.Errorf("%s: 1 MB are %s, want %s", f.name, got, want.long)
				}
			}
			if err == nil {
				c.Close()
			}
		}
		switch f.name {
		case "near link down":
			labtest.Eventually(t, 5*time.Second, func() bool { return strings.Contains(l.machine.Run("ip", "link", "show", "eth0"), "NO-CARRIER") })
		case "30 % loss": // of each way
			if n := l.pings(); n < 25 || n > 75 {
				t.Errorf("%s: %d of 100 pings are answered", f.name, n)
			}
		}
		f.off(l, 0)
		if want.underWay == silent {
			if got := seen(old.next(2e6, 20*time.Second)); got != good {
				t.Errorf("%s: afterwards a download is %s", f.name, got)
			}
		}
		old.Close()
	}
}

// fetched is a download by path 0.
type fetched struct {
	net.Conn
	r *bufio.Reader
}

// begin asks for n bytes, by the SOCKS server of path 0 or directly.
func (l *lab) begin(byProxy bool, n int) (f fetched, err error) {
	to := net.JoinHostPort(far, plainPort)
	if byProxy {
		to = net.JoinHostPort(l.proxies[0].addr, proxyPort)
	}
	c, err := l.machine.DialWith(&net.Dialer{Timeout: time.Second}, "tcp", to)
	if err != nil {
		if e := net.Error(nil); errors.As(err, &e) && e.Timeout() {
			err = os.ErrDeadlineExceeded
		}
		return f, err
	}
	f = fetched{c, bufio.NewReader(c)}
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if byProxy {
		// RFC 1928: no account; connect to 203.0.113.10:7000.
		for _, say := range []struct {
			what   string
			answer int
		}{{"\x05\x01\x00", 2}, {"\x05\x01\x00\x01\xcb\x00\x71\x0a\x1b\x58", 10}} {
			if _, err = c.Write([]byte(say.what)); err == nil {
				_, err = io.ReadFull(f.r, make([]byte, say.answer))
			}
			if err != nil {
				c.Close()
				return f, err
			}
		}
	}
	if _, err := fmt.Fprintf(c, "GET /%d HTTP/1.1\r\n\r\n", n); err != nil {
		c.Close()
		return f, err
	}
	return f, nil
}

// next reads n bytes more.
func (f fetched) next(n int64, within time.Duration) error {
	_ = f.SetDeadline(time.Now().Add(within))
	_, err := io.CopyN(io.Discard, f.r, n)
	return err
}

var received = regexp.MustCompile(`(\d+) received`)

// pings returns how many of 100 are answered by path 0.
func (l *lab) pings() int {
	out, _ := l.machine.Try("ping", "-q", "-c", "100", "-i", "0.005", "-W", "1", far)
	n := 0
	if m := received.FindStringSubmatch(out); m != nil {
		n, _ = strconv.Atoi(m[1])
	}
	return n
}
