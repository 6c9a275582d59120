package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// dockers is a world with a docker daemon of its own in the machine, and a
// registry and servers behind the router. What leaves by the uplink is refused
// there and counted: only what cgtun sends by the second link arrives. The
// daemon has a cgroup namespace, whose root is the lab's cgroup "host".
//
//	machine                                        router              server
//	┌─────────────────────────────────────┐
//	│ dockerd   container ── docker0 ┐    │
//	│    │                      eth0 ┴────│ uplink   refused
//	│   tun0     tun0                     │                            registry.lab
//	│    └── cgtun ─┘ ────────────── eth1 │ second   ── eth2 ── eth0   mirror.lab
//	└─────────────────────────────────────┘
type dockers struct {
	*world
	host   *labtest.Cgroup
	state  string // of the daemon: its data, its socket
	images string // contexts of builds
	daemon *labtest.Proc
}

const registry = "registry.lab:5000"

// bridge is the machine's address on docker0.
const bridge = "172.17.0.1"

func newDockers(t *testing.T) *dockers {
	t.Helper()
	d := newBuilders(t, "dockerd")
	d.lab.Cgroup("host/dockerd.service")
	d.lab.Cgroup("host/ci")
	// What is closed when nothing gets out any more does not keep the namespace.
	for _, h := range []*labtest.Host{d.machine, d.server} {
		h.Sysctl("net.ipv4.tcp_orphan_retries", "1")
	}
	d.startDaemon()
	t.Cleanup(func() { d.t, d.world.t = t, t; d.stopDaemon() })
	return d
}

// newBuilders is the world of dockers with nothing yet that builds.
func newBuilders(t *testing.T, tools ...string) *dockers {
	t.Helper()
	tools = append(tools, "docker-registry", "runc", "iptables", "busybox", "curl", "git", "wget", "dirmngr", "gcc", "ldd", "nginx", "dnsmasq", "unshare", "umount")
	w := newWorld(t, tools...)
	d := &dockers{world: w, host: w.lab.Cgroup("host"), state: filepath.Join(w.dir, "docker"), images: filepath.Join(w.dir, "images")}
	w.machine.Forward()
	w.router.Run("nft", `add table inet broken; add chain inet broken f { type filter hook forward priority 0; };
		add rule inet broken f iifname "eth0" reject with icmpx admin-prohibited`)
	w.serveFiles()
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.Start("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root", "--pid-file=",
		"--listen-address="+far4, "--listen-address="+far6, "--local=/lab/", "--address=/registry.lab/"+far4, "--address=/mirror.lab/"+far4)
	w.listening(53)
	d.serveRegistry()
	d.makeImage()
	d.file(filepath.Join(d.state, "resolv.conf"), "nameserver "+far4+"\n")
	d.file(filepath.Join(d.state, "near.conf"), "nameserver "+near4+"\n")
	return d
}

// start starts cgtun with a resolver of its own that is near, and answers nothing:
// it asks that, too, where a busy machine keeps it waiting for the other one.
func (d *dockers) start(text string) *daemon {
	d.t.Helper()
	cmd := d.daemonCommand(text)
	at := slices.Index(cmd.Args, d.program())
	cmd.Args = slices.Insert(cmd.Args, at, "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, d.state+"/near.conf")
	return d.startCommand(cmd)
}

func (d *dockers) serveRegistry() {
	d.t.Helper()
	conf := filepath.Join(d.dir, "registry.yml")
	d.file(conf, fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage:\n  filesystem: {rootdirectory: %s}\nhttp: {addr: %q}\n", filepath.Join(d.dir, "registry"), far4+":5000"))
	d.server.Start("docker-registry", "serve", conf)
	labtest.Eventually(d.t, 20*time.Second, func() bool {
		c, err := d.server.Dial("tcp", far4+":5000")
		if err == nil {
			c.Close()
		}
		return err == nil
	}, "the registry listens")
}

// file writes a file and makes its directory.
func (d *dockers) file(name, text string) {
	d.t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
		d.t.Fatal(err)
	}
}

// makeImage makes a root file system of the machine's own programs and what they
// need.
func (d *dockers) makeImage() {
	d.t.Helper()
	script := `set -e
root=$0/tree; mkdir -p $root/bin $root/etc $root/tmp $root/gnupg $root/usr/bin; chmod 700 $root/gnupg
busybox=$(command -v busybox)
cp "$busybox" $root/bin/busybox
for a in sh cat sleep echo ip ping nc sha256sum grep head ls cmp test; do ln -s busybox $root/bin/$a; done
need() { # a program, or a library that is loaded by name
	mkdir -p "$root$(dirname "$1")"; cp -L "$1" "$root$1"
	{ ldd "$1" 2>/dev/null || true; } | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\).*/\1/p' |
	while read -r lib; do [ -e "$root$lib" ] || { mkdir -p "$root$(dirname "$lib")"; cp -L "$lib" "$root$lib"; }; done
}
for p in curl wget git dirmngr; do need "$(command -v $p)"; done
for p in git-remote-http git-upload-pack; do [ -e "$(git --exec-path)/$p" ] && need "$(git --exec-path)/$p"; done
for l in $(ldconfig -p | sed -n 's/.*=> \(.*libnss_\(files\|dns\)\.so\.2\)$/\1/p; s/.*=> \(.*libresolv\.so\.2\)$/\1/p'); do need "$l"; done
printf 'root:x:0:0:root:/:/bin/sh\n' >$root/etc/passwd; printf 'hosts: files dns\n' >$root/etc/nsswitch.conf
gcc -O1 -static -o $root/bin/first "$1"`
	source, err := filepath.Abs("testdata/docker/first.c")
	if err != nil {
		d.t.Fatal(err)
	}
	if out, err := exec.Command("sh", "-c", script, d.images, source).CombinedOutput(); err != nil {
		d.t.Fatalf("make an image: %v: %s", err, out)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(d.images, "tree/bin/demo"), "cgtun/internal/demo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		d.t.Fatalf("build the demo: %v: %s", err, out)
	}
}

// ownMounts has a shell see pure cgroup2, and the server's resolver. $0 is the
// world's state.
const ownMounts = `set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
mount --bind $0/resolv.conf /etc/resolv.conf`

// startDaemon starts dockerd as a service of the lab's cgroup "host".
func (d *dockers) startDaemon(args ...string) {
	d.t.Helper()
	script := ownMounts + `
echo $$ >/sys/fs/cgroup/dockerd.service/cgroup.procs
exec dockerd --data-root $0/data --exec-root $0/exec --pidfile $0/pid -H unix://$0/sock --exec-opt native.cgroupdriver=cgroupfs \
	--insecure-registry http://` + registry + ` --insecure-registry ` + registry + ` --insecure-registry 10.1.0.2:5001 --insecure-registry 172.17.0.0/16 --raw-logs -l error "$@"`
	cmd := exec.CommandContext(context.Background(), "nsenter", append([]string{"--net=" + d.machine.Path, "--", "unshare", "--mount", "--cgroup", "sh", "-c", script, d.state}, args...)...)
	d.daemon = d.lab.StartCommand(d.host.Command(cmd))
	labtest.Eventually(d.t, 30*time.Second, func() bool {
		if d.daemon.Exited() {
			d.t.Fatalf("dockerd ended:\n%s", d.daemon.Output())
		}
		_, err := d.try("version")
		return err == nil
	}, "dockerd answers")
}

// stopDaemon ends dockerd with all that it started.
func (d *dockers) stopDaemon() {
	if d.daemon.Exited() {
		return
	}
	if out, err := d.try("ps", "-aq"); err == nil && out != "" {
		_, _ = d.try(append([]string{"rm", "-f"}, strings.Fields(out)...)...)
	}
	if took, err := d.daemon.Stop(); err != nil {
		d.t.Logf("dockerd ended after %v with %v", took, err)
	}
}

// client is a command of docker in the machine, with the daemon's mounts. at says
// where it runs: what it asks itself is captured by "cgtun run" alone.
func (d *dockers) client(ctx context.Context, at where, args ...string) *exec.Cmd {
	args = append([]string{"/usr/bin/docker", "-H", "unix://" + d.state + "/sock"}, args...)
	if at == moved {
		args = append([]string{d.program(), "-s", d.socket, "run", "--"}, args...)
	}
	cmd := d.machine.Command(ctx, "nsenter", append([]string{"--mount=" + fmt.Sprintf("/proc/%d/ns/mnt", d.daemon.Pid), "--"}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+d.state, "DOCKER_BUILDKIT=0")
	return cmd
}

func (d *dockers) try(args ...string) (string, error) { return d.tryAt(outside, args...) }

func (d *dockers) tryAt(at where, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := d.client(ctx, at, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), err
}

func (d *dockers) docker(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// builder is one of docker's two.
type builder string

const (
	classic  builder = "0"
	buildKit builder = "1"
)

func (b builder) String() string {
	return map[builder]string{classic: "classic", buildKit: "BuildKit"}[b]
}

// dockerfile makes a directory with a Dockerfile.
func (d *dockers) dockerfile(text string) (dir string) {
	dir, err := os.MkdirTemp(d.images, "build")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)
	}
	if err != nil {
		d.t.Error(err)
	}
	return dir
}

// buildCommand builds a Dockerfile without the cache.
func (d *dockers) buildCommand(ctx context.Context, by builder, text string, args ...string) *exec.Cmd {
	args = append([]string{"build", "--no-cache", "--force-rm"}, append(args, d.dockerfile(text))...)
	cmd := d.client(ctx, outside, args...)
	cmd.Env = append(cmd.Env, "DOCKER_BUILDKIT="+string(by), "BUILDKIT_PROGRESS=plain")
	return cmd
}

// build runs a buildCommand and returns what was printed.
func (d *dockers) build(by builder, text string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience())
	defer cancel()
	out, err := d.buildCommand(ctx, by, text, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%v build: %w\n%s", by, err, out)
	}
	return string(out), nil
}

// built is a build that must pass, with nothing of it by the uplink.
func (d *dockers) built(by builder, text string, args ...string) {
	d.t.Helper()
	if _, err := d.build(by, text, args...); err != nil {
		d.t.Errorf("%v\nrouter: %d packets by the uplink; gate drops %d", err, d.leaks.Packets(), d.status().Counters.GateDropsTotal)
	}
	d.noLeak(by.String())
}

// forget removes all images, so that the next build pulls them.
func (d *dockers) forget() {
	d.t.Helper()
	d.docker("image", "prune", "-af")
	if ids := d.docker("images", "-aq"); ids != "" {
		d.docker(append([]string{"rmi", "-f"}, strings.Fields(ids)...)...)
	}
}

// configDocker is a configuration that selects of docker what mode says.
func (d *dockers) configDocker(mode, more string) string {
	return strings.Replace(d.config(more), "[select]", "[select]\ndocker = "+mode, 1)
}

// kill9 kills the daemon with its containerd, as the end of the service would. Its
// containers live on.
func (d *dockers) kill9() {
	d.t.Helper()
	text, err := os.ReadFile(d.state + "/exec/containerd/containerd.pid")
	var pid int
	if _, errPid := fmt.Sscan(string(text), &pid); err != nil || errPid != nil || pid < 2 {
		d.t.Fatalf("pid of containerd: %q, %v", text, err)
	}
	d.daemon.Signal(syscall.SIGKILL)
	_ = d.daemon.Wait()
	_ = syscall.Kill(pid, syscall.SIGKILL)
	labtest.Eventually(d.t, 10*time.Second, func() bool { return syscall.Kill(pid, 0) != nil }, "containerd has ended")
}
