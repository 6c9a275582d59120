package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	machine = "machine" // the namespaces' names begin like this
	host    = "mirror.example"
	web4    = "203.0.113.10"
	web6    = "2001:db8:77::10"
	names   = "203.0.113.53"
	group   = "7701" // of the demo's programs, so that the counters know their packets
)

const drawing = `
  namespace machine                                namespace internet
  ┌──────────────────────────────┐                 ┌─────────────────────────────┐
  │ selected cgroup ─ tun0 ─ cgtun ─ eth0 ─ uplink ─ nginx    203.0.113.10       │
  │ everything else ──────────────── eth0 │        │          2001:db8:77::10    │
  │                              │                 │ dnsmasq  203.0.113.53       │
  └──────────────────────────────┘                 └─────────────────────────────┘

`

// lab is the two namespaces and all that runs in them.
type lab struct {
	machine, internet string // names of the namespaces
	dir               string // of temporary files
	undo              []func() error
}

func (l *lab) onClose(f func() error) { l.undo = append(l.undo, f) }

// close undoes all, newest first, whatever fails.
func (l *lab) close() error {
	var err error
	for _, f := range slices.Backward(l.undo) {
		err = errors.Join(err, f())
	}
	return err
}

// build makes the namespaces and starts the servers.
func (l *lab) build(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "cgtun-demo")
	if err != nil {
		return err
	}
	l.dir = dir
	l.onClose(func() error { return os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "gnupg"), 0o700); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{l.namespaces, l.resolver, l.links, l.counters, l.servers} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) namespaces(ctx context.Context) error {
	for to, name := range map[*string]string{&l.machine: machine, &l.internet: "internet"} {
		*to = fmt.Sprintf("%s-%d", name, os.Getpid())
		if _, err := run(ctx, "ip", "netns", "add", *to); err != nil {
			return err
		}
		l.onClose(func() error {
			_, err := run(context.Background(), "ip", "netns", "del", *to)
			return err
		})
	}
	return nil
}

// resolver gives the machine a resolv.conf of its own: ip-netns(8) mounts the
// files of /etc/netns/NAME over those of /etc.
func (l *lab) resolver(context.Context) error {
	const parent = "/etc/netns"
	if err := os.Mkdir(parent, 0o755); err == nil {
		l.onClose(func() error { return os.Remove(parent) })
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	dir := filepath.Join(parent, l.machine)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	l.onClose(func() error { return os.RemoveAll(dir) })
	return os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("nameserver "+names+"\n"), 0o644)
}

func (l *lab) links(ctx context.Context) error {
	m, i := l.machine, l.internet
	script := []string{
		"-n " + m + " link add " + uplink + " type veth peer name eth0 netns " + i,
		"-n " + m + " link set lo up", "-n " + m + " link set " + uplink + " up",
		"-n " + i + " link set lo up", "-n " + i + " link set eth0 up",
		"-n " + m + " addr add 10.77.0.2/24 dev " + uplink, "-n " + i + " addr add 10.77.0.1/24 dev eth0",
		"-n " + m + " addr add fd77::2/64 nodad dev " + uplink, "-n " + i + " addr add fd77::1/64 nodad dev eth0",
		"-n " + i + " addr add " + web4 + "/32 dev lo", "-n " + i + " addr add " + names + "/32 dev lo",
		"-n " + i + " addr add " + web6 + "/128 nodad dev lo",
		"-n " + m + " route add default via 10.77.0.1", "-n " + m + " route add default via fd77::1",
	}
	for _, line := range script {
		if _, err := run(ctx, "ip", strings.Fields(line)...); err != nil {
			return err
		}
	}
	return nil
}

// counters counts what the demo's programs, known by their group, send into
// the tun and out by the uplink: behind every other rule, so that what is
// dropped does not count as sent.
func (l *lab) counters(ctx context.Context) error {
	rules := fmt.Sprintf(`table inet demo {
	counter tun { }
	counter uplink { }
	counter routed { }
	chain routed {
		type filter hook forward priority 400; policy accept;
		oifname "%[4]s" counter name routed
	}
	chain post {
		type filter hook postrouting priority 400; policy accept;
		meta skgid %[1]s oifname "%[2]s" counter name tun
		meta skgid %[3]s oifname "%[4]s" counter name uplink
	}
}
`, group, device, group, uplink)
	cmd := exec.CommandContext(ctx, "ip", "netns", "exec", l.machine, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	_, err := runCommand(cmd)
	return err
}

// counter reads one of the two counters.
func (l *lab) counter(ctx context.Context, name string) (int, error) {
	out, err := run(ctx, "ip", "netns", "exec", l.machine, "nft", "list", "counter", "inet", "demo", name)
	if err != nil {
		return 0, err
	}
	var n int
	_, after, _ := strings.Cut(out, "packets ")
	if _, err := fmt.Sscan(after, &n); err != nil {
		return 0, fmt.Errorf("read counter %s: %w", name, err)
	}
	return n, nil
}

// servers starts a web server and a name server in the internet.
func (l *lab) servers(ctx context.Context) error {
	if err := l.certificate(); err != nil {
		return err
	}
	www := filepath.Join(l.dir, "www")
	if err := os.Mkdir(www, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(www, "file"), bytes.Repeat([]byte("cgtun\n"), 20000), 0o644); err != nil {
		return err
	}
	conf := filepath.Join(l.dir, "nginx.conf")
	text := strings.NewReplacer("DIR", l.dir, "WEB4", web4, "WEB6", web6).Replace(`user root;
worker_processes 1;
pid DIR/nginx.pid;
error_log DIR/nginx.log;
events { }
http {
	access_log off;
	client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
	server {
		listen WEB4:80; listen [WEB6]:80; listen WEB4:443 ssl; listen [WEB6]:443 ssl;
		ssl_certificate DIR/cert.pem; ssl_certificate_key DIR/key.pem;
		root DIR/www;
	}
}
`)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return err
	}
	if _, err := l.start("ip", "netns", "exec", l.internet, "nginx", "-c", conf, "-g", "daemon off;"); err != nil {
		return err
	}
	if _, err := l.start("ip", "netns", "exec", l.internet, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts",
		"--no-resolv", "--user=root", "--pid-file=", "--bind-interfaces", "--listen-address="+names,
		"--address=/"+host+"/"+web4, "--address=/"+host+"/"+web6); err != nil {
		return err
	}
	return until(ctx, 10*time.Second, func() error {
		out, err := run(ctx, "ip", "netns", "exec", l.internet, "ss", "-Hln")
		for _, port := range []string{web4 + ":80", web4 + ":443", names + ":53"} {
			if err == nil && !strings.Contains(out, port+" ") {
				err = fmt.Errorf("nobody listens at %s", port)
			}
		}
		return err
	})
}

// certificate writes a key and a certificate that its holder signed himself.
func (l *lab) certificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: cert}, "key.pem": {Type: "EC PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(filepath.Join(l.dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// process is a program in the background.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed after err is set
	err  error
	mu   sync.Mutex
	text bytes.Buffer
}

// Write collects the output.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// start starts a program in a process group of its own: an interrupt at the
// keyboard is for the demo, which then ends the others in order.
func (l *lab) start(name string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
	}()
	l.onClose(func() error {
		_, _ = p.stop()
		return nil
	})
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop sends SIGTERM, waits, and says how long the end took. What still lives
// after ten seconds is killed.
func (p *process) stop() (time.Duration, error) {
	if p.ended() {
		return 0, p.err
	}
	start := time.Now()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return time.Since(start), p.err
	case <-time.After(10 * time.Second):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		return time.Since(start), fmt.Errorf("%s did not end within 10 s of SIGTERM", p.cmd.Args[0])
	}
}
