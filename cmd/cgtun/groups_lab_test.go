package main_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// twoPaths is a group over both links of the world's machine.
const twoPaths = `
[[outbound]]
name = "a"
type = "direct"
interface = "eth0"

[[outbound]]
name = "b"
type = "direct"
interface = "eth1"

[[group]]
name = "auto"
outbounds = ["a", "b"]

[[group]]
name = "in-order"
type = "fallback"
outbounds = ["a", "b"]

[[group]]
name = "nested"
type = "balance"
outbounds = ["in-order", "b"]

[[group]]
name = "alone"
outbounds = "a"

[[rule]]
port = 7001
use = "in-order"

[[rule]]
port = 7002
use = "nested"

[[rule]]
use = "auto"
`

// beforeTheAnswer has a first path of its own for each port from 7003 on: what
// the others did to theirs says nothing of it.
func beforeTheAnswer(ports ...int) (text string) {
	for _, p := range ports {
		text += fmt.Sprintf(`
[[outbound]]
name = "a%[1]d"
type = "direct"
interface = "eth0"

[[group]]
name = "g%[1]d"
type = "fallback"
outbounds = ["a%[1]d", "b"]
stagger = "3s" # a busy machine is not to look like a path that does not connect

[[rule]]
port = %[1]d
use = "g%[1]d"
`, p)
	}
	return text
}

// fault puts rules into the way of what comes by the first path, and returns how
// to take them away.
func (w *world) fault(rule string) (mend func()) {
	w.t.Helper()
	text := `add table inet fault; add chain inet fault f { type filter hook forward priority 0; };
add set inet fault seen { type inet_service; flags dynamic; timeout 10s; };`
	for _, r := range strings.Split(rule, ";") {
		text += `add rule inet fault f iifname "eth0" ` + r + ";"
	}
	w.router.Run("nft", text)
	return func() { w.router.Run("nft", "delete table inet fault") }
}

// outbound returns what status says of one.
func outboundOf(s control.Status, name string) control.Outbound {
	i := slices.IndexFunc(s.Outbounds, func(o control.Outbound) bool { return o.Name == name })
	if i < 0 {
		return control.Outbound{}
	}
	return s.Outbounds[i]
}

// One path is dead, refuses, is slow or loses: clients do not notice (W1). The
// bound is below the second after which a kernel sends a SYN again, and far
// above a stagger, for a busy machine.
func TestGroupsConnectByTheGoodPath(t *testing.T) {
	t.Parallel()
	const soon = 900 * time.Millisecond
	w := newWorld(t)
	ports := []int{7000, 7001, 7002}
	for _, p := range ports {
		w.server.ServeEcho(port("", p))
	}
	w.server.ServeUDPEcho(port(far4, 7000))
	w.start(w.config(beforeTheAnswer(7003, 7004, 7005, 7006, 7007, 7008) + twoPaths))
	w.failBeforeTheAnswer(t)
	w.failInTheMiddle(t)
	connect := func(t *testing.T, to int) answer {
		t.Helper()
		// A path that is waited for makes all of them slow.
		a := w.promptly(inside, probe{Do: "dial", Network: "tcp", To: port(far4, to), Say: "hello"}, soon, 3)
		if a.Errno != "" || a.Heard != "hello" {
			t.Errorf("port %d: %+v", to, a)
		}
		if a.Took > soon {
			t.Errorf("port %d: took %v", to, a.Took)
		}
		return a
	}
	t.Run("both are good", func(t *testing.T) {
		for _, p := range ports {
			connect(t, p)
		}
		if a := w.probe(inside, probe{Do: "dial", Network: "udp", To: port(far4, 7000), Say: "hello"}); a.Heard != "hello" {
			t.Errorf("by UDP: %+v", a)
		}
		for _, f := range w.flows() {
			if f.Dst.Port() < 7003 && (len(f.Path) != 1 || f.Path[0] != "a" && f.Path[0] != "b" || f.Use == nil) {
				t.Errorf("a flow's path: %+v", f)
			}
		}
	})
	for _, tt := range []struct{ name, rule string }{
		{"black hole", "drop"},
		{"refused", "meta l4proto tcp reject with tcp reset"},
		{"unreachable", "reject with icmpx host-unreachable"},
		{"half of the SYNs lost", "tcp flags syn numgen random mod 2 0 drop"},
		{"a second late", "tcp flags syn tcp sport @seen accept; tcp flags syn add @seen { tcp sport } drop"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mend := w.fault(tt.rule)
			defer mend()
			for range 3 {
				for _, p := range ports {
					connect(t, p)
				}
			}
		})
	}
	t.Run("refused by the destination", func(t *testing.T) {
		for range 3 {
			if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7999)}); a.Errno != "ECONNREFUSED" || a.Took > 5*time.Second {
				t.Errorf("%+v", a)
			}
		}
	})
	t.Run("link down", func(t *testing.T) {
		w.router.Run("ip", "link", "set", "eth0", "down")
		labtest.Eventually(t, 5*time.Second, func() bool { return outboundOf(w.status(), "a").State == "down" })
		for _, p := range ports {
			if a := connect(t, p); a.Took > soon {
				t.Errorf("%+v", a)
			}
		}
		s := w.status()
		for _, g := range s.Groups {
			if len(g.Order) == 2 && g.Order[1] == "b" {
				t.Errorf("the order of %q is %q", g.Name, g.Order)
			}
		}
		w.router.Run("ip", "link", "set", "eth0", "up")
		labtest.Eventually(t, 10*time.Second, func() bool { return outboundOf(w.status(), "a").State != "down" })
	})
	s := w.status()
	if h := s.Counters.HiddenTotal; h.Reset == 0 || h.Stall == 0 || outboundOf(s, "a7003").HiddenTotal != 1 {
		t.Errorf("failures before the answer are not told: %+v", h)
	}
	if s.Counters.HiddenTotal.Dial == 0 || outboundOf(s, "a").HiddenTotal == 0 || outboundOf(s, "b").Score == nil {
		t.Errorf("hidden failures are not told: %+v, %+v", s.Counters.HiddenTotal, s.Outbounds)
	}
	if out, _, _ := w.cgtun("status"); !strings.Contains(out, "nothing to fail over to") {
		t.Errorf("a group with one path is not told of:\n%s", out)
	}
	e := ask[control.Explain](w, "explain", port(far4, 7000))
	if e.Use != "auto" || len(e.Path) != 1 || !strings.Contains(string(e.Choice), `group "auto" (race) would ask`) {
		t.Errorf("explain: %+v", e)
	}
}

// failBeforeTheAnswer has the first path connect, and then reset or lose what the
// client sends (W2): a GET is answered by the other one, a POST is not sent twice.
func (w *world) failBeforeTheAnswer(t *testing.T) {
	const get, post = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na"
	const data = "tcp flags & psh == psh "
	for _, tt := range []struct {
		name, rule, say, errno string
		port                   int
		within                 time.Duration
	}{
		{"reset of a GET", data + "reject with tcp reset", get, "", 7003, 5 * time.Second},
		{"loss of a GET", data + "drop", get, "", 7004, 8 * time.Second},
		{"reset of a POST", data + "reject with tcp reset", post, "ECONNRESET", 7005, 5 * time.Second},
		{"reset of the banner of SSH", data + "reject with tcp reset", "SSH-2.0-lab\r\n", "", 7007, 5 * time.Second},
		{"reset of what nobody knows", data + "reject with tcp reset", "hello", "ECONNRESET", 7008, 5 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var heard atomic.Int32 // connections that brought a byte: a race may have made others
			w.server.Serve(port("", tt.port), func(c *net.TCPConn) error {
				b := make([]byte, 4096)
				for first := true; ; first = false {
					n, err := c.Read(b)
					if err != nil {
						return nil
					}
					if first {
						heard.Add(1)
					}
					if _, err := c.Write(b[:n]); err != nil {
						return nil
					}
				}
			})
			mend := w.fault(tt.rule)
			defer mend()
			a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, tt.port), Say: tt.say, Wait: 10 * time.Second})
			if a.Errno != tt.errno || tt.errno == "" && a.Heard != tt.say || a.Took > tt.within {
				t.Errorf("%+v", a)
			}
			want := 1
			if tt.errno != "" {
				want = 0
			}
			if n := heard.Load(); int(n) != want {
				t.Errorf("the server heard something on %d connections, want %d", n, want)
			}
			for _, f := range w.flows() {
				if int(f.Dst.Port()) == tt.port && (f.Replays != want || f.Path[0] == "b" != (want == 1)) {
					t.Errorf("%+v", f)
				}
			}
		})
	}
}

// failInTheMiddle loses the packets of one flow: new ones leave its path seconds
// before it is given up, and though it connects.
func (w *world) failInTheMiddle(t *testing.T) {
	server := w.server.Serve(":7006", func(c *net.TCPConn) error {
		for {
			if _, err := c.Write(make([]byte, 4<<10)); err != nil {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	reader := w.lab.StartCommand(w.command(context.Background(), inside, "bash", "-c", "exec cat < /dev/tcp/"+far4+"/7006 > /dev/null"))
	defer reader.Stop()
	group := func() string {
		for _, g := range w.status().Groups {
			if g.Name == "g7006" {
				return strings.Join(g.Order, " ")
			}
		}
		return ""
	}
	labtest.Eventually(t, 5*time.Second, func() bool {
		return slices.ContainsFunc(w.flows(), func(f flow.Info) bool { return f.Dst.Port() == 7006 && f.DownBytes > 10_000 })
	})
	if got := group(); got != "a7006 b" {
		t.Errorf("before: %q", got)
	}
	defer w.fault(fmt.Sprintf("tcp sport %d drop", server.Clients()[0].Port()))()
	labtest.Eventually(t, 12*time.Second, func() bool { return group() == "b a7006" }, "new flows leave the path")
	for _, f := range w.flows() {
		if f.Dst.Port() == 7006 && f.State != "open" {
			t.Errorf("the flow was ended already: %+v", f)
		}
	}
}
