package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// packages are Debian's of a docker daemon, with the libraries that a small system
// lacks. They are unpacked into unpacked, not installed.
var packages = []string{"docker.io", "containerd", "runc", "libdevmapper1.02.1", "libseccomp2"}

const unpacked = "build/docker"

// daemonScript becomes a docker daemon that has nothing in common with one that
// the machine may have: neither network nor cgroup, data, socket nor
// configuration, nor its containerd. $0 is its directory, $1 its cgroup.
const daemonScript = `set -e
mount --make-rprivate /
for d in /run/containerd /run/docker; do [ ! -d $d ] || mount -t tmpfs none $d; done
mkdir $0/cgroup; mount -t cgroup2 none $0/cgroup
mkdir -p $0/cgroup/$1/dockerd
echo $$ >$0/cgroup/$1/cgroup.procs
exec unshare --cgroup sh -c '
	umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
	echo $$ >/sys/fs/cgroup/dockerd/cgroup.procs
	exec dockerd --config-file $0/daemon.json --data-root $0/data --exec-root $0/exec --pidfile $0/pid -H unix://$0/sock \
		--exec-opt native.cgroupdriver=cgroupfs -l error' $0`

// cgroupScript removes what the daemon's cgroup holds, and it.
const cgroupScript = `mount --make-rprivate /; mount -t cgroup2 none $0 && [ ! -d $0/$1 ] || find $0/$1 -depth -type d -exec rmdir {} +`

// dockerfile has the daemon fetch, and a step. Its image is a static busybox.
const dockerfile = `FROM busybox
ADD http://` + host + `/file /file
RUN printf 'GET /file HTTP/1.0\r\n\r\n' | nc ` + web4 + ` 80 | wc -c
`

// docker shows a build, with a daemon of its own. Where there can be none it says
// why.
func (l *lab) docker(ctx context.Context) error {
	fmt.Printf("\n5. docker build, with a daemon of the demo's own in namespace machine\n")
	if err := haveDocker(ctx); err != nil {
		fmt.Println("   skipped:", err)
		return nil
	}
	dir := filepath.Join(l.dir, "docker")
	for name, text := range map[string]string{"daemon.json": "{}", "build/Dockerfile": dockerfile} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	cgroup := fmt.Sprintf("cgtun-demo-%d", os.Getpid())
	l.onClose(func() error {
		_, err := run(context.Background(), "unshare", "--mount", "sh", "-c", cgroupScript, filepath.Join(dir, "cgroup"), cgroup)
		return err
	})
	daemon, err := l.start("ip", "netns", "exec", l.machine, "unshare", "--mount", "sh", "-c", daemonScript, dir, cgroup)
	if err != nil {
		return err
	}
	docker := func(args ...string) []string {
		return append([]string{"docker", "-H", "unix://" + dir + "/sock"}, args...)
	}
	err = until(ctx, 30*time.Second, func() error {
		if daemon.ended() {
			return errors.New("dockerd has ended")
		}
		_, err := run(ctx, "docker", docker("version")[1:]...)
		return err
	})
	if err != nil {
		return fmt.Errorf("start dockerd: %w; it says:\n%s", err, daemon.output())
	}
	image := `mkdir -p $0/image/bin && cp "$(command -v busybox)" $0/image/bin && for a in sh nc wc printf; do ln -s busybox $0/image/bin/$a; done &&
		tar -C $0/image -c . | docker -H unix://$0/sock import - busybox`
	if _, err := run(ctx, "sh", "-c", image, dir); err != nil {
		return err
	}
	for line := range strings.Lines(dockerfile) {
		fmt.Print("     ", line)
	}
	return l.build5(ctx, docker("build", "--no-cache", dir+"/build"))
}

// build5 builds with a report, and looks whether anything of it was routed out by
// the uplink.
func (l *lab) build5(ctx context.Context, build []string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	before, err := l.counter(ctx, "routed")
	if err != nil {
		return err
	}
	fmt.Println("   $ cgtun report -- docker build .")
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", l.machine, binary, "-c", config, "report", "--"}, build...)...)
	var out, told strings.Builder
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &told, time.Second
	cmd.Env = append(environment(nil), "HOME="+l.dir)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("docker build: %w: %s%s", err, out.String(), told.String())
	}
	_, report, _ := strings.Cut(told.String(), "from ")
	for line := range strings.Lines("from " + report) {
		if strings.TrimSpace(line) != "" {
			fmt.Print("     ", line)
		}
	}
	after, err := l.counter(ctx, "routed")
	if err != nil {
		return err
	}
	fmt.Printf("   packets of containers that the machine routed out by the uplink: %d\n", after-before)
	if after != before || !strings.Contains(report, host) || !strings.Contains(report, web4) {
		return fmt.Errorf("all of the build should have gone into tuns, and the report have %s and %s:\n%s", host, web4, told.String())
	}
	return nil
}

// haveDocker finds a docker daemon's programs, or unpacks them below the current
// directory.
func haveDocker(ctx context.Context) error {
	found := func() (missing error) {
		for _, name := range []string{"dockerd", "docker", "containerd", "runc", "iptables"} {
			_, err := exec.LookPath(name)
			missing = errors.Join(missing, err)
		}
		return missing
	}
	if found() == nil {
		return nil
	}
	root, err := filepath.Abs(unpacked)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(root, "usr/sbin/dockerd")); err != nil {
		if err := unpack(ctx, root); err != nil {
			return fmt.Errorf("there is no dockerd here, and Debian's is not to be had: %w", err)
		}
	}
	libs, _ := filepath.Glob(filepath.Join(root, "*", "lib", "*-linux-gnu"))
	more, _ := filepath.Glob(filepath.Join(root, "lib", "*-linux-gnu"))
	if err := errors.Join(
		os.Setenv("PATH", filepath.Join(root, "usr/sbin")+":"+filepath.Join(root, "usr/bin")+":"+os.Getenv("PATH")),
		os.Setenv("LD_LIBRARY_PATH", strings.Join(append(libs, more...), ":")),
	); err != nil {
		return err
	}
	return found()
}

// unpack fetches the packages and unpacks them.
func unpack(ctx context.Context, root string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "download"}, packages...)...)
	cmd.Dir = root
	if _, err := runCommand(cmd); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(root, "*.deb"))
	for _, deb := range debs {
		if _, err := run(ctx, "dpkg", "-x", deb, root); err != nil {
			return err
		}
	}
	return nil
}
