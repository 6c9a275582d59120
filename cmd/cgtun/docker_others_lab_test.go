package main_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cgtun/internal/labtest"
)

// machinesPrograms are the arguments of docker run that lend a container the
// machine's programs.
var machinesPrograms = []string{"-v", "/usr:/usr:ro", "-v", "/usr/lib:/lib:ro", "-v", "/usr/lib64:/lib64:ro", "-v", "/etc/alternatives:/etc/alternatives:ro"}

// privileged are those that lend it all that there is. It is what --privileged says,
// which fails where a single capability is missing on the whole machine.
var privileged = []string{"--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE", "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined", "--security-opt", "systempaths=unconfined"}

// testNested: docker in docker, as in many a CI: a daemon in a privileged container.
// All that it does is captured as its container is.
func (d *dockers) testNested() {
	d.docker(slices.Concat([]string{"run", "-d", "--name", "dind", "-v", d.state + "/dind:/var/lib/docker", "-v", d.images + ":/images:ro"}, privileged, machinesPrograms,
		[]string{registry + "/base", "/usr/bin/busybox", "sh", "-c", `mount -o remount,rw /sys/fs/cgroup && mount -o remount,rw /proc/sys; mkdir -p /sys/fs/cgroup/init /run && echo $$ >/sys/fs/cgroup/init/cgroup.procs &&
		exec /usr/sbin/dockerd -l error --exec-opt native.cgroupdriver=cgroupfs --insecure-registry http://` + registry + ` --insecure-registry ` + registry})...)
	defer d.docker("rm", "-f", "-v", "dind")
	inside := func(args ...string) (string, error) {
		return d.try(append([]string{"exec", "-e", "HOME=/tmp", "dind"}, args...)...)
	}
	labtest.Eventually(d.t, 30*time.Second, func() bool {
		_, err := inside("/usr/bin/docker", "version")
		return err == nil
	}, "dockerd in a container answers: %s", logged{func() string { return d.docker("logs", "dind") }})
	dir := d.dockerfile(fmt.Sprintf("FROM %s/base\nRUN cat /proc/self/cgroup; curl -sSf http://mirror.lab/file | cmp - /file && demo fetch http://mirror.lab/file | cmp - /file && ping -c1 %[2]s\nRUN [\"/bin/first\", %[2]q, \"7000\"]\n", registry, far4))
	for _, by := range []builder{classic, buildKit} {
		_, err := inside("/usr/bin/env", "DOCKER_BUILDKIT="+string(by), "BUILDKIT_PROGRESS=plain", "/usr/bin/docker", "build", "--no-cache", strings.Replace(dir, d.images, "/images", 1))
		if err != nil {
			d.t.Errorf("%v, in a container: %v", by, err)
		}
		d.noLeak("docker in docker, " + by.String())
	}
}

// logged is said when it is printed.
type logged struct{ say func() string }

func (l logged) String() string { return l.say() }

// testManyBuilds: eight at once, of several stages, of both builders; and on a
// network of a user's own, which BuildKit refuses by itself.
func (d *dockers) testManyBuilds() {
	builds := make(chan error, 8)
	for i := range cap(builds) {
		by := []builder{classic, buildKit}[i%2]
		text := fmt.Sprintf(`FROM %[1]s/base AS fetch
RUN first %[2]s 7000 && curl -sSf http://mirror.lab/file -o /tmp/f%[3]d
FROM %[1]s/base
COPY --from=fetch /tmp/f%[3]d /tmp/f
RUN first %[2]s 7000 && wget -qO- http://mirror.lab/file | cmp - /tmp/f
`, registry, far4, i)
		go func() {
			_, err := d.build(by, text, "-t", fmt.Sprintf("many%d", i))
			builds <- err
		}()
	}
	for range cap(builds) {
		if err := <-builds; err != nil {
			d.t.Error(err)
		}
	}
	d.noLeak("eight builds at once")
	if out, err := d.build(buildKit, "FROM "+registry+"/base\nRUN true\n", "--network=own"); err == nil || !strings.Contains(out, "not supported") {
		d.t.Errorf("BuildKit on a network of a user's own: %v\n%s", err, out)
	}
}

// testParent: with a --cgroup-parent of its own what a build makes is selected by
// that name.
func (d *dockers) testParent() {
	d.built(classic, fmt.Sprintf("FROM %s/base\nRUN [\"/bin/first\", %q, \"7000\"]\n", registry, far4), "--cgroup-parent=/ci")
	d.docker("run", "--rm", "--cgroup-parent=/ci/deep", registry+"/base", "first", far4, "7000")
	d.noLeak("a parent")
}

// testHealth: what the daemon runs in a container to see whether it is well.
func (d *dockers) testHealth() {
	id := d.docker("run", "-d", "--health-cmd", "curl -sSf http://mirror.lab/file | cmp - /file", "--health-interval", "100ms", "--health-retries", "3", registry+"/base", "sleep", "600")
	defer d.docker("rm", "-f", id)
	labtest.Eventually(d.t, 20*time.Second, func() bool {
		switch state := d.docker("inspect", "-f", "{{.State.Health.Status}}", id); state {
		case "unhealthy":
			d.t.Fatal(d.docker("inspect", "-f", "{{json .State.Health}}", id))
			return false
		default:
			return state == "healthy"
		}
	}, "it is healthy")
	d.noLeak("a healthcheck")
}

// testCompose: a project of docker-compose: images are built and pulled, services
// reach each other by name, and far ones by the configured way.
func (d *dockers) testCompose() {
	labtest.Need(d.t, labtest.Tool("docker-compose"))
	dir := d.dockerfile("FROM " + registry + "/base\nRUN curl -sSf http://mirror.lab/file | cmp - /file && cp /file /built\n")
	d.file(filepath.Join(dir, "docker-compose.yml"), `version: "3"
services:
  web:
    build: .
    command: ["sh", "-c", "printf 'HTTP/1.0 200 OK\\r\\nContent-Length: 3\\r\\n\\r\\nweb' >/tmp/a; while :; do nc -l -p 80 </tmp/a; done"]
  user:
    image: `+registry+`/base
    depends_on: [web]
    command: ["sh", "-c", "until curl -sSf -m2 http://web/ | grep web; do sleep 0.1; done; curl -sSf http://mirror.lab/file | cmp - /file && first `+far4+` 7000 && echo all well"]
`)
	compose := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd := d.client(ctx, outside)
		cmd.Args = append(cmd.Args[:len(cmd.Args)-3], append([]string{"docker-compose", "--ansi", "never", "-p", "lab", "-f", filepath.Join(dir, "docker-compose.yml")}, args...)...)
		cmd.Env = append(cmd.Env, "DOCKER_HOST=unix://"+d.state+"/sock", "COMPOSE_DOCKER_CLI_BUILD=0")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	defer func() {
		if out, err := compose("down", "-t", "0", "--remove-orphans"); err != nil {
			d.t.Errorf("docker-compose down: %v: %s", err, out)
		}
	}()
	if out, err := compose("up", "--build", "-d", "web"); err != nil {
		d.t.Fatalf("docker-compose up: %v: %s", err, out)
	}
	d.shown(d.docker("ps", "-q", "--no-trunc", "--filter", "label=com.docker.compose.service=web"))
	out, err := compose("up", "--exit-code-from", "user", "-t", "0")
	if err != nil || !strings.Contains(out, "all well") {
		d.t.Errorf("docker-compose up: %v: %s", err, out)
	}
	d.noLeak("compose")
}
