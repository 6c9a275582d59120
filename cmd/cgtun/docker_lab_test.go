package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/control"
	"cgtun/internal/labtest"
	"cgtun/report"
)

// steps is a Dockerfile with a program of each of the four kinds (a proxy by its
// own file alone, by HTTPS_PROXY and its kin, by socks_proxy alone, not at all),
// none of them changed or told of a proxy, and some more.
func steps() string {
	return fmt.Sprintf(`FROM %[1]s/base
RUN echo "KS_FETCH http://mirror.lab/file" | dirmngr --homedir /gnupg --server | grep -c xxx
RUN curl -sSf http://mirror.lab/file | cmp - /file
RUN demo fetch http://mirror.lab/file | cmp - /file
RUN printf 'GET /file HTTP/1.0\r\n\r\n' | nc %[2]s 80 | grep -c xxx
RUN wget -qO- http://mirror.lab/file | cmp - /file && git clone -q http://mirror.lab/repo.git /tmp/clone && ping -c1 %[2]s
FROM %[1]s/base
COPY --from=0 /tmp/clone /clone
`, registry, far4)
}

// seed pushes the image that all builds begin from, by the configured way.
func (d *dockers) seed() {
	d.t.Helper()
	if out, err := exec.Command("tar", "-C", d.images+"/tree", "-cf", d.images+"/tree.tar", ".").CombinedOutput(); err != nil {
		d.t.Fatalf("%v: %s", err, out)
	}
	d.docker("import", d.images+"/tree.tar", "plain")
	d.built(classic, "FROM plain\nADD http://"+far4+"/file /file\n", "-t", registry+"/base")
	// The client looks the registry's name up itself.
	if _, err := d.tryAt(moved, "push", "-q", registry+"/base"); err != nil {
		d.t.Fatal(err)
	}
	d.noLeak("push")
}

// What a build fetches, whatever its builder and network: layers, and what the
// programs of its steps want. All of it goes the configured way, and without
// cgtun none of it arrives. The tests of docker share one daemon, as it is dear.
func TestDocker(t *testing.T) {
	t.Parallel()
	d := newDockers(t)
	if _, err := d.try("pull", far4+":5000/base"); err == nil {
		t.Fatal("a pull passes without cgtun")
	}
	d.leaks.Reset()
	// What is for other containers would go to them, and not by eth1 to nobody.
	running := d.start(strings.Replace(d.configDocker("true", "[[rule]]\ncidr = \"172.16.0.0/12\"\nuse = \"direct\"\n"+second), "cgroups = [", fmt.Sprintf("cgroups = [%q, ", d.host.Path+"/ci"), 1))
	d.seed()
	d.docker("network", "create", "own")
	parts := []part{
		{"builds", d.testBuilds},
		{"first acts", d.testFirstActs},
		{"status", d.testStatus},
		{"gains nothing", d.testGainsNothing},
		{"offline", d.testOffline},
		{"as before", d.testAsBefore},
		{"nested", d.testNested},
		{"many builds", d.testManyBuilds},
		{"parent", d.testParent},
		{"health", d.testHealth},
		{"compose", d.testCompose},
		{"mirrors", d.testMirrors},
		{"restart", d.testRestart},
	}
	if testing.Short() {
		parts = parts[:3]
	}
	if !d.testParts(parts) {
		return
	}
	d.noGateDrop("all of it")
	for line := range strings.Lines(running.Output()) {
		if strings.Contains(line, "level=ERROR") {
			t.Errorf("cgtun said: %s", line)
		}
	}
	if testing.Short() {
		return
	}
	d.testParts([]part{{"killed", func() { d.testKilled(running) }}})
	if !running.Exited() {
		running.stop()
	}
	// Each of these starts its own.
	parts = []part{
		{"killed in a step", func() { d.testKilledInAStep("open", classic) }},
		{"closed and killed in a step", func() { d.testKilledInAStep("closed", buildKit) }},
		{"builds alone", d.testBuildsAlone},
		{"reaches", d.testReaches},
		{"lives", d.testLives},
		{"churn", d.testChurn},
		{"inside", d.testInside},
	}
	if labtest.Soak() {
		parts = append(parts, part{"cost", d.testCost})
	}
	d.testParts(parts)
}

// part is one of those of TestDocker.
type part struct {
	name string
	test func()
}

// testParts runs what -run selects of some, until one fails.
func (d *dockers) testParts(parts []part) bool {
	for _, tt := range parts {
		t := d.t
		ok := t.Run(tt.name, func(t *testing.T) {
			d.t, d.world.t = t, t
			tt.test()
		})
		d.t, d.world.t = t, t
		if !ok {
			return false
		}
	}
	return true
}

// testBuildsAlone: with "builds" the steps of BuildKit are captured, and what else
// runs is not.
func (d *dockers) testBuildsAlone() {
	c := d.start(d.configDocker(`"builds"`, second))
	d.doctorSays(`"builds"`, "the steps of BuildKit are captured", "cannot be told from any container")
	d.built(buildKit, fmt.Sprintf("FROM %s/base\nRUN [\"/bin/first\", %q, \"7000\"]\n", registry, far4))
	if out, err := d.try("run", "--rm", registry+"/base", "ping", "-c1", "-W1", far4); err == nil {
		d.t.Errorf("a container is captured: %s", out)
	}
	if d.leaks.Packets() == 0 {
		d.t.Error("nothing of a container went the ordinary way")
	}
	c.stop()
}

func (d *dockers) testBuilds() {
	d.forget()
	d.built(classic, steps())
	d.forget()
	d.built(buildKit, steps())
	short := fmt.Sprintf("FROM %s/base\nRUN curl -sSf http://mirror.lab/file | cmp - /file && demo fetch http://mirror.lab/file | cmp - /file && ping -c1 %s\n", registry, far4)
	d.built(classic, short, "--network=own")
	for _, by := range []builder{classic, buildKit} {
		d.built(by, short, "--network=host")
	}
}

// testFirstActs: steps whose first act is to send, of several builds at once, one of
// them on a network of one's own, on a machine whose processors are busy.
func (d *dockers) testFirstActs() {
	n, rounds := 10, 1
	switch {
	case labtest.Soak():
		n, rounds = 63, 2 // an image has at most 125 layers
	case testing.Short():
		n = 3
	}
	for range runtime.NumCPU() {
		loop := d.lab.StartCommand(exec.Command("sh", "-c", "while :; do :; done"))
		defer func() { loop.Signal(syscall.SIGKILL); _ = loop.Wait() }()
	}
	text := "FROM " + registry + "/base\n" + strings.Repeat(fmt.Sprintf("RUN [\"/bin/first\", %q, \"7000\"]\n", far4), n)
	for range rounds {
		builds := make(chan error, 4)
		for i := range cap(builds) {
			go func() {
				network := "default"
				if i == 2 { // where dockerd opens sockets, too
					network = "own"
				}
				_, err := d.build([]builder{classic, buildKit}[i%2], text, "-t", fmt.Sprintf("first%d", i), "--network="+network)
				builds <- err
			}()
		}
		for range cap(builds) {
			if err := <-builds; err != nil {
				d.t.Error(err)
			}
		}
	}
	load, _ := os.ReadFile("/proc/loadavg")
	d.t.Logf("%d steps; load average %s", 4*n*rounds, load)
	d.noLeak("first acts")
	d.noGateDrop("first acts")
	labtest.Eventually(d.t, 20*time.Second, func() bool { return len(d.attachments()) == 0 }, "all attachments have ended")
}

// noGateDrop: what the gate drops is a failure of a step, sooner or later.
func (d *dockers) noGateDrop(what string) {
	d.t.Helper()
	if n := d.status().Counters.GateDropsTotal; n != 0 {
		d.t.Errorf("%s: the gate dropped %d packets", what, n)
	}
}

// doctorSays: doctor tells what of the daemon is captured, and what is not.
func (d *dockers) doctorSays(mode string, want ...string) {
	d.t.Helper()
	out, errs, _ := d.cgtun("doctor", "-c", d.write(d.configDocker(mode, second)))
	for _, w := range want {
		if !strings.Contains(out, w) {
			d.t.Errorf("doctor, docker = %s, does not say %q:\n%s%s", mode, w, out, errs)
		}
	}
}

// shown waits until a container has an attachment with its digits.
func (d *dockers) shown(id string) {
	d.t.Helper()
	labtest.Eventually(d.t, 20*time.Second, func() bool { a := d.container(id); return a != nil && a.State == attach.StateUp }, "container %.12s is attached", id)
}

// container finds the attachment of a container.
func (d *dockers) container(id string) *control.Attachment {
	d.t.Helper()
	list := d.attachments()
	i := slices.IndexFunc(list, func(a control.Attachment) bool { return a.ID == id[:12] && string(a.Container) == id[:12] })
	if i < 0 {
		return nil
	}
	return &list[i]
}

// testStatus: status has containers and the daemon, and report what a build fetched.
func (d *dockers) testStatus() {
	sum := ask[report.Report](d.world, "report")
	told := false
	for _, u := range sum.Units {
		for _, h := range u.Hosts {
			step := u.Cgroup != nil && strings.HasPrefix(*u.Cgroup, d.host.Path+"/docker/")
			told = told || step && h.Paths["second"] > 0 && (h.Host == far4 || strings.HasSuffix(h.Host, ".lab"))
		}
	}
	if !told {
		d.t.Errorf("the report has no step with its host: %+v", sum)
	}
	id := d.docker("run", "-d", registry+"/base", "sleep", "60")
	labtest.Eventually(d.t, 10*time.Second, func() bool {
		a := d.container(id)
		return a != nil && a.State == attach.StateUp && a.V4 && !a.V6
	}, "container %.12s is attached", id)
	s := d.status()
	if len(s.Docker) != 1 || s.Docker[0].Version == "" || s.Docker[0].Selects != "all" || s.Docker[0].Cgroup != d.host.Path+"/dockerd.service" || !s.Docker[0].Running {
		d.t.Errorf("status has %+v", s.Docker)
	}
	if s.State != control.Ready {
		d.t.Errorf("it is %s", s.State)
	}
	d.doctorSays("true", "its pulls and all its containers are captured", "cgtun run -- docker build")
	d.docker("rm", "-f", id)
	labtest.Eventually(d.t, 20*time.Second, func() bool { return d.container(id) == nil }, "it has gone")
	// A step of BuildKit is no container, and is known by the id in its cgroup's name.
	cmd := d.buildCommand(context.Background(), buildKit, "FROM "+registry+"/base\nRUN sleep 2\n")
	step := d.lab.StartCommand(cmd)
	labtest.Eventually(d.t, 20*time.Second, func() bool {
		return slices.ContainsFunc(d.attachments(), func(a control.Attachment) bool {
			found, _ := filepath.Glob(filepath.Join(d.host.Dir, "docker/buildkit", string(a.Container)+"*"))
			return len(a.Container) == 12 && strings.HasPrefix(a.ID, "netns-") && len(found) == 1
		})
	}, "the step is shown with its id")
	if err := step.Wait(); err != nil {
		d.t.Errorf("a step that sleeps: %v: %s", err, step.Output())
	}
}

// testGainsNothing: a container of one network reaches none of another, which docker
// keeps apart where it forwards, and cgtun would dial from home.
func (d *dockers) testGainsNothing() {
	other := d.docker("run", "-d", "--network=own", registry+"/base", "sleep", "60")
	ip := d.docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", other)
	d.machine.Run("ping", "-c1", "-W5", ip) // it is there, for home
	before := d.status().Counters.TurnedAwayTotal["policy"]
	if out, err := d.try("run", "--rm", registry+"/base", "ping", "-c1", "-W2", ip); err == nil {
		d.t.Errorf("a container of another network is reached: %s", out)
	}
	if n := d.status().Counters.TurnedAwayTotal["policy"]; n == before {
		d.t.Error("nothing was denied")
	}
	d.docker("rm", "-f", other)
}

// testOffline: containers without a way out get none.
func (d *dockers) testOffline() {
	d.docker("network", "create", "--internal", "inside")
	for _, network := range []string{"none", "inside"} {
		out, err := d.try("run", "--rm", "--network="+network, registry+"/base", "sh", "-c", "ip link; ping -c1 -W1 "+far4)
		if err == nil || strings.Contains(out, "tun") {
			d.t.Errorf("network %s: %v: %s", network, err, out)
		}
		for _, by := range []builder{classic, buildKit} {
			if by == buildKit && network == "inside" {
				continue // it refuses networks of one's own
			}
			text := "FROM " + registry + "/base\nRUN ! ping -c1 -W1 " + far4 + "\n"
			d.built(by, text, "--network="+network)
		}
	}
}

// testAsBefore: what goes between containers, and what comes in.
func (d *dockers) testAsBefore() {
	web := "printf 'HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nweb' >/tmp/a; while :; do nc -l -p 80 </tmp/a; done"
	id := d.docker("run", "-d", "--name", "web", "--network", "own", "-p", "8080:80", registry+"/base", "sh", "-c", web)
	defer d.docker("rm", "-f", "web")
	d.shown(id)
	ask := func(what string, try func() (string, error)) {
		d.t.Helper()
		var out string
		var err error
		// The server of this image takes one at a time.
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if out, err = try(); err == nil && strings.Contains(out, "web") {
				return
			}
		}
		d.t.Errorf("%s: %q, %v", what, out, err)
	}
	ask("another container, by name", func() (string, error) {
		return d.try("run", "--rm", "--network", "own", registry+"/base", "curl", "-sS", "-m3", "http://web/")
	})
	address := d.docker("inspect", "-f", "{{.NetworkSettings.Networks.own.IPAddress}}", "web")
	ask("another container, by address", func() (string, error) {
		return d.try("run", "--rm", "--network", "own", registry+"/base", "curl", "-sS", "-m3", "http://"+address+"/")
	})
	ask("a published port, from far", func() (string, error) {
		return d.router.Try("curl", "-sS", "-m3", "http://10.1.0.2:8080/")
	})
	ask("a published port, from the machine", func() (string, error) {
		return d.machine.Try("curl", "-sS", "-m3", "http://127.0.0.1:8080/")
	})
	ask("exec", func() (string, error) { return d.try("exec", "web", "cat", "/tmp/a") })
	out, err := d.try("run", "--rm", "--network", "own", registry+"/base", "curl", "-sSf", "-o", "/dev/null", "-w", "%{http_code}", "http://mirror.lab/file")
	if err != nil || !strings.Contains(out, "200") {
		d.t.Errorf("a far name in a network of one's own: %v %s", err, out)
	}
	d.docker("exec", "web", "first", far4, "7000")
	d.testRegistryNearby()
	d.noLeak("as before")
}

// testRegistryNearby: a registry in a container of one's own, as many have it, is
// pushed to and pulled from on localhost, on the machine's address, on the bridge's
// and on the container's own, and none of it is cgtun's.
func (d *dockers) testRegistryNearby() {
	conf := filepath.Join(d.dir, "near.yml")
	d.file(conf, "version: 0.1\nlog: {level: error}\nstorage: {inmemory: {}}\nhttp: {addr: \":5001\"}\n")
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		d.t.Fatal(err)
	}
	d.docker("run", "-d", "--name", "registry", "-p", "5001:5001", "-v", program+":/bin/docker-registry:ro", "-v", conf+":/near.yml:ro",
		registry+"/base", "docker-registry", "serve", "/near.yml")
	defer d.docker("rm", "-f", "registry")
	d.file(filepath.Join(d.images, "tiny/file"), "tiny")
	if out, err := exec.Command("tar", "-C", d.images+"/tiny", "-cf", d.images+"/tiny.tar", ".").CombinedOutput(); err != nil {
		d.t.Fatalf("%v: %s", err, out)
	}
	d.docker("import", d.images+"/tiny.tar", "tiny")
	own := d.docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "registry")
	labtest.Eventually(d.t, 20*time.Second, func() bool {
		out, err := d.try("run", "--rm", registry+"/base", "curl", "-sS", "-m3", "-o", "/dev/null", "-w", "%{http_code}", "http://"+bridge+":5001/v2/")
		return err == nil && strings.Contains(out, "200")
	}, "a container reaches the registry by the bridge's address")
	before := d.flowsTo(5001)
	for _, host := range []string{"localhost", "10.1.0.2", bridge, own} {
		image := host + ":5001/tiny"
		d.docker("tag", "tiny", image)
		d.docker("push", "-q", image)
		d.docker("rmi", image)
		d.docker("pull", "-q", image)
		d.docker("rmi", image)
	}
	if n := d.flowsTo(5001); n != before {
		d.t.Errorf("%d flows to a registry nearby were cgtun's", n-before)
	}
}

// flowsOf counts the flows of a container.
func (d *dockers) flowsOf(id string) (n int) {
	d.t.Helper()
	for _, f := range d.flows() {
		if string(f.Attachment) == id[:12] {
			n++
		}
	}
	return n
}

// flowsTo counts cgtun's flows to a port.
func (d *dockers) flowsTo(port uint16) (n int) {
	d.t.Helper()
	for _, f := range d.flows() {
		if f.Dst.Port() == port {
			n++
		}
	}
	return n
}

// testRestart: another daemon in the place of one that was stopped or killed is
// captured from its first packet on.
func (d *dockers) testRestart() {
	for _, end := range []string{"stopped", "killed"} {
		var sends string // a container that lives on
		if end == "stopped" {
			d.daemon.End()
		} else {
			sends = d.docker("run", "-d", registry+"/base", "sh", "-c", "while first "+far4+" 7000; do sleep 0.1; done; sleep 600")
			d.daemon.Kill()
			n := d.flowsOf(sends)
			labtest.Eventually(d.t, 20*time.Second, func() bool { return d.flowsOf(sends) > n+2 }, "a step of it goes on, captured")
			d.noLeak("a step without its daemon")
		}
		labtest.Eventually(d.t, 10*time.Second, func() bool {
			s := d.status().Docker
			return len(s) > 0 && !s[0].Running
		}, "it is seen that it was "+end)
		var args []string
		if end == "stopped" {
			args = append(args, "--cgroup-parent=/ours")
		}
		d.startDaemon(args...)
		begin := time.Now()
		labtest.Eventually(d.t, 10*time.Second, func() bool {
			s := d.status().Docker
			return len(s) == 1 && s[0].Running && s[0].Version != ""
		}, "the next one is captured")
		if sends != "" {
			d.docker("rm", "-f", sends)
		}
		d.t.Logf("%s: shown with its version %v after its first answer", end, time.Since(begin))
		d.forget()
		for _, by := range []builder{classic, buildKit} {
			d.built(by, "FROM "+registry+"/base\nRUN [\"/bin/first\", \""+far4+"\", \"7000\"]\n")
		}
	}
}

// testKilledInAStep: the step hears at once that there is no way any more, and goes
// on with the next cgtun. With closed nothing of it goes the ordinary way.
func (d *dockers) testKilledInAStep(exit string, by builder) {
	config := strings.Replace(d.configDocker("true", second), "[route]", fmt.Sprintf("[route]\non_exit = %q", exit), 1)
	// What is said is not in the command, which is printed too.
	text := fmt.Sprintf(`FROM %s/base
RUN fetch() { curl -sS -m3 -o /dev/null http://%s/file 2>/tmp/said; }; say() { echo "step: $1 $(cat /tmp/said)"; }; \
	until fetch; do sleep 0.1; done; say fetched; \
	while fetch; do sleep 0.1; done; say failed; \
	until fetch; do sleep 0.1; done; say again
`, registry, far4)
	c := d.start(config)
	d.leaks.Reset()
	step := d.lab.StartCommand(d.buildCommand(context.Background(), by, text))
	step.WaitOutput("step: fetched", time.Minute)
	d.noLeak("before the kill")
	c.kill()
	step.WaitOutput("step: failed", time.Minute)
	if leaks := d.leaks.Packets(); (leaks > 0) != (exit == "open") {
		d.t.Errorf("%s: %d packets left by the uplink after the kill", exit, leaks)
	}
	next := d.start(config)
	d.leaks.Reset()
	step.WaitOutput("step: again", time.Minute)
	if err := step.Wait(); err != nil {
		d.t.Errorf("%s: the build ended with %v:\n%s", exit, err, step.Output())
	}
	d.noLeak("with the next one")
	labtest.Eventually(d.t, 20*time.Second, func() bool { return len(d.attachments()) == 0 }, "the step's attachment has ended")
	for line := range strings.Lines(step.Output()) {
		if strings.Contains(line, "step: failed") {
			d.t.Logf("%s, %v: %s", exit, by, strings.TrimSpace(line))
		}
	}
	next.stop()
	if out, errs, code := d.cgtun("cleanup"); code != 0 {
		d.t.Errorf("cleanup: %s%s", out, errs)
	}
}

// testKilled: what outlives cgtun, with on_exit open, goes on the ordinary way, and
// with the next cgtun the configured one.
func (d *dockers) testKilled(running *daemon) {
	id := d.docker("run", "-d", "--name", "outlives", registry+"/base", "sleep", "300")
	labtest.Eventually(d.t, 10*time.Second, func() bool { return d.container(id) != nil }, "it is attached")
	running.kill()
	if out, err := d.try("exec", "outlives", "first", far4, "7000"); err == nil {
		d.t.Errorf("without cgtun it arrives: %s", out)
	}
	if n := d.leaks.Packets(); n == 0 {
		d.t.Error("nothing went the ordinary way")
	}
	next := d.start(strings.Replace(d.configDocker("true", second), "[route]", "[route]\non_exit = \"closed\"", 1))
	d.leaks.Reset()
	d.docker("exec", "outlives", "first", far4, "7000")
	d.noLeak("with the next one")
	next.kill()
	if out, err := d.try("exec", "outlives", "first", far4, "7000"); err == nil {
		d.t.Errorf("closed and without cgtun it arrives: %s", out)
	}
	d.noLeak("closed")
	if out, errs, code := d.cgtun("cleanup"); code != 0 {
		d.t.Errorf("cleanup: %s%s", out, errs)
	}
	d.docker("rm", "-f", "outlives")
}
