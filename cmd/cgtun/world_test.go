package main_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// The addresses that the server has behind the router, and those of the router
// that are on-link for the machine.
const (
	far4, far6   = "203.0.113.10", "2001:db8::10"
	near4, near6 = "10.1.0.1", "fd01::1"
)

// world is the lab that the tests of the program share. cgtun is started in
// the machine by "ip netns exec". What it sends itself leaves by eth1, if the
// configuration says so (see second): then all that the router sees on the
// uplink eth0 was sent by somebody else.
//
//	machine                                   router                    server
//	┌────────────────────────────────┐
//	│ other processes ───────── eth0 │ uplink   eth0 (leaks)
//	│ sel ── tun0 ── cgtun ──── eth1 │ second   eth1 ── eth2 ─── eth0   203.0.113.10
//	└────────────────────────────────┘          10.1.0.1                2001:db8::10
type world struct {
	t                       *testing.T
	lab                     *labtest.Lab
	machine, router, server *labtest.Host
	sel, self               *labtest.Cgroup // what is selected; where cgtun runs
	leaks                   *labtest.Meter  // to what is not bypassed, by the uplink
	dir, socket             string
	number                  int // table, and what is derived from it
}

// second has every flow leave by eth1.
const second = `
[[outbound]]
name = "second"
type = "direct"
interface = "eth1"

[[rule]]
use = "second"
`

var worlds atomic.Int32

func newWorld(t *testing.T, tools ...string) *world {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("nft"))
	for _, tool := range tools {
		labtest.Need(t, labtest.Tool(tool))
	}
	if _, err := program(); err != nil {
		t.Fatal(err)
	}
	lab := labtest.New(t)
	w := &world{t: t, lab: lab, machine: lab.Host("machine"), router: lab.Host("router"), server: lab.Host("server"), dir: t.TempDir()}
	// Numbers of the process's own: cgroups are known machine-wide by them.
	w.number = 1_000_000 + os.Getpid()%100_000*1000 + int(worlds.Add(1))
	w.socket = filepath.Join(w.dir, "s")
	lab.Link(w.machine, w.router, "10.1.0.2/24", near4+"/24", "fd01::2/64", near6+"/64")
	lab.Link(w.machine, w.router, "10.2.0.2/24", "10.2.0.1/24", "fd02::2/64", "fd02::1/64")
	lab.Link(w.router, w.server, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	w.router.Forward()
	w.machine.IP(
		"route add default via 10.1.0.1", "route add default via fd01::1",
		"route add default via 10.2.0.1 metric 2000", "route add default via fd02::1 metric 2000",
		// Without these the kernel answers for a socket of eth1 that is gone by
		// the uplink.
		"route add default via 10.2.0.1 table 102", "rule add from 10.2.0.2 lookup 102 priority 20000",
		"route add default via fd02::1 table 102")
	w.machine.Run("ip", "-6", "rule", "add", "from", "fd02::2", "lookup", "102", "priority", "20000")
	w.server.IP(
		"route add default via 10.9.0.1", "route add default via fd09::1",
		"addr add 203.0.113.10/32 dev lo", "addr add 2001:db8::10/128 dev lo nodad")
	w.router.IP("route add 203.0.113.0/24 via 10.9.0.2", "route add 2001:db8::/64 via fd09::2")
	w.server.Settled("lo")
	w.sel, w.self = lab.Cgroup("sel"), lab.Cgroup("daemon")
	w.leaks = w.router.MeterMatch(
		`iifname "eth0" ip daddr != { 10.1.0.0/24, 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 }`,
		`iifname "eth0" ip6 daddr != { fd01::/64, fe80::/10, ff00::/8 }`)
	return w
}

// program returns the path of cgtun, built once: with the race detector if the
// test has it.
var program = sync.OnceValues(func() (string, error) {
	if raceEnabled {
		return labtest.Program("-race")
	}
	return labtest.Program()
})

func (w *world) program() string {
	w.t.Helper()
	path, err := program()
	if err != nil {
		w.t.Fatal(err)
	}
	return path
}

// config returns a configuration that selects sel, and more after it.
func (w *world) config(more string) string {
	return labtest.Config(w.sel, w.number, w.socket, more)
}

// write writes a configuration and returns its path.
func (w *world) write(text string) string {
	w.t.Helper()
	f, err := os.CreateTemp(w.dir, "*.toml")
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return f.Name()
}

// daemonCommand is "cgtun -c FILE" as a user starts it, in a cgroup of its own.
func (w *world) daemonCommand(text string) *exec.Cmd {
	w.t.Helper()
	cmd := exec.CommandContext(context.Background(), "ip", "netns", "exec", w.machine.Name, w.program(), "-c", w.write(text))
	return w.self.Command(cmd)
}

// start starts cgtun and waits until it is ready. When the test ends it is
// stopped, and must do that well.
func (w *world) start(text string) *daemon {
	w.t.Helper()
	return w.startCommand(w.daemonCommand(text))
}

// daemon is a cgtun that runs.
type daemon struct {
	*labtest.Proc
	w *world
}

func (w *world) startCommand(cmd *exec.Cmd) *daemon {
	w.t.Helper()
	d := &daemon{Proc: w.lab.StartCommand(cmd), w: w}
	w.t.Cleanup(func() {
		if !d.Exited() {
			d.stop()
		}
		if strings.Contains(d.Output(), "DATA RACE") || strings.Contains(d.Output(), "panic") {
			w.t.Errorf("cgtun said:\n%s", d.Output())
		}
	})
	d.WaitOutput("msg=ready", 20*time.Second)
	return d
}

// stopTime is what docker gives a container.
const stopTime = 10 * time.Second

// stop ends cgtun by SIGTERM.
func (d *daemon) stop() {
	d.w.t.Helper()
	took, err := d.Stop()
	if err != nil {
		d.w.t.Errorf("cgtun ended with %v:\n%s", err, d.Output())
	}
	// A tenth of a second where nothing else goes on. Here other tests make and end
	// hundreds of namespaces meanwhile, under locks of the kernel that a stop needs.
	if took > stopTime && !raceEnabled {
		d.w.t.Errorf("SIGTERM took %v, want %v at most", took, stopTime)
	}
}

// kill ends cgtun by SIGKILL.
func (d *daemon) kill() {
	d.w.t.Helper()
	d.Signal(syscall.SIGKILL)
	_ = d.Wait()
}

// cgtun runs a command of cgtun in the machine and returns what it printed and
// its exit code.
func (w *world) cgtun(args ...string) (stdout, stderr string, code int) {
	w.t.Helper()
	return result(w.t, w.machine.Command(context.Background(), w.program(), append([]string{"-s", w.socket}, args...)...))
}

func result(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", strings.Join(cmd.Args, " "), err)
	}
	// It says where it hangs then.
	defer time.AfterFunc(patience(), func() { _ = cmd.Process.Signal(syscall.SIGQUIT) }).Stop()
	err := cmd.Wait()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) {
		t.Fatalf("run %s: %v", strings.Join(cmd.Args, " "), err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// ask reads the answer of a command with --json.
func ask[T any](w *world, args ...string) (answer T) {
	w.t.Helper()
	out, errs, code := w.cgtun(append(args, "--json")...)
	if code != 0 {
		w.t.Fatalf("cgtun %s: exit code %d: %s", strings.Join(args, " "), code, errs)
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		w.t.Fatalf("cgtun %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return answer
}

func (w *world) status() control.Status { w.t.Helper(); return ask[control.Status](w, "status") }
func (w *world) flows() []flow.Info     { w.t.Helper(); return ask[control.FlowList](w, "flows").Flows }

// where says where a program is started.
type where int

const (
	outside where = iota // in no selected cgroup
	inside               // in the selected one, from its first instruction on
	moved                // by "cgtun run"
)

func (at where) String() string { return [...]string{"outside", "inside", "cgtun run"}[at] }

// command returns a command in the machine.
func (w *world) command(ctx context.Context, at where, name string, args ...string) *exec.Cmd {
	w.t.Helper()
	switch at {
	case inside:
		return w.sel.In(ctx, w.machine, name, args...)
	case moved:
		args = append([]string{"-s", w.socket, "run", "--", name}, args...)
		return w.machine.Command(ctx, w.program(), args...)
	}
	return w.machine.Command(ctx, name, args...)
}

// patience is how long a program may take.
func patience() time.Duration {
	if labtest.Soak() {
		return 5 * time.Minute
	}
	return 30 * time.Second
}

// run runs a program in the machine and returns its stdout.
func (w *world) run(at where, name string, args ...string) string {
	w.t.Helper()
	out, err := w.try(at, name, args...)
	if err != nil {
		w.t.Fatalf("%v: %s %s: %v", at, name, strings.Join(args, " "), err)
	}
	return out
}

func (w *world) try(at where, name string, args ...string) (string, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience())
	defer cancel()
	cmd := w.command(ctx, at, name, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// noLeak fails the test if a packet has left by the uplink.
func (w *world) noLeak(what string) {
	w.t.Helper()
	if n := w.leaks.Packets(); n != 0 {
		w.t.Errorf("%s: %d packets left by the uplink", what, n)
		w.leaks.Reset()
	}
}

// device returns the packets that came out of and went into tun0.
func (w *world) device() (sent, received uint64) {
	w.t.Helper()
	var links []struct {
		Stats struct {
			RX, TX struct{ Packets uint64 }
		} `json:"stats64"`
	}
	out := w.machine.Run("ip", "-s", "-j", "link", "show", "dev", "tun0")
	if err := json.Unmarshal([]byte(out), &links); err != nil || len(links) != 1 {
		w.t.Fatalf("read counters of tun0: %v\n%s", err, out)
	}
	return links[0].Stats.TX.Packets, links[0].Stats.RX.Packets
}

// isSecond tells whether an address is one of the machine's on the second link.
func isSecond(a netip.AddrPort) bool {
	return a.Addr() == netip.MustParseAddr("10.2.0.2") || a.Addr() == netip.MustParseAddr("fd02::2")
}
