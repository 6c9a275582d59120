package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// podmans is the world of dockers with podman and buildah in place of a daemon.
// They run in mounts and a cgroup namespace of their own, which a process keeps.
type podmans struct {
	*dockers
	user   *labtest.Cgroup // where they run, if not by "cgtun run"
	keeper *labtest.Proc
}

func newPodmans(t *testing.T) *podmans {
	t.Helper()
	d := newBuilders(t, "podman", "buildah", "/usr/lib/podman/netavark")
	p := &podmans{dockers: d, user: d.lab.Cgroup("host/user")}
	d.sel = d.lab.Cgroup("host/sel") // below the root of their cgroup namespace
	d.file(filepath.Join(d.state, "containers.conf"), `[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "/run/libpod"
[network]
network_backend = "netavark"
`)
	d.file(filepath.Join(d.state, "policy.json"), `{"default": [{"type": "insecureAcceptAnything"}]}`)
	d.file(filepath.Join(d.state, "registries.conf"), "[[registry]]\nlocation = \""+registry+"\"\ninsecure = true\n")
	script := labtest.OwnMounts + `
mount -t tmpfs none /run; mkdir /run/lock; mount -t tmpfs none /dev/shm
mount --bind $0/policy.json /etc/containers/policy.json
echo ready; exec sleep 1000000`
	cmd := exec.CommandContext(context.Background(), "nsenter", "--net="+d.machine.Path, "--", "unshare", "--mount", "--cgroup", "sh", "-c", script, d.state)
	p.keeper = d.lab.StartCommand(d.host.Command(cmd))
	p.keeper.WaitOutput("ready", 20*time.Second)
	return p
}

// podman runs podman, or buildah, as a user does: by "cgtun run" where at says so.
func (p *podmans) podman(at where, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	words := append([]string{name, "--root", p.state + "/lib", "--runroot", "/run/containers"}, args...)
	if at == moved {
		words = append([]string{p.program(), "-s", p.socket, "run", "--"}, words...)
	}
	of := fmt.Sprintf("/proc/%d/ns/", p.keeper.Pid)
	cmd := p.user.Command(p.machine.Command(ctx, "nsenter", append([]string{"--mount=" + of + "mnt", "--cgroup=" + of + "cgroup", "--"}, words...)...))
	cmd.Env = append(os.Environ(), "HOME="+p.state, "CONTAINERS_CONF="+p.state+"/containers.conf", "CONTAINERS_REGISTRIES_CONF="+p.state+"/registries.conf")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), err
}

// podman and buildah have no daemon: what they fetch themselves is captured by
// "cgtun run", and their steps by the names of the cgroups that they make.
func TestBuildsWithoutDocker(t *testing.T) {
	t.Parallel()
	p := newPodmans(t)
	ofSteps, ofContainers := p.host.Path+"/buildah-*", p.host.Path+"/libpod_parent/**"
	c := p.start(strings.Replace(p.configDocker("false", second), "cgroups = [", fmt.Sprintf("cgroups = [%q, %q, ", ofSteps, ofContainers), 1))
	defer c.stop()
	must := func(at where, name string, args ...string) string {
		t.Helper()
		out, err := p.podman(at, name, args...)
		if err != nil {
			t.Fatalf("%v\nrouter: %d packets by the uplink", err, p.leaks.Packets())
		}
		p.noLeak(name + " " + args[0])
		return out
	}
	if out, err := exec.Command("tar", "-C", p.images+"/tree", "-cf", p.images+"/tree.tar", ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	must(outside, "podman", "import", p.images+"/tree.tar", "localhost/plain")
	must(moved, "podman", "build", "-t", registry+"/base", p.dockerfile("FROM localhost/plain\nADD http://"+far4+"/file /file\n"))
	must(moved, "podman", "push", registry+"/base")
	short := fmt.Sprintf("FROM %s/base\nRUN curl -sSf http://mirror.lab/file | cmp - /file && demo fetch http://mirror.lab/file | cmp - /file && ping -c1 %[2]s\nRUN [\"/bin/first\", %[2]q, \"7000\"]\n", registry, far4)
	type build struct {
		name, text string
		args       []string
	}
	builds := []build{
		{"podman", steps(), []string{"build", "--no-cache"}},
		{"buildah", short, []string{"bud", "--no-cache"}},
		{"podman", short, []string{"build", "--no-cache", "--network=host"}},
		{"podman", short, []string{"build", "--no-cache", "--isolation=chroot"}},
	}
	if !labtest.Soak() {
		builds = builds[:2]
	} else if out, err := p.podman(outside, "podman", "pull", registry+"/base"); err == nil {
		t.Errorf("a pull passes without cgtun run: %s", out)
	}
	p.leaks.Reset()
	for _, b := range builds {
		must(outside, "podman", "rmi", "-af") // so that the layers are pulled
		must(moved, b.name, append(b.args, p.dockerfile(b.text))...)
	}
	// The steps alone are captured without "cgtun run".
	must(outside, "podman", "build", "--no-cache", p.dockerfile(short))
	// Where the machine has not what podman limits by itself.
	out := must(outside, "podman", "run", "-d", "--pids-limit=-1", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", registry+"/base", "sleep", "600")
	id := out[strings.LastIndexByte(out, '\n')+1:]
	p.shown(id)
	must(outside, "podman", "exec", id, "first", far4, "7000")
	must(outside, "podman", "rm", "-f", "-t", "0", id)
}
