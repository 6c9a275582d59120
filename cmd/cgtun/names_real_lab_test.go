package main_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
)

func init() { probes["look up"] = lookUp }

// lookUp asks as static programs in Go do.
func lookUp(q probe) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	addrs, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, q.To)
	if err != nil {
		return err
	}
	_, err = fmt.Println(addrs)
	return err
}

// staticLookUp is a program in C, without glibc: its resolver asks all servers
// at once from one socket. With another argument it connects to the first address
// that it gets, and tries no other one.
const staticLookUp = `
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int argc, char **argv) {
	struct addrinfo *a, hints = { .ai_socktype = SOCK_STREAM };
	char text[100];
	if (getaddrinfo(argv[1], "80", &hints, &a)) return 1;
	if (argc > 2) return connect(socket(a->ai_family, SOCK_STREAM, 0), a->ai_addr, a->ai_addrlen) ? 2 : 0;
	for (; a; a = a->ai_next)
		if (!getnameinfo(a->ai_addr, a->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST)) puts(text);
	return 0;
}
`

// unbound starts a resolver that knows names of example, by UDP, TCP, TLS and
// HTTPS.
func (w *world) unbound(certificate string) *labtest.Proc {
	w.t.Helper()
	conf := filepath.Join(w.dir, "unbound.conf")
	text := fmt.Sprintf(`
server:
	do-daemonize: no
	chroot: ""
	username: ""
	directory: %q
	pidfile: ""
	use-syslog: no
	interface: %[2]s
	interface: %[2]s@853
	interface: %[2]s@443
	interface: %[4]s@853
	tls-service-key: %[3]q
	tls-service-pem: %[3]q
	access-control: 0.0.0.0/0 allow
	access-control: ::/0 allow
	module-config: "iterator"
	root-hints: ""
	local-zone: example. static
	local-data: "both.example. 2 A 203.0.113.10"
	local-data: "both.example. 2 AAAA 2001:db8::10"
	local-data: "six.example. 2 AAAA 2001:db8::10"
	local-data: "hidden.example. 2 A 203.0.113.10"
	local-data: "udp.example. 2 A 192.0.2.1"
	local-data: "tcp.example. 2 A 192.0.2.2"
	local-data: "tls.example. 2 A 192.0.2.3"
	local-data: "https.example. 2 A 192.0.2.4"
remote-control:
	control-enable: no
`, w.dir, far4, certificate, far6)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return w.server.Start("unbound", "-d", "-c", conf)
}

// Real resolvers by each kind of upstream, with real clients; and where there is
// no way out for one family, programs take the other one.
func TestRealResolvers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "unbound", "dig", "curl", "wget", "busybox", "nc", "musl-gcc")
	certificate := w.certificate(far4)
	w.unbound(certificate)
	w.listening(853)
	w.server.Serve("203.0.113.10:80", func(c *net.TCPConn) error {
		_, _ = c.Read(make([]byte, 1000))
		_, err := c.Write([]byte("HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n"))
		return err
	})
	source := filepath.Join(w.dir, "lookup.c")
	static := strings.TrimSuffix(source, ".c")
	if err := os.WriteFile(source, []byte(staticLookUp), 0o644); err != nil {
		t.Fatal(err)
	}
	w.run(outside, "musl-gcc", "-static", "-o", static, source)
	const rule = "\n[[rule]]\ndomain = \"hidden.example\"\nuse = \"reject\"\n"
	file := w.write(w.config("[dns]\nupstreams = \"udp://" + far4 + "\"\n" + rule + second))
	cmd := w.self.Command(w.machine.Command(context.Background(), "env", "SSL_CERT_FILE="+certificate, w.program(), "-c", file))
	d := w.startCommand(cmd)
	for _, tt := range []struct{ name, upstream string }{
		{"udp", "udp://" + far4}, {"tcp", "tcp://" + far4}, {"tls", "tls://" + far4 + "#" + far4}, {"https", "https://" + far4 + "/dns-query"},
	} {
		if err := os.WriteFile(file, []byte(w.config("[dns]\nupstreams = \""+tt.upstream+"\"\n"+rule+second)), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, errs, code := w.cgtun("reload"); code != 0 {
			t.Fatalf("reload: %s", errs)
		}
		want := map[string]string{"udp": "192.0.2.1", "tcp": "192.0.2.2", "tls": "192.0.2.3", "https": "192.0.2.4"}[tt.name]
		// Nobody is at the address that is asked.
		if out, err := w.try(inside, "dig", "+short", "+tries=1", "+time=6", tt.name+".example", "@203.0.113.99"); strings.TrimSpace(out) != want {
			t.Errorf("%s: %q, %v, want %s\n%s", tt.upstream, out, err, want, d.Output())
		}
	}
	// Who looks names up by himself is known by what he says to the server.
	out, err := w.try(inside, "env", "-u", "https_proxy", "curl", "-sSk", "-m", "10", "--doh-insecure", "--doh-url", "https://"+far4+"/dns-query", "https://hidden.example/")
	if err == nil {
		t.Errorf("by DoH the rule is passed: %s", out)
	}
	if !slices.ContainsFunc(w.flows(), func(f flow.Info) bool {
		return f.Name != nil && *f.Name == "hidden.example" && *f.NameFrom == "sni" && f.Rule != nil && *f.Rule == 1
	}) {
		t.Errorf("no flow is known as hidden.example: %v, %+v", err, w.flows())
	}
	stub := filepath.Join(w.dir, "stub.conf")
	if err := os.WriteFile(stub, []byte("nameserver 203.0.113.98\nnameserver 203.0.113.99\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	with := func(program string) (string, error) {
		return w.try(inside, "unshare", "-m", "sh", "-c", "mount --bind "+stub+" /etc/resolv.conf && "+program)
	}
	probe := strings.Join(quoted(probeArgs(probe{Do: "look up", To: "both.example"})), " ")
	for _, program := range []string{"getent ahosts both.example", static + " both.example", "busybox nslookup both.example", "env " + probe} {
		if out, err := with(program); err != nil || !strings.Contains(out, "203.0.113.10") || !strings.Contains(out, "2001:db8::10") {
			t.Errorf("%.100s: %v %s", program, err, out)
		}
	}
	for _, family := range []string{"-6", "-4"} {
		if family == "-4" { // from here on there is no way out for IPv6
			w.machine.Run("ip", "-6", "route", "flush", "default")
			w.machine.Run("ip", "-6", "route", "flush", "table", "102")
		}
		for _, program := range []string{"curl -sS -m 10 http://both.example/", "wget -q -T 10 -t 1 -O - http://both.example/", "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 both.example 80"} {
			if out, err := with("unset http_proxy; " + program); err != nil || !strings.Contains(out, "hello") {
				t.Errorf("%s, where %s has a way out: %v %s", program, family, err, out)
			}
		}
	}
	aaaa := func(name string) (string, error) {
		out, err := w.try(inside, "dig", "+short", "+tries=1", "+time=6", name, "AAAA", "@203.0.113.99")
		return strings.TrimSpace(out), err
	}
	// What ways there are is looked at each second.
	labtest.Eventually(t, 10*time.Second, func() bool {
		out, err := aaaa("both.example")
		return err == nil && out == ""
	}, "without a way out for IPv6 both.example has addresses of IPv4 alone")
	if out, err := aaaa("six.example"); out != "2001:db8::10" {
		t.Errorf("AAAA of six.example, where IPv6 has no way out: %q, %v", out, err)
	}
	if _, err := with(static + " both.example connect"); err != nil {
		t.Errorf("a program that tries the first address alone: %v", err)
	}
	w.noLeak("resolvers")
}

// quoted are words for a shell.
func quoted(words []string) (all []string) {
	for _, word := range words {
		all = append(all, "'"+strings.ReplaceAll(word, "'", `'\''`)+"'")
	}
	return all
}
