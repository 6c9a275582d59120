package main_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/internal/labtest"
)

// zones are the dnsmasq of names: each says who answered, and what it does not
// know it refuses to others.
func (w *world) zone(h *labtest.Host, addr, answer string, more ...string) *labtest.Proc {
	w.t.Helper()
	if !slices.Contains(more, lasts) {
		more = append(more, "--local-ttl=2")
	}
	return h.Start("dnsmasq", append([]string{"--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces",
		"--user=root", "--pid-file=", "--listen-address=" + addr, "--address=/name.example/" + answer}, more...)...)
}

// lasts is for a zone whose answers are still good when a slow machine asks again.
const lasts = "--local-ttl=60"

// resolvers writes the resolv.conf of the machine, as "ip netns exec" shows it.
func (w *world) resolvers(text string) {
	w.t.Helper()
	dir := filepath.Join("/etc/netns", w.machine.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// Queries of a captured process are answered, by UDP and TCP, for whatever
// server: from the cache when it is dead, by others where it never was, and
// none of them leaves the ordinary way. What is no query goes to its server.
func TestQueriesAreAnswered(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "dig", "dnsmasq", "busybox")
	w.server.Run("ip", "addr", "add", "203.0.113.11/32", "dev", "lo")
	w.resolvers("nameserver 203.0.113.11\n")
	asked := w.zone(w.server, far4, "192.0.2.77", "--auth-zone=zone.example", "--auth-server=ns.zone.example", "--host-record=h.zone.example,192.0.2.1", "--auth-peer=10.2.0.2")
	w.zone(w.server, far6, "192.0.2.77")
	hosts := w.zone(w.server, "203.0.113.11", "192.0.2.88", "--address=/other.example/192.0.2.89")
	w.listening(53)
	if err := os.WriteFile(filepath.Join(w.dir, "stub.conf"), []byte("nameserver 127.0.0.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.start(w.config(second))
	any53 := w.router.MeterMatch(`iifname "eth0" udp dport 53`, `iifname "eth0" tcp dport 53`)
	dig := func(args string) string {
		out, err := w.try(inside, "dig", strings.Fields("+tries=1 +time=6 "+args)...)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(out)
	}
	for _, tt := range []struct{ args, want string }{
		{"+short name.example @" + far4, "192.0.2.77"},
		{"+short +tcp name.example @" + far4, "192.0.2.77"},
		{"+short name.example @" + far6, "192.0.2.77"},
		{"+short name.example @203.0.113.11", "192.0.2.88"},
		{"+short name.example @203.0.113.99", "192.0.2.88"},   // nobody is there
		{"+short other.example @" + far4, "192.0.2.89"},       // refused there
		{"zone.example AXFR @" + far4, "h.zone.example."},     // a flow
		{"+short +norecurse name.example @" + far4, "192.0"},  // one too
		{"+short CH TXT version.bind @" + far4, "\"dnsmasq-"}, // and this
	} {
		if out := dig(tt.args); !strings.Contains(out, tt.want) {
			t.Errorf("dig %s: %s, want %s", tt.args, out, tt.want)
		}
	}
	w.loopbackIsAnswered(dig)
	w.onLinkIsAnswered(dig)
	w.resolversAreFollowed(dig)
	w.nothingAnswers(dig, asked, hosts)
	if n := any53.Packets(); n != 0 {
		t.Errorf("%d packets to port 53 left by the uplink", n)
	}
	w.noLeak("queries")
}

// loopbackIsAnswered asks resolvers of the machine's loopback: one that is there,
// also after it has gone, and where nobody is the host's.
func (w *world) loopbackIsAnswered(dig func(string) string) {
	w.t.Helper()
	stub := w.zone(w.machine, "127.0.0.1", "192.0.2.66", lasts)
	labtest.Eventually(w.t, 10*time.Second, func() bool {
		c, err := w.machine.Dial("tcp", "127.0.0.1:53")
		if err == nil {
			c.Close()
		}
		return err == nil
	}, "dnsmasq on loopback")
	ask := func(args, want string) {
		w.t.Helper()
		if out := dig(args); !strings.Contains(out, want) {
			w.t.Errorf("dig %s: %s, want %s", args, out, want)
		}
	}
	ask("+short name.example @127.0.0.1", "192.0.2.66")
	ask("+short +tcp name.example @127.0.0.1", "192.0.2.66")
	ask("+short CH TXT version.bind @127.0.0.1", "\"dnsmasq-")
	ask("+short +tcp CH TXT version.bind @127.0.0.1", "\"dnsmasq-")
	if _, err := stub.Stop(); err != nil {
		w.t.Logf("dnsmasq ended with %v", err)
	}
	ask("+short name.example @127.0.0.1", "192.0.2.66") // from the cache
	ask("+short name.example @127.0.0.53", "192.0.2.88")
	ask("+short +tcp name.example @127.0.0.53", "192.0.2.88")
	ask("+short name.example @::1", "192.0.2.88")
	if out, err := w.try(outside, "dig", "+tries=1", "+time=1", "name.example", "@127.0.0.53"); err == nil {
		w.t.Errorf("outside: %s", out)
	}
	for _, program := range []string{"getent ahostsv4", "busybox nslookup -type=a"} {
		script := "mount --bind " + filepath.Join(w.dir, "stub.conf") + " /etc/resolv.conf && " + program + " name.example"
		if out, err := w.try(inside, "unshare", "-m", "sh", "-c", script); err != nil || !strings.Contains(out, "192.0.2.88") {
			w.t.Errorf("%s: %v %s", program, err, out)
		}
	}
}

// resolversAreFollowed has the machine ask another resolver, and then the one from
// before.
func (w *world) resolversAreFollowed(dig func(string) string) {
	w.t.Helper()
	w.server.Run("ip", "addr", "add", "203.0.113.12/32", "dev", "lo")
	w.zone(w.server, "203.0.113.12", "192.0.2.99", "--address=/new.example/192.0.2.98")
	w.resolvers("nameserver 203.0.113.12\n")
	labtest.Eventually(w.t, 10*time.Second, func() bool {
		return strings.Contains(dig("+short new.example @203.0.113.97"), "192.0.2.98") && strings.Contains(dig("+short new.example @127.0.0.53"), "192.0.2.98")
	}, "another resolv.conf")
	w.resolvers("nameserver 203.0.113.11\n")
	labtest.Eventually(w.t, 10*time.Second, func() bool {
		return strings.Contains(dig("+short name.example @127.0.0.53"), "192.0.2.88")
	}, "the first resolv.conf")
}

// onLinkIsAnswered asks resolvers of a network that the machine is on: by both
// families, two of them from one socket, and after they have gone.
func (w *world) onLinkIsAnswered(dig func(string) string) {
	w.t.Helper()
	w.router.Run("ip", "addr", "add", "10.2.0.3/24", "dev", "eth1")
	var servers []*labtest.Proc
	addrs := []string{"10.2.0.1", "10.2.0.3", "fd02::1"}
	for i, addr := range addrs {
		servers = append(servers, w.zone(w.router, addr, fmt.Sprintf("192.0.2.%d", 51+i), lasts, "--auth-zone=zone.example", "--auth-server=ns.zone.example", "--host-record=h.zone.example,192.0.2.1", "--auth-peer=10.2.0.2"))
	}
	for _, addr := range addrs {
		labtest.Eventually(w.t, 10*time.Second, func() bool {
			c, err := w.machine.Dial("tcp", net.JoinHostPort(addr, "53"))
			if err == nil {
				c.Close()
			}
			return err == nil
		}, "dnsmasq on %s", addr)
	}
	ask := func(args, want string) {
		w.t.Helper()
		if out := dig(args); !strings.Contains(out, want) {
			w.t.Errorf("dig %s: %s, want %s", args, out, want)
		}
	}
	for i, addr := range addrs {
		want := fmt.Sprintf("192.0.2.%d", 51+i)
		ask("+short name.example @"+addr, want)
		ask("+short +tcp name.example @"+addr, want)
	}
	ask("+short -b 10.2.0.2#5353 name.example @10.2.0.1", "192.0.2.51")
	ask("+short -b 10.2.0.2#5353 name.example @10.2.0.3", "192.0.2.52")
	ask("+short CH TXT version.bind @10.2.0.1", "\"dnsmasq-")
	ask("zone.example AXFR @10.2.0.1", "h.zone.example.")
	for _, p := range servers {
		if _, err := p.Stop(); err != nil {
			w.t.Logf("dnsmasq ended with %v", err)
		}
	}
	for i, addr := range addrs { // from the cache
		ask("+short name.example @"+addr, fmt.Sprintf("192.0.2.%d", 51+i))
	}
	ask("+short other.example @10.2.0.1", "192.0.2.89") // the host's know it
	if out, err := w.try(outside, "dig", "+tries=1", "+time=1", "name.example", "@10.2.0.1"); err == nil {
		w.t.Errorf("outside: %s", out)
	}
}

// byName has rules that hang on names.
const byName = `
[[outbound]]
name = "second"
type = "direct"
interface = "eth1"

[[rule]]
domain_suffix = ["blocked.example"]
domain_keyword = ["forbidden"]
use = "reject"

[[rule]]
domain_file = "names.txt"
use = "drop"

[[rule]]
use = "second"
`

// Rules hang on the name that a client looked up, else on the one that it says in
// what it sends first; and flows show it.
func TestRulesByName(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "dnsmasq", "nc")
	w.zone(w.server, far4, "203.0.113.10", "--address=/blocked.example/203.0.113.20", "--address=/listed.example/203.0.113.21")
	w.zone(w.server, far6, "203.0.113.10")
	w.listening(53)
	w.server.Serve("0.0.0.0:80", func(c *net.TCPConn) error {
		_, _ = c.Read(make([]byte, 1000))
		_, err := c.Write([]byte("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"))
		return err
	})
	w.server.Run("ip", "addr", "add", "203.0.113.12/32", "dev", "lo") // of which no name is known
	w.resolvers("nameserver " + far4 + "\n")
	w.server.Serve("203.0.113.12:25", func(c *net.TCPConn) error { _, err := c.Write([]byte("220 hello\r\n")); return err })
	if err := os.WriteFile(filepath.Join(w.dir, "names.txt"), []byte("listed.example\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "resolv.conf"), []byte("nameserver "+far4+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.start(w.config(byName))
	for _, tt := range []struct{ do, want, name string }{
		{"curl -sS -m 5 http://name.example/", "hello", "name.example dns"},
		{"curl -sS -m 5 http://www.blocked.example/", "curl: (7)", "www.blocked.example dns"}, // the connection is refused
		{"curl -sS -m 5 http://www.listed.example/", "curl: (28)", "www.listed.example dns"},
		{"curl -sS -m 5 --resolve host.other:80:203.0.113.12 http://host.other/", "hello", "host.other host"},
		{"curl -sS -m 5 --resolve www.blocked.test:80:203.0.113.12 http://forbidden.blocked.test/ -H 'Host: x.forbidden.test' --connect-to ::203.0.113.12:80", "curl: (56)", "x.forbidden.test host"},
		{"curl -sSk -m 5 --resolve a.blocked.example:443:203.0.113.12 https://a.blocked.example/", "curl: (35)", "a.blocked.example sni"},
		{"nc -w 2 203.0.113.12 25 </dev/null", "220 hello", ""},
	} {
		script := "mount --bind " + filepath.Join(w.dir, "resolv.conf") + " /etc/resolv.conf && " + tt.do + " 2>&1 || true"
		if strings.Contains(tt.do, "--resolve") || strings.HasPrefix(tt.do, "nc") {
			script = tt.do + " 2>&1 || true"
		}
		out := w.run(inside, "unshare", "-m", "env", "-u", "http_proxy", "-u", "https_proxy", "sh", "-c", script)
		if !strings.Contains(out, tt.want) {
			t.Errorf("%s: %q, want %q", tt.do, out, tt.want)
		}
		got := ""
		for _, f := range w.flows() {
			if f.Proto == "tcp" && f.Name != nil {
				got = *f.Name + " " + *f.NameFrom
			}
		}
		if tt.name != "" && got != tt.name {
			t.Errorf("%s: the flow's name is %q, want %q", tt.do, got, tt.name)
		}
	}
	w.noLeak("rules by name") // explain asks by itself
	e := ask[control.Explain](w, "explain", "www.Blocked.example:80")
	if e.Rule == nil || *e.Rule != 1 || e.Use != "reject" {
		t.Errorf("explain by name: %+v", e)
	}
	if e := ask[control.Explain](w, "explain", "203.0.113.12:80"); e.Needs != "name" || e.Rule != nil {
		t.Errorf("explain by address: %+v", e)
	}
	if n := w.status().Counters.AcceptedFirstTotal; n != 4 {
		t.Errorf("%d clients were accepted first, want 4", n)
	}
}

// nothingAnswers ends the resolvers: what was asked for before is still answered,
// with a TTL of 30 s, and the rest fails before the client's patience is over.
func (w *world) nothingAnswers(dig func(string) string, resolvers ...*labtest.Proc) {
	w.t.Helper()
	dig("+short name.example @" + far4)
	for _, p := range resolvers {
		_, _ = p.Stop()
	}
	time.Sleep(2100 * time.Millisecond) // beyond the TTL of the answer
	for _, tt := range []struct{ args, want string }{
		{"+noall +answer +comments name.example @" + far4, "30\tIN\tA\t192.0.2.77"},
		{"unknown.example @" + far4, "status: SERVFAIL"},
	} {
		if out := dig(tt.args); !strings.Contains(out, tt.want) {
			w.t.Errorf("dig %s while nothing answers: %s, want %s", tt.args, out, tt.want)
		} else {
			w.t.Log(out)
		}
	}
}
