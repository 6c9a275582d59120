package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
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
	daemon *labtest.Docker
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
	t.Cleanup(func() { d.t, d.world.t = t, t; d.daemon.End() })
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
	d.server.ServeRegistry(far4+":5000", d.dir)
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
	programs := []string{"curl", "wget", "git", "dirmngr"}
	parts, _ := filepath.Glob(strings.TrimSpace(d.machine.Run("git", "--exec-path")) + "/git-*")
	for _, p := range parts {
		if name := filepath.Base(p); name == "git-remote-http" || name == "git-upload-pack" {
			programs = append(programs, p)
		}
	}
	tree := filepath.Join(d.images, "tree")
	d.lab.MakeImage(tree, programs...)
	if out, err := exec.Command("gcc", "-O1", "-static", "-o", filepath.Join(tree, "bin/first"), "testdata/docker/first.c").CombinedOutput(); err != nil {
		d.t.Fatalf("make an image: %v: %s", err, out)
	}
	if err := os.Mkdir(filepath.Join(tree, "gnupg"), 0o700); err != nil {
		d.t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(tree, "bin/demo"), "cgtun/internal/demo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		d.t.Fatalf("build the demo: %v: %s", err, out)
	}
}

// startDaemon starts dockerd as a service of the lab's cgroup "host".
func (d *dockers) startDaemon(args ...string) {
	d.t.Helper()
	d.daemon = d.lab.StartDocker(d.machine, d.host, d.state, append([]string{"--insecure-registry", "http://" + registry, "--insecure-registry", registry,
		"--insecure-registry", "10.1.0.2:5001", "--insecure-registry", "172.17.0.0/16"}, args...)...)
}

// client is a command of docker in the machine, with the daemon's mounts. at says
// where it runs: what it asks itself is captured by "cgtun run" alone.
func (d *dockers) client(ctx context.Context, at where, args ...string) *exec.Cmd {
	args = d.daemon.Docker(args...)
	if at == moved {
		args = append([]string{d.program(), "-s", d.socket, "run", "--"}, args...)
	}
	return d.daemon.In(ctx, args...)
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
