package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
)

// probing are the arguments of docker run for a container in which probes can run.
func probing() []string {
	self, _ := os.Executable()
	return append(slices.Clone(machinesPrograms), "-v", filepath.Dir(self)+":"+filepath.Dir(self)+":ro")
}

// testReaches: what a container reaches with cgtun, by every outbound, is what it
// reaches without: nothing of the machine's own, and of other networks nothing. No
// cgtun runs when it begins.
func (d *dockers) testReaches() {
	for _, a := range []string{"127.0.0.1", "[::1]", "10.1.0.2"} { // as metrics, or docker by TCP, would
		d.machine.ServeEcho(a + ":7001")
	}
	d.server.ServeEcho(far4 + ":7001")
	d.docker("network", "create", "third")
	web := "while :; do nc -l -p 7001 -e cat; done"
	other := d.docker("run", "-d", "--network=third", registry+"/base", "sh", "-c", web)
	box := d.docker(slices.Concat([]string{"run", "-d"}, probing(), []string{registry + "/base", "sleep", "600"})...)
	defer d.docker("rm", "-f", box, other)
	ip := d.docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", other)
	gateway := d.docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}", box)
	d.machine.ServeEcho(gateway + ":7001")
	const far = "tcp " + far4 + ":7001"
	lines := []string{far}
	for _, a := range []string{"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254", "10.1.0.2", gateway, ip, "[64:ff9b::7f00:1]", "[2002:7f00:1::]"} {
		lines = append(lines, "tcp "+a+":7001")
	}
	try := func(lines []string) (all map[string]answer) {
		d.t.Helper()
		out := d.docker(slices.Concat([]string{"exec", box, "/usr/bin/env"}, probeArgs(probe{Do: "reach", To: strings.Join(lines, "\n"), Wait: 3e9}))...)
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			d.t.Fatalf("%v: %s", err, out)
		}
		return all
	}
	before := try(lines)
	if before[far].Heard != "" || before["tcp 10.1.0.2:7001"].Heard == "" || before["tcp "+ip+":7001"].Heard != "" {
		d.t.Fatalf("the lab is not as wanted: %+v", before)
	}
	byDevice := slices.Clone(lines)
	for _, line := range lines {
		byDevice = append(byDevice, line+" tun0")
	}
	more := `
[[outbound]]
name = "second"
type = "direct"
interface = "eth1"
[[outbound]]
name = "relay"
type = "socks5"
server = "127.0.0.1:1080"
[[rule]]
use = `
	d.machine.Start("microsocks", "-i", "127.0.0.1", "-p", "1080", "-b", "10.2.0.2")
	uses := []string{"second", "relay"}
	if labtest.Soak() {
		uses = append(uses, "direct")
	}
	for _, use := range uses {
		c := d.start(d.configDocker("true", more+fmt.Sprintf("%q\n", use)))
		labtest.Eventually(d.t, 10*time.Second, func() bool { a := d.container(box); return a != nil && a.State == "up" }, "it is attached")
		for line, got := range try(byDevice) {
			plain, bound := strings.CutSuffix(line, " tun0")
			want := before[plain].Heard
			switch {
			case plain == far && use != "direct": // by eth0 it is refused
				want = "hello"
			case bound:
				want = ""
			}
			if got.Heard != want {
				d.t.Errorf("by %s, %s: heard %q (%s), want %q", use, line, got.Heard, got.Errno, want)
			}
		}
		c.stop()
	}
}

// testLives: a connection of a container that ran before cgtun goes on as it was,
// new ones take the configured way at once; and what is there when another cgtun
// comes, too. No cgtun runs when it begins.
func (d *dockers) testLives() {
	d.server.ServeEcho(far4 + ":7002")
	d.router.Run("nft", "flush chain inet broken f")
	id := d.docker("run", "-d", "-i", registry+"/base", "sh", "-c", "(while echo alive; do sleep 0.1; done) | nc "+far4+" 7002")
	said := func() int { return strings.Count(d.docker("logs", id), "alive") }
	lives := func(when string) {
		d.t.Helper()
		n := said()
		labtest.Eventually(d.t, 10*time.Second, func() bool { return said() > n+2 }, "it goes on %s", when)
	}
	lives("without cgtun")
	c := d.start(d.configDocker("true", second))
	labtest.Eventually(d.t, 10*time.Second, func() bool { a := d.container(id); return a != nil && a.State == "up" }, "it is attached")
	lives("with cgtun")
	d.docker("exec", id, "first", far4, "7000")
	if !slices.ContainsFunc(d.flows(), func(f flow.Info) bool { return string(f.Attachment) == id[:12] && f.Dst.Port() == 7000 }) {
		d.t.Error("a new flow of it is not seen")
	}
	c.stop()
	lives("after cgtun")
	// While its end still reaches the server: what that goes on to send would be
	// refused by the next container with this address.
	d.docker("rm", "-f", id)
	d.router.Run("nft", `add rule inet broken f iifname "eth0" reject with icmpx admin-prohibited`)
}

// goroutines matches the head of each in a dump.
var goroutines = regexp.MustCompile(`(?m)^goroutine \d+ `)

// testChurn: containers that come and go leave nothing in cgtun: no attachment,
// descriptor or goroutine, and no link. No cgtun runs when it begins.
func (d *dockers) testChurn() {
	n := 20
	if labtest.Soak() {
		n = 200
	}
	const atOnce = 5
	text := d.configDocker("true", second)
	fds := func(c *daemon) int {
		d.t.Helper()
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.pid()))
		if err != nil {
			d.t.Fatal(err)
		}
		return len(entries)
	}
	dump := func(c *daemon) int {
		c.Signal(syscall.SIGQUIT)
		_ = c.Wait()
		return len(goroutines.FindAllString(c.Output(), -1))
	}
	one := func() error {
		_, err := d.try("run", "--rm", registry+"/base", "first", far4, "7000")
		return err
	}
	base := d.start(text)
	idle := dump(base)
	if out, errs, code := d.cgtun("cleanup"); code != 0 {
		d.t.Fatalf("cleanup: %s%s", out, errs)
	}
	c := d.start(text)
	if err := one(); err != nil { // what is opened once
		d.t.Error(err)
	}
	quiet := func() bool { return len(d.attachments()) == 0 && d.status().Counters.FlowsLive == 0 }
	labtest.Eventually(d.t, 20*time.Second, quiet, "all is quiet")
	d.leaks.Reset()
	before, links := fds(c), d.machine.Run("ip", "-br", "link")
	errs := make(chan error)
	for range atOnce {
		go func() {
			var err error
			for i := 0; i < n/atOnce && err == nil; i++ {
				err = one()
			}
			errs <- err
		}()
	}
	for range atOnce {
		if err := <-errs; err != nil {
			d.t.Error(err)
		}
	}
	d.noLeak("containers that come and go")
	labtest.Eventually(d.t, 20*time.Second, quiet, "all attachments have ended")
	labtest.Eventually(d.t, 20*time.Second, func() bool { return fds(c) <= before }, "descriptors are back at %d: %d", before, fds(c))
	var now string
	labtest.Eventually(d.t, 20*time.Second, func() bool {
		now = d.machine.Run("ip", "-br", "link")
		return strings.Count(now, "\n") == strings.Count(links, "\n")
	}, "links are back")
	// Some live as long as the runtime likes, such as those of timers that ran once.
	if got := dump(c); got > idle+3 {
		d.t.Errorf("%d goroutines, %d at the start:\n%s", got, idle, c.Output())
	} else {
		d.t.Logf("%d containers: %d descriptors as before, %d goroutines, %d at the start", n, before, got, idle)
	}
	if out, errs, code := d.cgtun("cleanup"); code != 0 {
		d.t.Errorf("cleanup: %s%s", out, errs)
	}
}

// testInside: cgtun itself in a container of the daemon that it captures never takes
// its own packets for a client's. No cgtun runs when it begins.
func (d *dockers) testInside() {
	config := d.write(strings.NewReplacer(d.sel.Path, "/inside", d.host.Path, "").Replace(d.configDocker("true", second)))
	id := d.docker(slices.Concat([]string{"run", "-d", "--network=host", "--pid=host", "--cgroupns=host", "-v", d.dir + ":" + d.dir, "--device", "/dev/net/tun"}, privileged, machinesPrograms,
		[]string{registry + "/base", "/usr/bin/busybox", "sh", "-c", "mount -o remount,rw /sys/fs/cgroup && exec " + d.program() + " -c " + config})...)
	defer d.docker("rm", "-f", id)
	labtest.Eventually(d.t, 20*time.Second, func() bool { return strings.Contains(d.docker("logs", id), "msg=ready") }, "it is ready: %s", logged{func() string { return d.docker("logs", id) }})
	d.leaks.Reset()
	const n = 3
	for range n {
		d.docker("run", "--rm", registry+"/base", "first", far4, "7000")
	}
	d.built(classic, "FROM "+registry+"/base\nRUN first "+far4+" 7000\n")
	if flows := d.status().Counters.FlowsTotal; flows < n+1 || flows > 4*n {
		d.t.Errorf("%d flows for %d steps", flows, n+1)
	}
	d.docker("stop", "-t", "10", id)
	if code := d.docker("inspect", "-f", "{{.State.ExitCode}}", id); code != "0" {
		d.t.Errorf("it ended with %s: %s", code, d.docker("logs", id))
	}
}
