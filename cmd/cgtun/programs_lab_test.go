package main_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// Programs as people use them, with no proxy setting at all: in the cgroup all
// that they send goes through tun0 and leaves by the second link; outside of it
// nothing of theirs touches tun0.
func TestRealPrograms(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "wget", "git", "dig", "dnsmasq", "iperf3", "nc", "nginx")
	w.serveFiles()
	w.serveNames()
	w.start(w.config(second))
	tests := []struct {
		name, script, want string // script: $A the server, $U the same in a URL
	}{
		{"curl", "curl -sSf http://$U/file | sha256sum", w.sum()},
		{"wget", "wget -qO- http://$U/file | sha256sum", w.sum()},
		{"git", "rm -rf clone && git clone -q http://$U/repo.git clone && git -C clone log --format=%s", "first"},
		{"dig", "dig +short +tries=1 +time=3 @$A name.example", "192.0.2.77"},
		{"dig over TCP", "dig +tcp +short +tries=1 +time=3 @$A name.example", "192.0.2.77"},
	}
	for _, far := range []string{far4, far6} {
		url := far
		if strings.Contains(far, ":") {
			url = "[" + far + "]"
		}
		for _, tt := range tests {
			for _, at := range []where{outside, inside, moved} {
				sent, received := w.device()
				w.leaks.Reset()
				script := fmt.Sprintf("cd %s && A=%s U=%s && %s", w.dir, far, url, tt.script)
				if out := w.run(at, "env", "-u", "http_proxy", "-u", "https_proxy", "sh", "-c", script); !strings.Contains(out, tt.want) {
					t.Errorf("%v: %s to %s: %q, want %q", at, tt.name, far, out, tt.want)
				}
				s, r := w.device()
				switch by := w.leaks.Packets(); {
				case at == outside && (s != sent || r != received || by == 0):
					t.Errorf("%s outside to %s: %d and %d packets by tun0, %d by the uplink", tt.name, far, s-sent, r-received, by)
				case at != outside && (s == sent || r == received || by != 0):
					t.Errorf("%s %v to %s: %d and %d packets by tun0, %d by the uplink", tt.name, at, far, s-sent, r-received, by)
				}
			}
		}
	}
}

// The bulk of iperf3, each way, streams and datagrams, of both families.
func TestIperf3(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iperf3")
	w.start(w.config(second))
	for i, far := range []string{far4, far6} {
		to := fmt.Sprint(5300 + i)
		server := w.server.Start("iperf3", "-s", "-B", far, "-p", to, "--forceflush")
		server.WaitOutput("Server listening", 10*time.Second)
		for name, args := range map[string][]string{
			"tcp up": nil, "tcp down": {"-R"}, "tcp 4 up": {"-P4"}, "udp up": {"-u", "-b5M", "-l1200"}, "udp down": {"-u", "-R", "-b5M", "-l1200"},
		} {
			args = append([]string{"-c", far, "-p", to, "-n1M", "-J", "--connect-timeout", "3000"}, args...)
			out := w.run(inside, "iperf3", args...)
			for late := time.Now().Add(10 * time.Second); strings.Contains(out, "the server is busy") && time.Now().Before(late); {
				out = w.run(inside, "iperf3", args...) // it clears up after the client before has gone
			}
			if strings.Contains(out, `"error"`) || !strings.Contains(out, `"bits_per_second"`) {
				t.Errorf("%s to %s: %s", name, far, out)
			}
			lost, err := strconv.ParseFloat(field(out, "lost_percent"), 64)
			if strings.HasPrefix(name, "udp") && (err != nil || lost > 20) { // this machine may be busy
				t.Errorf("%s to %s: %v %% lost (%v)", name, far, lost, err)
			}
		}
		w.noLeak("iperf3 " + far)
	}
}

// field returns the last value of a key in JSON text.
func field(text, key string) string {
	i := strings.LastIndex(text, `"`+key+`":`)
	if i < 0 {
		return "no"
	}
	value, _, _ := strings.Cut(text[i+len(key)+3:], "\n")
	return strings.Trim(value, "\t ,")
}

// nc ends its side and still gets the whole answer; a connection on which
// nothing is said for a while works afterwards.
func TestHalfClosedAndIdle(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "nc")
	w.server.Serve(":7001", answerAfterEnd)
	w.server.ServeEcho(":7000")
	w.start(w.config(second))
	idle := 5 * time.Second
	if labtest.Soak() {
		idle = time.Minute
	}
	silent := map[string]*labtest.Proc{}
	for _, far := range []string{far4, far6} {
		script := fmt.Sprintf("(echo one; sleep %d; echo two) | nc -N %s 7000", int(idle.Seconds()), far)
		silent[far] = w.lab.StartCommand(w.command(t.Context(), inside, "sh", "-c", script))
		out := w.run(inside, "sh", "-c", "head -c 300000 /dev/zero | nc -N "+far+" 7001")
		if out != "got 300000 bytes and the end" {
			t.Errorf("half-close to %s: %q", far, out)
		}
	}
	for far, p := range silent {
		if err := p.Wait(); err != nil || p.Output() != "one\ntwo\n" {
			t.Errorf("silent for %v to %s: %v %q", idle, far, err, p.Output())
		}
	}
	w.noLeak("half-closed and idle")
}

// serveFiles serves a file and a git repository on both far addresses.
func (w *world) serveFiles() {
	w.t.Helper()
	w.serveFilesAt("", 80)
}

// serveFilesAt does so at some ports and, with a certificate, by TLS at each next
// one.
func (w *world) serveFilesAt(certificate string, ports ...int) {
	w.t.Helper()
	dir := filepath.Join(w.dir, "www")
	conf := filepath.Join(w.dir, "nginx.conf")
	listen := ""
	for _, far := range []string{far4, far6} {
		for _, p := range ports {
			listen += "listen " + port(far, p) + "; "
			if certificate != "" {
				listen += "listen " + port(far, p+1) + " ssl; "
			}
		}
	}
	if certificate != "" {
		listen += "ssl_certificate " + certificate + "; ssl_certificate_key " + certificate + "; "
	}
	text := strings.NewReplacer("DIR", w.dir, "LISTEN", listen).Replace(`user root;
worker_processes 1;
daemon off;
pid DIR/nginx.pid;
error_log DIR/nginx.log;
events { }
http {
	access_log off;
	client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
	server { LISTEN root DIR/www; }
}
`)
	script := `set -e; mkdir -p ` + dir + `; cd ` + dir + `; head -c 3000000 /dev/zero | tr '\0' x > file
git init -q work; git -C work -c user.name=n -c user.email=e commit -q --allow-empty -m first
git clone -q --bare work repo.git; git -C repo.git update-server-info`
	w.server.Run("sh", "-c", script)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
	w.server.Start("nginx", "-c", conf, "-e", filepath.Join(w.dir, "nginx.log"))
	w.listening(ports[0])
}

func (w *world) sum() string {
	w.t.Helper()
	sum, _, _ := strings.Cut(w.server.Run("sha256sum", filepath.Join(w.dir, "www", "file")), " ")
	return sum
}

// serveNames answers for name.example on both far addresses.
func (w *world) serveNames() {
	w.t.Helper()
	w.server.Start("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root", "--pid-file=",
		"--listen-address="+far4, "--listen-address="+far6, "--address=/name.example/192.0.2.77")
	w.listening(53)
}

// listening waits until the server takes connections at a port.
func (w *world) listening(to int) {
	w.t.Helper()
	for _, far := range []string{far4, far6} {
		labtest.Eventually(w.t, 10*time.Second, func() bool {
			c, err := w.server.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(far), uint16(to)).String())
			if err == nil {
				c.Close()
			}
			return err == nil
		}, "a server at port %d of %s", to, far)
	}
}
