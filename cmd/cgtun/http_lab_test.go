package main_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
)

// middle4 and middle6 are the router's addresses at the end of the second link,
// where the proxies listen.
const middle4, middle6 = "10.2.0.1", "fd02::1"

// The ways of this test: a rule for the ports from the one that stands here.
var httpWays = []struct {
	name   string
	port   int
	config string
}{
	{"direct", 8000, ""},
	{"tiny", 8010, `type = "http"
server = "10.2.0.1:8888"`},
	{"tiny-auth", 8020, `type = "http"
server = "10.2.0.1:8889"
username = "joe"
password = "password"`},
	{"squid", 8030, `type = "http"
server = "[fd02::1]:3128"`},
	{"squid-auth", 8040, `type = "http"
server = "10.2.0.1:3129"
username = "joe"
password = "pass:word"`},
	{"squid-tls", 8050, `type = "https"
server = "[fd02::1]:3130"
tls_ca = "CERTIFICATE"`},
	{"chain", 8060, `type = "https"
server = "10.2.0.1:3130"
tls_ca = "CERTIFICATE"
via = "tiny-auth"`},
	{"stunnel", 8090, `type = "https"
server = "10.2.0.1:8890"
tls_ca = "CERTIFICATE"`},
	{"wrong", 8070, `type = "http"
server = "10.2.0.1:3129"
username = "joe"
password = "wrong"`},
	{"untrusted", 8080, `type = "https"
server = "10.2.0.1:3130"`},
}

// Programs that know of no proxy, through two proxies that we did not write, with
// and without an account, over TLS and in a chain; the same by the second link
// alone beside it. What goes through a proxy leaves the machine in no other way.
//
//	machine                        router                        server
//	sel ── tun0 ── cgtun ─── eth1 │ eth1  squid, tinyproxy  eth2 │ nginx
//	                              │       stunnel                │
//	                              │ counted: forwarded from eth1 │
func TestProgramsThroughHTTPProxies(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "wget", "git", "dig", "dnsmasq", "iperf3", "nginx", "squid", "stunnel", "tinyproxy")
	certificate := w.certificate(middle4, middle6, far4, far6)
	w.serveProxies(certificate)
	var ports []int
	text := w.config(`
[[outbound]]
name = "second"
type = "direct"
interface = "eth1"
`)
	for _, way := range httpWays {
		ports = append(ports, way.port)
		use := way.name
		if way.config == "" {
			use = "second"
		} else {
			text += fmt.Sprintf("[[outbound]]\nname = %q\n%s\n", way.name, strings.ReplaceAll(way.config, "CERTIFICATE", certificate))
		}
		text += fmt.Sprintf("[[rule]]\nport = \"%d-%d\"\nuse = %q\n", way.port, way.port+9, use)
	}
	text += "[[rule]]\nproto = \"icmp\"\nuse = \"tiny\"\n"
	w.serveFilesAt(certificate, ports...)
	forwarded := w.router.MeterMatch(`iifname "eth1" ip daddr 203.0.113.0/24`, `iifname "eth1" ip6 daddr 2001:db8::/32`)
	d := w.start(text)

	w.serveMore(ports)
	for _, way := range httpWays[:len(httpWays)-2] {
		forwarded.Reset()
		for i, far := range []string{far4, far6} {
			for _, tt := range trialsFor(i == 0) {
				script := fmt.Sprintf("cd %s && H=%s S=%s CA=%s F=%s P=%d && %s", w.dir, port(far, way.port), port(far, way.port+1), certificate, far, way.port+3, tt.script)
				out, err := w.try(inside, "env", "-u", "http_proxy", "-u", "https_proxy", "sh", "-c", script)
				if want := strings.ReplaceAll(tt.want, "SUM", w.sum()); err != nil || !strings.Contains(out, want) {
					t.Errorf("%s by %s to %s: %q, %v, want %q", tt.name, way.name, far, out, err, want)
				}
			}
			t.Logf("%s to %s: %d programs", way.name, far, len(trialsFor(i == 0)))
		}
		if n := forwarded.Packets(); (n != 0) != (way.config == "") {
			t.Errorf("%s: %d packets went to the server past the proxy", way.name, n)
		}
	}
	w.noLeak("by proxies")
	w.tellsTheTruth(d)
}

// trial is what a way is tried with. $H is a server, $S one over TLS with the
// certificate $CA; at the address $F and port $P is one of iperf3, and dnsmasq
// behind it.
type trial struct{ name, script, want string }

// iperf3 asks the server at $F and $P, which clears up after the client before has
// gone, and is busy until then.
const iperf3 = `bulk() {
	for i in $(seq 50); do
		out=$(iperf3 -c $F -p $P -J --connect-timeout 3000 "$@") && break
		case $out in *"is busy"*) sleep 0.2 ;; *) break ;; esac
	done
	echo "$out"
}
bulk`

func trialsFor(first bool) []trial {
	list := []trial{
		{"curl", "curl -sSf http://$H/file >plain && sha256sum plain", "SUM"},
		{"curl over TLS", "curl -sSf --cacert $CA https://$S/file >tls && sha256sum tls", "SUM"},
	}
	if !first && !labtest.Soak() {
		return list
	}
	bulk := iperf3 + " -n 1M"
	if labtest.Soak() {
		bulk = iperf3 + " -n 200M -P 4"
	}
	return append(list,
		trial{"wget", "wget -qO- http://$H/file | sha256sum", "SUM"},
		trial{"git", "rm -rf clone && git clone -q http://$H/repo.git clone && git -C clone log --format=%s", "first"},
		trial{"dig over TCP", "dig +tcp +short +tries=1 +time=3 -p $((P+1)) @$F name.example", "192.0.2.77"},
		trial{"iperf3 up", bulk, "bits_per_second"}, trial{"iperf3 down", bulk + " -R", "bits_per_second"},
		trial{"apt-get", `rm -rf apt && mkdir -p apt/lists/partial apt/cache/archives/partial apt/etc &&
echo "deb [trusted=yes] http://$H/apt ./" > apt/list &&
apt-get -o Dir::Etc::SourceList=$PWD/apt/list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$PWD/apt/lists -o Dir::Cache=$PWD/apt/cache \
-o Acquire::http::Proxy=DIRECT -o APT::Sandbox::User=root update`, "Fetched"})
}

// serveMore serves a Debian repository, and iperf3 and dnsmasq behind each of the
// ports.
func (w *world) serveMore(ports []int) {
	w.t.Helper()
	apt := filepath.Join(w.dir, "www", "apt")
	text := "Package: lab\nVersion: 1\nArchitecture: all\nFilename: lab.deb\nSize: 1\nSHA256: " + strings.Repeat("0", 64) + "\n"
	if err := errors.Join(os.Mkdir(apt, 0o755), os.WriteFile(filepath.Join(apt, "Packages"), []byte(text), 0o644)); err != nil {
		w.t.Fatal(err)
	}
	for _, p := range ports {
		for _, far := range []string{far4, far6} {
			server := w.server.Start("iperf3", "-s", "-B", far, "-p", fmt.Sprint(p+3), "--forceflush")
			server.WaitOutput("Server listening", 10*time.Second)
		}
		w.server.Start("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root", "--pid-file=",
			"--port="+fmt.Sprint(p+4), "--listen-address="+far4, "--listen-address="+far6, "--address=/name.example/192.0.2.77")
		w.listening(p + 4)
	}
}

// tellsTheTruth looks at what clients learn of what does not work.
func (w *world) tellsTheTruth(d *daemon) {
	w.t.Helper()
	w.hearsNo([]refusal{
		{"nobody listens, squid says so", "tcp", 8032, "ECONNREFUSED"},
		{"nobody listens, squid says so through a chain", "tcp", 8062, "ECONNREFUSED"},
		{"nobody listens, tinyproxy only says that it cannot", "tcp", 8012, "EHOSTUNREACH"},
		{"datagrams", "udp", 8010, "ECONNREFUSED"},
		{"a wrong password", "tcp", 8070, "EHOSTUNREACH"},
		{"a wrong password, again", "tcp", 8070, "EHOSTUNREACH"},
		{"a server that cannot be trusted", "tcp", 8080, "EHOSTUNREACH"},
	})
	if n := strings.Count(d.Output(), "does not take its account"); n != 1 {
		w.t.Errorf("%d lines of the log tell of a wrong password", n)
	}
	asked := 0
	for _, f := range w.flows() {
		if f.Dst.Port() == 8070 && f.Reason != nil && *f.Reason == flow.Prohibited.String() {
			asked++
		}
	}
	if asked < 4 { // a SYN that comes again is a flow of its own
		w.t.Errorf("%d flows are known as prohibited, want 4", asked)
	}
}

// certificate makes a certificate for some addresses that stands for itself, and
// returns the file of it and its key.
func (w *world) certificate(addrs ...string) string {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "lab"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, a := range addrs {
		c.IPAddresses = append(c.IPAddresses, net.ParseIP(a))
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	text, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text})...)
	path := filepath.Join(w.dir, "certificate.pem")
	if err := os.WriteFile(path, both, 0o644); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// serveProxies starts tinyproxy and squid on the router, each with and without an
// account.
func (w *world) serveProxies(certificate string) {
	w.t.Helper()
	dir := filepath.Join(w.dir, "proxies")
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			w.t.Fatal(err)
		}
		return path
	}
	// Squid is another user when it looks at them.
	for d := w.dir; d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := os.Mkdir(dir, 0o777); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		w.t.Fatal(err)
	}
	tiny := "Port %d\nTimeout 60\nLogLevel Warning\nMaxClients 100\n%s"
	w.router.Start("tinyproxy", "-d", "-c", write("tiny", fmt.Sprintf(tiny, 8888, "")))
	w.router.Start("tinyproxy", "-d", "-c", write("tiny-auth", fmt.Sprintf(tiny, 8889, "BasicAuth joe password\n")))
	w.router.Start("stunnel", write("stunnel", "foreground = yes\nsyslog = no\npid =\n[proxy]\naccept = 10.2.0.1:8890\nconnect = 10.2.0.1:8888\ncert = "+certificate+"\n"))
	// "pass:word", as htpasswd(1) writes it.
	write("passwords", "joe:$apr1$labsalt1$N0bx5ifSLmjcgoBpWUf.j1\n")
	squid := w.router.Start("squid", "-N", "-f", write("squid", strings.NewReplacer("DIR", dir, "CERTIFICATE", certificate).Replace(`
http_port 3128
http_port 3129 name=account
https_port 3130 tls-cert=CERTIFICATE
auth_param basic program /usr/lib/squid/basic_ncsa_auth DIR/passwords
auth_param basic children 1
acl account myportname account
acl known proxy_auth REQUIRED
http_access allow !account
http_access allow known
http_access deny all
pinger_enable off
pid_filename none
cache deny all
cache_log DIR/squid.log
access_log none
coredump_dir DIR
shutdown_lifetime 0 seconds
`)))
	// Its helper has a session of its own, and goes a little after it.
	w.t.Cleanup(func() {
		if !squid.Exited() {
			_, _ = squid.Stop()
		}
		labtest.Eventually(w.t, 10*time.Second, func() bool {
			_, err := w.router.Try("pgrep", "-f", filepath.Join(dir, "passwords"))
			return err != nil
		}, "squid's helper has ended")
	})
	for _, p := range []int{8888, 8889, 3128, 3129, 3130} {
		labtest.Eventually(w.t, 20*time.Second, func() bool {
			c, err := w.router.Dial("tcp", port(middle4, p))
			if err == nil {
				c.Close()
			}
			return err == nil
		}, "a proxy at port %d", p)
	}
}
