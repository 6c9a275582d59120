package main_test

import (
	"fmt"
	"strings"
	"testing"

	"cgtun/control"
)

// pingBy are the two ways to send pings, and who may ping by sockets for that.
var pingBy = map[string]string{"raw sockets": "1 0", "ping sockets": "0 2147483647"}

// Pings are answered by who was asked, or not at all.
func TestPing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ping")
	w.router.Sysctl("net.ipv4.icmp_ratelimit", "0")
	w.router.Sysctl("net.ipv6.icmp.ratelimit", "0")
	w.router.Run("ip", "route", "add", "unreachable", "198.51.100.0/24")
	w.router.Run("ip", "route", "add", "unreachable", "2001:db8:1::/64")
	w.server.Run("nft", "add", "table", "inet", "dead")
	w.server.Run("nft", "add", "chain", "inet", "dead", "in", "{ type filter hook input priority 0; }")
	w.server.Run("ip", "addr", "add", "203.0.113.66/32", "dev", "lo")
	w.server.Run("ip", "addr", "add", "2001:db8::66/128", "dev", "lo", "nodad")
	w.server.Run("nft", "add", "rule", "inet", "dead", "in", "ip", "daddr", "203.0.113.66", "drop")
	w.server.Run("nft", "add", "rule", "inet", "dead", "in", "ip6", "daddr", "2001:db8::66", "drop")
	w.start(w.config(second))
	for by, groups := range pingBy {
		w.machine.Sysctl("net.ipv4.ping_group_range", groups)
		w.pings(by)
	}
	w.noLeak("pings")
}

// pings looks for answers, silence and errors.
func (w *world) pings(by string) {
	t := w.t
	t.Helper()
	for _, far := range []string{far4, far6} {
		for _, size := range []string{"0", "56", "1400", "8000"} {
			out, err := w.try(inside, "ping", "-n", "-c", "3", "-i", "0.2", "-W", "3", "-s", size, far)
			if err != nil || !strings.Contains(out, " 3 received, 0% packet loss") {
				t.Errorf(by+": ping -s %s %s: %v\n%s", size, far, err, out)
			}
		}
		found := false
		for _, f := range w.flows() {
			if f.Proto == "icmp" && f.Dst.Addr().String() == far && f.Use != nil && *f.Use == "second" {
				found = true
			}
		}
		if !found {
			t.Errorf(by+": flows do not show the ping of %s by second", far)
		}
	}
	for _, dead := range []string{"203.0.113.66", "2001:db8::66"} {
		out, err := w.try(inside, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", dead)
		if err == nil || !strings.Contains(out, " 0 received, 100% packet loss") {
			t.Errorf(by+": ping of a dead host: %v\n%s", err, out)
		}
	}
	for _, gone := range []string{"198.51.100.1", "2001:db8:1::1"} {
		out, err := w.try(inside, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", gone)
		if err == nil || !strings.Contains(out, "nreachable") {
			t.Errorf(by+": ping of an unreachable host: %v\n%s", err, out)
		}
	}
}

// Rules speak of pings, but not of whose they are, which nobody knows; what an
// outbound cannot carry is refused at once. explain says the same.
func TestPingRejected(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ping")
	w.start(w.config(fmt.Sprintf(`
[[outbound]]
name = "proxy"
type = "socks5"
server = "203.0.113.99:1080"
[[rule]]
proto = "icmp"
cgroup = [%q]
use = "drop"
[[rule]]
proto = "icmp"
cidr = [%q]
use = "reject"
[[rule]]
proto = "icmp"
use = "proxy"
`, w.sel.Path, far4+"/32")))
	for far, want := range map[string]struct {
		word, use, why string
		rule           int
	}{
		far4: {"Packet filtered", "reject", "is selected", 2},
		far6: {"Administratively prohibited", "proxy", "refused: outbound \"proxy\": carry ICMP", 3},
	} {
		out, err := w.try(inside, "ping", "-n", "-c", "1", "-W", "2", far)
		if err == nil || !strings.Contains(out, want.word) || !strings.Contains(out, "From "+w.tunAddress(far == far6)+" ") {
			t.Errorf("ping of %s: %v\n%s", far, err, out)
		}
		e := ask[control.Explain](w, "explain", far, "-proto", "icmp", "-cgroup", w.sel.Path)
		if e.Rule == nil || *e.Rule != want.rule || string(e.Use) != want.use || !strings.Contains(e.Why, want.why) || len(e.Path) != 0 {
			t.Errorf("explain %s: %+v", far, e)
		}
	}
	w.noLeak("pings")
}
