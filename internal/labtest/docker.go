package labtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Docker is a docker daemon of a lab's own, in one of its namespaces.
type Docker struct {
	*Proc
	Dir string // its data, its socket; resolv.conf is what its namespace of mounts resolves by

	host *Host
}

// OwnMounts has a shell see pure cgroup2, and the resolv.conf of the directory
// $0.
const OwnMounts = `set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
mount --bind $0/resolv.conf /etc/resolv.conf`

// StartDocker starts dockerd in h, with its data in dir, which has a resolv.conf and
// a short name: sockets lie below it.
// Its cgroup namespace has root as its root; it is itself in the child
// "dockerd.service" of it, which is there, and its containers are in others.
func (l *Lab) StartDocker(h *Host, root *Cgroup, dir string, args ...string) *Docker {
	l.t.Helper()
	script := OwnMounts + `
echo $$ >/sys/fs/cgroup/dockerd.service/cgroup.procs
exec dockerd --data-root $0/data --exec-root $0/exec --pidfile $0/pid -H unix://$0/sock --exec-opt native.cgroupdriver=cgroupfs --raw-logs -l error "$@"`
	cmd := exec.CommandContext(context.Background(), "nsenter",
		append([]string{"--net=" + h.Path, "--", "unshare", "--mount", "--cgroup", "sh", "-c", script, dir}, args...)...)
	d := &Docker{Proc: l.StartCommand(root.Command(cmd)), Dir: dir, host: h}
	Eventually(l.t, 30*time.Second, func() bool {
		if d.Exited() {
			l.t.Fatalf("dockerd ended:\n%s", d.Output())
		}
		_, err := d.Try("version")
		return err == nil
	}, "dockerd answers")
	return d
}

// In returns a command in the daemon's namespaces of network and mounts.
func (d *Docker) In(ctx context.Context, args ...string) *exec.Cmd {
	cmd := d.host.Command(ctx, "nsenter", append([]string{"--mount=" + fmt.Sprintf("/proc/%d/ns/mnt", d.Pid), "--"}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+d.Dir, "DOCKER_BUILDKIT=0")
	return cmd
}

// Docker is the command that asks the daemon, for In.
func (d *Docker) Docker(args ...string) []string {
	return append([]string{"/usr/bin/docker", "-H", "unix://" + d.Dir + "/sock"}, args...)
}

// Try asks the daemon, for a minute at most, and returns what was printed.
func (d *Docker) Try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := d.In(ctx, d.Docker(args...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), err
}

// End ends the daemon with all that it started. It is to be called before the lab
// ends.
func (d *Docker) End() {
	d.t.Helper()
	if d.Exited() {
		return
	}
	if out, err := d.Try("ps", "-aq"); err == nil && out != "" {
		_, _ = d.Try(append([]string{"rm", "-f"}, strings.Fields(out)...)...)
	}
	if took, err := d.Stop(); err != nil {
		d.t.Logf("dockerd ended after %v with %v", took, err)
	}
}

// Kill kills the daemon with its containerd, as the end of the service would. Its
// containers live on.
func (d *Docker) Kill() {
	d.t.Helper()
	text, err := os.ReadFile(d.Dir + "/exec/containerd/containerd.pid")
	var pid int
	if _, errPid := fmt.Sscan(string(text), &pid); err != nil || errPid != nil || pid < 2 {
		d.t.Fatalf("pid of containerd: %q, %v", text, err)
	}
	d.Signal(syscall.SIGKILL)
	_ = d.Wait()
	_ = syscall.Kill(pid, syscall.SIGKILL)
	Eventually(d.t, 10*time.Second, func() bool { return syscall.Kill(pid, 0) != nil }, "containerd has ended")
}

// ServeRegistry serves a registry of images at a literal address, with its data in
// dir.
func (h *Host) ServeRegistry(addr, dir string) {
	h.lab.t.Helper()
	conf := filepath.Join(dir, "registry.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage:\n  filesystem: {rootdirectory: %s}\nhttp: {addr: %q}\n", filepath.Join(dir, "registry"), addr)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		h.lab.t.Fatal(err)
	}
	h.Start("docker-registry", "serve", conf)
	Eventually(h.lab.t, 20*time.Second, func() bool {
		c, err := h.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	}, "the registry listens")
}

// MakeImage makes in dir the root file system of an image, of busybox and the
// programs of this machine that are named, with what they need.
func (l *Lab) MakeImage(dir string, programs ...string) {
	l.t.Helper()
	script := `set -e
root=$0; mkdir -p $root/bin $root/etc $root/tmp $root/usr/bin
cp "$(command -v busybox)" $root/bin/busybox
for a in sh cat sleep echo ip ping nc sha256sum grep head ls cmp test; do ln -s busybox $root/bin/$a; done
` + ImageNeeds + `
for p; do need "$(command -v "$p")"; done
for l in $(ldconfig -p | sed -n 's/.*=> \(.*libnss_\(files\|dns\)\.so\.2\)$/\1/p; s/.*=> \(.*libresolv\.so\.2\)$/\1/p'); do need "$l"; done
printf 'root:x:0:0:root:/:/bin/sh\n' >$root/etc/passwd; printf 'hosts: files dns\n' >$root/etc/nsswitch.conf`
	if out, err := exec.Command("sh", append([]string{"-c", script, dir}, programs...)...).CombinedOutput(); err != nil {
		l.t.Fatalf("make an image: %v: %s", err, out)
	}
}

// ImageNeeds defines the function "need" of a shell: it copies a program, or a
// library that is loaded by name, to the same place below $root, with the
// libraries that it needs.
const ImageNeeds = `need() {
	mkdir -p "$root$(dirname "$1")"; cp -L "$1" "$root$1"
	{ ldd "$1" 2>/dev/null || true; } | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\).*/\1/p' |
	while read -r lib; do [ -e "$root$lib" ] || { mkdir -p "$root$(dirname "$lib")"; cp -L "$lib" "$root$lib"; }; done
}`
