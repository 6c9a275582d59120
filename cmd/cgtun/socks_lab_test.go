package main_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/internal/labtest"
)

// The ways of this test: a rule for the ports from the one that stands here.
var socksWays = []struct {
	name   string
	port   int
	udp    bool
	config string
}{
	{"micro", 8100, false, `server = "10.2.0.1:1080"`},
	{"micro-auth", 8110, false, `server = "[fd02::1]:1081"
username = "joe"
password = "password"`},
	{"dante", 8120, true, `server = "[fd02::1]:1082"`},
	{"dante-auth", 8130, true, `server = "10.2.0.1:1083"
username = "joe"
password = "password"`},
	{"chain", 8140, true, `server = "10.9.0.2:1084"
via = "dante-auth"`},
	{"mixed", 8150, false, `type = "http"
server = "10.2.0.1:8888"
via = "micro-auth"`},
	{"wrong", 8160, false, `server = "10.2.0.1:1083"
username = "joe"
password = "wrong"`},
	{"own", 8170, false, `server = "203.0.113.10:1085"`},
	{"at-home", 8180, false, `server = "127.0.0.1:1086"`},
}

// Programs that know of no proxy, through two SOCKS5 proxies that we did not
// write, with and without an account, in a chain, and beneath an HTTP proxy. What
// goes through a proxy leaves the machine in no other way.
//
//	machine                        router                              server
//	sel ── tun0 ── cgtun ─── eth1 │ eth1  microsocks, danted     eth2 │ nginx, dnsmasq, iperf3
//	                              │ tinyproxy                         │ danted, microsocks
//	                              │ counted: forwarded from eth1      │
func TestProgramsThroughSOCKS5(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "wget", "git", "dig", "dnsmasq", "iperf3", "nginx", "microsocks", "danted", "tinyproxy", "unshare")
	certificate := w.certificate(far4, far6)
	restart := w.serveSOCKS()
	text := w.config("")
	var ports []int
	for _, way := range socksWays {
		ports = append(ports, way.port)
		kind := `type = "socks5"`
		if strings.HasPrefix(way.config, "type") {
			kind = ""
		}
		text += fmt.Sprintf("[[outbound]]\nname = %q\n%s\n%s\n[[rule]]\nport = \"%d-%d\"\nuse = %[1]q\n", way.name, kind, way.config, way.port, way.port+9)
	}
	text += "[[rule]]\nuse = \"own\"\n"
	w.serveFilesAt(certificate, ports...)
	w.serveEchoes()
	w.serveMore(ports)
	forwarded := w.router.MeterMatch(`iifname "eth1" ip daddr 203.0.113.0/24`, `iifname "eth1" ip6 daddr 2001:db8::/32`)
	d := w.start(text)

	ways := socksWays[:6]
	if raceEnabled {
		ways = ways[4:] // the chains: all that is in the others
	}
	for _, way := range ways {
		for i, far := range []string{far4, far6} {
			trials := trialsFor(i == 0)
			if way.udp {
				trials = append(trials, datagramTrials(i == 0)...)
			}
			for _, tt := range trials {
				script := fmt.Sprintf("cd %s && H=%s S=%s CA=%s F=%s P=%d && %s", w.dir, port(far, way.port), port(far, way.port+1), certificate, far, way.port+3, tt.script)
				out, err := w.try(inside, "env", "-u", "http_proxy", "-u", "https_proxy", "sh", "-c", script)
				if want := strings.ReplaceAll(tt.want, "SUM", w.sum()); err != nil || !strings.Contains(out, want) {
					t.Errorf("%s by %s to %s: %q, %v, want %q", tt.name, way.name, far, out, err, want)
				}
				if lost, err := strconv.ParseFloat(field(out, "lost_percent"), 64); err == nil && lost > 20 { // this machine may be busy
					t.Errorf("%s by %s to %s: %v %% lost", tt.name, way.name, far, lost)
				}
			}
			t.Logf("%s to %s: %d programs", way.name, far, len(trials))
		}
		if way.udp {
			w.probeOutput(inside, probe{Do: "sizes", To: port(far4, way.port+5), N: 30_000})
			w.probeOutput(inside, probe{Do: "sizes", To: port(far6, way.port+5), N: 30_000})
		}
		if n := forwarded.Packets(); n != 0 {
			t.Errorf("%s: %d packets went to the server past the proxy", way.name, n)
			forwarded.Reset()
		}
	}
	w.outlivesAProxy(restart)
	w.socksTellsTheTruth(d)
	w.noLeak("by SOCKS5")
	w.reachesProxiesThemselves()
}

// datagramTrials are the trials of a way with UDP.
func datagramTrials(first bool) []trial {
	bulk := iperf3 + " -u -b 2M -l 1200 -n 300K"
	list := []trial{
		{"dig", "dig +notcp +short +tries=1 +time=3 -p $((P+1)) @$F name.example", "192.0.2.77"},
		{"iperf3 with datagrams", bulk, "bits_per_second"},
		{"iperf3 with datagrams back", bulk + " -R", "bits_per_second"},
	}
	switch {
	case labtest.Soak():
		return list
	case first:
		return list[:2]
	}
	return append(list[:1], list[2])
}

// serveEchoes echoes datagrams of the ways with UDP.
func (w *world) serveEchoes() {
	w.t.Helper()
	for _, way := range socksWays {
		if !way.udp {
			continue
		}
		w.server.ServeUDPEcho(port(far4, way.port+5))
		w.server.ServeUDPEcho(port(far6, way.port+5))
	}
}

// socksTellsTheTruth looks at what clients learn of what does not work.
func (w *world) socksTellsTheTruth(d *daemon) {
	w.t.Helper()
	w.hearsNo([]refusal{
		{"nobody listens, microsocks says so", "tcp", 8102, "ECONNREFUSED"},
		{"nobody listens, dante says so", "tcp", 8132, "ECONNREFUSED"},
		{"nobody listens, the far end of a chain says so", "tcp", 8142, "ECONNREFUSED"},
		{"datagrams by who has none", "udp", 8102, "ECONNREFUSED"},
		{"datagrams by http", "udp", 8152, "ECONNREFUSED"},
		{"a wrong password", "tcp", 8160, "EHOSTUNREACH"},
	})
	for _, to := range []string{far4 + ":8102", far4 + ":8152"} {
		if e := ask[control.Explain](w, "explain", "-proto", "udp", to); len(e.Path) != 0 || !strings.Contains(string(e.Why), "carry datagrams") {
			w.t.Errorf("explain says of datagrams to %s: path %q, %s", to, e.Path, e.Why)
		}
	}
	if text := d.Output(); strings.Contains(text, "wrong") && strings.Contains(text, "password=") {
		w.t.Error("the log has a password")
	}
	for _, f := range w.flows() {
		if f.Dst.Port() == 8141 && !slices.Equal(f.Path, []string{"dante-auth", "chain"}) {
			w.t.Errorf("path %q of a flow by the chain", f.Path)
		}
	}
}

// reachesProxiesThemselves has a client use a proxy by itself that its flows are
// sent through anyway, and a proxy that is in the machine.
func (w *world) reachesProxiesThemselves() {
	w.t.Helper()
	get := func(args ...string) {
		w.t.Helper()
		args = append([]string{"-u", "http_proxy", "-u", "https_proxy", "curl", "-sSf"}, args...)
		if out, err := w.try(inside, "env", args...); err != nil || len(out) != 3_000_000 {
			w.t.Errorf("curl %q: %d bytes, %v", args, len(out), err)
		}
	}
	target := "http://" + port(far4, 8170) + "/file"
	get(target)
	get("--socks5", "203.0.113.10:1085", target)
	get("http://" + port(far4, 8180) + "/file")
	paths := map[string][]string{"203.0.113.10:8170": {"own"}, "203.0.113.10:1085": {"direct"}, "203.0.113.10:8180": {"at-home"}}
	found := 0
	for _, f := range w.flows() {
		if want, ok := paths[f.Dst.String()]; ok {
			found++
			if !slices.Equal(f.Path, want) {
				w.t.Errorf("flow to %v by %q, want %q", f.Dst, f.Path, want)
			}
		}
	}
	if found != 3 {
		w.t.Errorf("%d flows, want 3", found)
	}
	if e := ask[control.Explain](w, "explain", "203.0.113.10:1085"); !slices.Equal(e.Path, []string{"direct"}) {
		w.t.Errorf("explain says of a proxy: path %q", e.Path)
	}
}

// serveSOCKS starts microsocks and dante where socksWays has them. dante knows
// users of the system alone: in its own mount namespace there is one more.
// The one of "dante" is started again by what it returns.
func (w *world) serveSOCKS() (restart func()) {
	w.t.Helper()
	w.router.Start("microsocks", "-i", "10.2.0.1", "-p", "1080")
	w.router.Start("microsocks", "-i", "fd02::1", "-p", "1081", "-u", "joe", "-P", "password")
	w.server.Start("microsocks", "-i", far4, "-p", "1085")
	w.machine.Start("microsocks", "-i", "127.0.0.1", "-p", "1086")
	write := func(name, text string) string {
		path := filepath.Join(w.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			w.t.Fatal(err)
		}
		return path
	}
	// "password", by "openssl passwd -6".
	shadow := write("shadow", "joe:$6$labsalt$MwEdCDqw0exCZQAeg0DIsrBwGgTG1RELp4N7Veg4R1brdETw/O/P1APSE719vzQuWJQOZFJhF5mldomOfvbDf.:19000::::::\n")
	passwd := write("passwd", "root:x:0:0::/:/bin/sh\njoe:x:60001:60001::/:/bin/false\n")
	dante := func(h *labtest.Host, port int, listen, leave, method string) *labtest.Proc {
		conf := write(fmt.Sprintf("dante-%d", port), fmt.Sprintf(`
logoutput: stderr
internal: %s port = %d
external: %s
clientmethod: none
socksmethod: %s
user.privileged: root
user.unprivileged: root
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 command: bind connect udpassociate }
socks pass { from: 0/0 to: 0/0 command: bindreply udpreply }
`, listen, port, leave, method))
		script := `mount --bind "$1" /etc/shadow && mount --bind "$2" /etc/passwd && exec danted -f "$3" -p "$3.pid"`
		return h.Start("unshare", "-m", "sh", "-c", script, "sh", shadow, passwd, conf)
	}
	running := dante(w.router, 1082, "fd02::1", "eth2", "none")
	dante(w.router, 1083, "10.2.0.1", "eth2", "username")
	dante(w.server, 1084, "10.9.0.2", "lo", "none")
	w.router.Start("tinyproxy", "-d", "-c", write("tiny", "Port 8888\nTimeout 60\nLogLevel Warning\nMaxClients 100\n"))
	for _, p := range []string{"10.2.0.1:1080", "[fd02::1]:1081", "[fd02::1]:1082", "10.2.0.1:1083", "10.9.0.2:1084", far4 + ":1085", "10.2.0.1:8888"} {
		labtest.Eventually(w.t, 20*time.Second, func() bool {
			c, err := w.router.Dial("tcp", p)
			if err == nil {
				c.Close()
			}
			return err == nil
		}, "a proxy at %s", p)
	}
	return func() {
		_, _ = running.Stop()
		running = dante(w.router, 1082, "fd02::1", "eth2", "none")
	}
}

// outlivesAProxy has a client send on and on from one socket, while the proxy is
// started again: its associations are gone, and made again.
func (w *world) outlivesAProxy(restart func()) {
	w.t.Helper()
	echo := w.server.ServeUDPEcho(port(far4, 8129))
	mutter := w.startProbe(inside, probe{Do: "mutter", To: port(far4, 8129)})
	more := func(what string) {
		w.t.Helper()
		n := len(echo.Clients())
		labtest.Eventually(w.t, 10*time.Second, func() bool { return len(echo.Clients()) > n }, "datagrams %s", what)
	}
	more("through dante")
	restart()
	more("through dante when it is back")
	_, _ = mutter.Stop()
}
