package main_test

import (
	"regexp"
	"strings"
	"testing"
)

// Who looks for the routers on the path finds them behind cgtun, which is one
// of them, and the host at its end.
func TestRoutersOnThePathAreSeen(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ping", "traceroute", "tracepath", "mtr")
	w.router.Sysctl("net.ipv4.icmp_ratelimit", "0")
	w.router.Sysctl("net.ipv6.icmp.ratelimit", "0")
	w.server.Sysctl("net.ipv4.icmp_ratelimit", "0")
	w.server.Sysctl("net.ipv6.icmp.ratelimit", "0")
	// As strict as kernels can be told to be, of every device.
	w.machine.Sysctl("net.ipv4.conf.all.rp_filter", "1")
	w.server.ServeEcho(":7000")
	w.router.Run("ip", "route", "add", "unreachable", "203.0.113.98")
	w.router.Run("ip", "route", "add", "unreachable", "2001:db8::98")
	w.start(w.config(second))
	hops := map[string][]string{
		far4: {w.tunAddress(false), "10.2.0.1", far4},
		far6: {w.tunAddress(true), "fd02::1", far6},
	}
	// A busy machine may be too late for one.
	asks := func(ok func(out string) bool, name string, args ...string) (out string, err error) {
		for range 3 {
			if out, err = w.try(inside, name, args...); err == nil && ok(out) {
				break
			}
		}
		return out, err
	}
	for far, hops := range hops {
		path := func(out string) bool { return seesHops(out, hops) }
		back := func(out string) bool {
			return path(out) && strings.Contains(out, "hops 3 back 3") && !strings.Contains(out, "asymm")
		}
		two := func(out string) bool { return strings.Contains(out, " ttl=62 ") }
		for by, groups := range pingBy {
			w.machine.Sysctl("net.ipv4.ping_group_range", groups)
			out, err := asks(path, "traceroute", "-n", "-q", "1", "-w", "3", "-I", far)
			if err != nil || !path(out) {
				t.Errorf("by %s: traceroute -I %s: %v: want %v\n%s", by, far, err, hops, out)
			}
		}
		// The server is as far away on the way back.
		out, err := asks(back, "tracepath", "-n", "-m", "5", far)
		if err != nil || !back(out) {
			t.Errorf("tracepath %s: %v: want %v, 3 hops and 3 back\n%s", far, err, hops, out)
		}
		out, err = asks(two, "ping", "-n", "-c", "1", "-W", "3", far)
		if err != nil || !two(out) {
			t.Errorf("ping %s: %v: want a TTL of 62, as of two routers\n%s", far, err, out)
		}
		for _, command := range []string{
			"traceroute -n -q 1 -w 3",
			"traceroute -n -q 1 -w 3 -U -p 7001",
			"traceroute -n -q 1 -w 3 -T -p 7000",
			"mtr -n -r -w -c 1 -i 0.3 -G 0.3 -m 5",
			"mtr -n -r -w -c 1 -i 0.3 -G 0.3 -m 5 -u",
			"mtr -n -r -w -c 1 -i 0.3 -G 0.3 -m 5 -T -P 7000",
		} {
			args := append(strings.Fields(command), far)
			out, err := asks(path, args[0], args[1:]...)
			if err != nil || !path(out) {
				t.Errorf("%s %s: %v: want %v\n%s", command, far, err, hops, out)
			}
		}
	}
	// Whoever says that there is no way is seen as well by who looks for no routers:
	// with the TTL of every connection.
	for gone, by := range map[string]string{"203.0.113.98": "10.2.0.1", "2001:db8::98": "fd02::1"} {
		out, err := w.try(inside, "traceroute", "-n", "-q", "1", "-w", "5", "-T", "-f", "64", "-m", "64", gone)
		if err != nil || !regexp.MustCompile(`(?m)^ *64 +`+regexp.QuoteMeta(by)+` .*!`).MatchString(out) {
			t.Errorf("a connection to %s: %v: want an error of %s\n%s", gone, err, by, out)
		}
	}
	w.noLeak("probes")
}

// seesHops says whether the output of a tracer has each hop, at its place.
func seesHops(out string, hops []string) bool {
	for i, hop := range hops {
		line := regexp.MustCompile(`(?m)^ *` + string(rune('1'+i)) + `[.:?|\- ].*[ -]` + regexp.QuoteMeta(hop) + `\s`)
		if !line.MatchString(out + "\n") {
			return false
		}
	}
	return true
}

// tunAddress is the address of cgtun's device.
func (w *world) tunAddress(v6 bool) string {
	w.t.Helper()
	for _, a := range w.status().Attachments {
		for _, p := range a.Address {
			if addr, _, _ := strings.Cut(p, "/"); strings.Contains(addr, ":") == v6 {
				return addr
			}
		}
	}
	w.t.Fatal("no address of the device is shown")
	return ""
}
