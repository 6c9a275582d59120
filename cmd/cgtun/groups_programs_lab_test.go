package main_test

import (
	"archive/zip"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/internal/labtest"
)

// beforeTheFirstByte are the ways in which a server, or what is in its place, fails a
// client that has connected.
var beforeTheFirstByte = []struct {
	name string
	do   func(*net.TCPConn)
}{
	{"reset after accept", func(c *net.TCPConn) { _ = c.SetLinger(0) }},
	{"closed after accept", func(*net.TCPConn) {}},
	{"reset after the request", func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 4096)); _ = c.SetLinger(0) }},
	{"silence after the request", func(c *net.TCPConn) {
		for b := make([]byte, 4096); ; {
			if _, err := c.Read(b); err != nil {
				return
			}
		}
	}},
}

// installers are what a build runs. $H is the server, $S the same over TLS with the
// certificate $CA, $X the sum of the file.
var installers = []struct{ name, script string }{
	{"curl", "curl -sSf http://$H/file | sha256sum | grep -q $X"},
	{"curl over TLS", "curl -sSf --cacert $CA https://$S/file | sha256sum | grep -q $X"},
	{"wget", "wget -t 1 -qO- http://$H/file | sha256sum | grep -q $X"},
	{"git", "git clone -q http://$H/repo.git clone && git -C clone log --format=%s | grep -q first"},
	{"apt-get", `mkdir -p apt/lists/partial apt/cache/archives/partial && echo "deb [trusted=yes] http://$H/apt ./" > apt/list &&
apt-get -qq -o Dir::Etc::SourceList=$PWD/apt/list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$PWD/apt/lists -o Dir::Cache=$PWD/apt/cache \
-o Acquire::http::Proxy=DIRECT -o Acquire::Retries=0 -o APT::Sandbox::User=root update`},
	{"go", "GOTOOLCHAIN=local GOPROXY=http://$H/go GOSUMDB=off GOENV=off GOMODCACHE=$PWD/mod GOCACHE=$PWD/cache GOFLAGS=-modcacherw go mod download example.com/lab@v1.0.0"},
}

// soakInstallers are tried in the soak, where they are: Debian's packages of them are
// hundreds.
var soakInstallers = []struct{ name, script string }{
	{"pip", "pip download -q --retries 0 --no-cache-dir --no-deps --disable-pip-version-check http://$H/ours-1.0-py3-none-any.whl && ls ours-1.0-py3-none-any.whl"},
	{"npm", "npm view --registry=http://$H/npm/ --fetch-retries=0 --no-update-notifier --cache=$PWD/npm ours version | grep -q 1.0.0"},
}

// Programs that give up when their server fails before its first byte do not notice
// that the first path does so (W7).
func TestProgramsByAFailingPath(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "wget", "git", "nginx")
	installers := installers
	for _, program := range soakInstallers {
		if _, err := exec.LookPath(program.name); err == nil && labtest.Soak() {
			installers = append(installers, program)
		}
	}
	certificate := w.certificate(far4)
	nat := "add table ip bad; add chain ip bad p { type nat hook prerouting priority -100; };"
	config := ""
	var ports []int
	for i, fault := range beforeTheFirstByte {
		w.server.Serve(fmt.Sprintf(":%d", 9000+i), func(c *net.TCPConn) error { fault.do(c); return nil })
		for j := range installers {
			p := 7100 + 100*i + 2*j
			ports = append(ports, p)
			config += beforeTheAnswer(p, p+1)
			nat += fmt.Sprintf("add rule ip bad p iifname eth0 tcp dport { %d, %d } dnat to 10.9.0.2:%d;", p, p+1, 9000+i)
		}
	}
	w.server.Serve(":1085", lie)
	const lied = 7090
	ports = append(ports, lied)
	w.serveFilesAt(certificate, ports...)
	w.serveMore(nil)
	w.serveModule()
	w.servePackages()
	w.router.Run("nft", nat)
	w.start(w.config(fmt.Sprintf(liar, lied) + config + twoPaths))
	sum := w.sum()
	var all sync.WaitGroup
	for i, fault := range beforeTheFirstByte {
		for j, program := range installers {
			p := 7100 + 100*i + 2*j
			dir := t.TempDir()
			script := strings.NewReplacer("$H", port(far4, p), "$S", port(far4, p+1), "$CA", certificate, "$X", sum).Replace(program.script)
			all.Go(func() {
				if out, err := w.try(inside, "sh", "-c", "cd "+dir+"; "+script); err != nil {
					t.Errorf("%s, %s: %v\n%s", program.name, fault.name, err, out)
				}
			})
		}
	}
	all.Wait()
	began := time.Now()
	w.run(inside, "curl", "-sSf", "-o", "/dev/null", "http://"+port(far4, lied)+"/file")
	s := w.status()
	if took := time.Since(began); took > 10*time.Second || outboundOf(s, "liar").HiddenTotal != 1 {
		t.Errorf("a proxy that lies: %v, %d failures are hidden", took, outboundOf(s, "liar").HiddenTotal)
	}
	for i, fault := range beforeTheFirstByte {
		for j, program := range installers {
			p := 7100 + 100*i + 2*j
			if hidden(s, p)+hidden(s, p+1) == 0 {
				t.Errorf("%s, %s: nothing was in its way", program.name, fault.name)
			}
		}
		if _, err := w.try(outside, "curl", "-sSf", "-m", "2", "http://"+port(far4, 7100+100*i)+"/file"); err == nil {
			t.Errorf("curl, %s: it does not need help", fault.name)
		}
	}
}

// liar is a proxy that says yes and does nothing (X3).
const liar = `
[[outbound]]
name = "liar"
type = "socks5"
server = "10.9.0.2:1085"

[[group]]
name = "lied"
type = "fallback"
outbounds = ["liar", "b"]

[[rule]]
port = %d
use = "lied"
`

func lie(c *net.TCPConn) error {
	for _, said := range []string{"\x05\x00", "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"} {
		if _, err := c.Read(make([]byte, 100)); err != nil {
			return nil
		}
		if _, err := c.Write([]byte(said)); err != nil {
			return nil
		}
	}
	_, _ = io.Copy(io.Discard, c)
	return nil
}

// hidden is what was hidden of the first path of a port.
func hidden(s control.Status, port int) uint64 {
	return outboundOf(s, fmt.Sprintf("a%d", port)).HiddenTotal
}

// serveModule serves a Go module as a proxy does.
func (w *world) serveModule() {
	w.t.Helper()
	dir := filepath.Join(w.dir, "www", "go", "example.com", "lab", "@v")
	err := errors.Join(os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "v1.0.0.info"), []byte(`{"Version":"v1.0.0"}`), 0o644),
		os.WriteFile(filepath.Join(dir, "v1.0.0.mod"), []byte("module example.com/lab\n"), 0o644))
	f, ferr := os.Create(filepath.Join(dir, "v1.0.0.zip"))
	if err := errors.Join(err, ferr); err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	z := zip.NewWriter(f)
	one, err := z.Create("example.com/lab@v1.0.0/go.mod")
	if err == nil {
		_, err = one.Write([]byte("module example.com/lab\n"))
	}
	if err := errors.Join(err, z.Close()); err != nil {
		w.t.Fatal(err)
	}
}

// servePackages serves a wheel of Python's, and what a registry of npm says of a
// package.
func (w *world) servePackages() {
	w.t.Helper()
	www := filepath.Join(w.dir, "www")
	err := errors.Join(os.MkdirAll(filepath.Join(www, "npm"), 0o755),
		os.WriteFile(filepath.Join(www, "npm", "ours"), []byte(`{"name":"ours","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"ours","version":"1.0.0","dist":{"tarball":"http://a.example/"}}}}`), 0o644))
	f, ferr := os.Create(filepath.Join(www, "ours-1.0-py3-none-any.whl"))
	if err := errors.Join(err, ferr); err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	z := zip.NewWriter(f)
	for name, text := range map[string]string{
		"METADATA": "Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n",
		"WHEEL":    "Wheel-Version: 1.0\nGenerator: lab\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
		"RECORD":   "",
	} {
		one, oerr := z.Create("ours-1.0.dist-info/" + name)
		if oerr == nil {
			_, oerr = io.WriteString(one, text)
		}
		err = errors.Join(err, oerr)
	}
	if err := errors.Join(err, z.Close()); err != nil {
		w.t.Fatal(err)
	}
}
