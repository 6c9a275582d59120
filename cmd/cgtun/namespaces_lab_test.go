package main_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/control"
	"cgtun/internal/labtest"
)

func init() {
	probes["birth"] = birth
	probes["shoot"] = shoot
	probes["stammer"] = stammer
}

// birth makes a process in a new network namespace as runc does: a clone that
// waits, without an exec, until its network is set up, and then becomes the
// step. It prints the clone's pid, and hands on what it reads as the go-ahead.
func birth(q probe) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	shot := probe{Do: "shoot", To: q.To}
	path, _ := unix.BytePtrFromString(self)
	argv, _ := syscall.SlicePtrFromStrings([]string{self})
	envv, _ := syscall.SlicePtrFromStrings([]string{probeArgs(shot)[0]})
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil { // without CLOEXEC: the clone reads it
		return err
	}
	pid, errno := cloneWaiting(pipe[0], path, argv, envv)
	if errno != 0 {
		return errno
	}
	fmt.Println(pid)
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return err
	}
	if _, err := unix.Write(pipe[1], []byte{1}); err != nil {
		return err
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	state, err := p.Wait()
	if err == nil && !state.Success() {
		err = fmt.Errorf("the step: %v", state)
	}
	return err
}

// cloneWaiting does nothing in the child but system calls: it has one thread,
// and no runtime that could change it.
//
//go:norace
func cloneWaiting(wait int, path *byte, argv, envv []*byte) (int, syscall.Errno) {
	var b [1]byte
	pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD)|unix.CLONE_NEWNET, 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return int(pid), errno
	}
	syscall.RawSyscall(syscall.SYS_READ, uintptr(wait), uintptr(unsafe.Pointer(&b[0])), 1)
	syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
	syscall.RawSyscall(syscall.SYS_EXIT, 1, 0, 0)
	return 0, 0
}

// shoot sends a datagram as its first act, and waits for the answer.
func shoot(q probe) error {
	c, err := net.Dial("udp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("first")); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	fmt.Println("answered")
	return nil
}

// stammer sends N datagrams from one socket, one each millisecond; the first error
// ends it.
func stammer(q probe) error {
	c, err := net.Dial("udp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("ready")
	for range q.N {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// joined gives a process's namespace a link to the machine, which routes for it:
//
//	machine inN (10.50.N.1, fd50:N::1) ──── eth0 (10.50.N.2, fd50:N::2) namespace
func (w *world) join(n, pid int) {
	w.t.Helper()
	dev, p := fmt.Sprintf("in%d", n), strconv.Itoa(pid)
	w.machine.Run("ip", "link", "add", dev, "type", "veth", "peer", "name", "eth0", "netns", p)
	w.machine.Run("ip", "addr", "add", fmt.Sprintf("10.50.%d.1/24", n), "dev", dev)
	w.machine.Run("ip", "addr", "add", fmt.Sprintf("fd50:%d::1/64", n), "dev", dev, "nodad")
	w.machine.Run("ip", "link", "set", dev, "up")
	script := fmt.Sprintf(`echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
		ip link set lo up; ip addr add 10.50.%[1]d.2/24 dev eth0; ip addr add fd50:%[1]d::2/64 dev eth0 nodad; ip link set eth0 up
		ip -6 route add default via fd50:%[1]d::1; ip route add default via 10.50.%[1]d.1`, n)
	if out, err := exec.Command("nsenter", "-t", p, "-n", "sh", "-ec", script).CombinedOutput(); err != nil {
		w.t.Fatalf("set up the namespace of %d: %v: %s", pid, err, out)
	}
}

// routed lets the machine route for namespaces, and the router know the way back.
func (w *world) routed() {
	w.machine.Forward()
	w.router.Run("ip", "route", "add", "10.50.0.0/16", "via", "10.1.0.2")
	w.router.Run("ip", "-6", "route", "add", "fd50::/16", "via", "fd01::2")
}

// step runs a step in a namespace of its own and returns what it said.
func (w *world) step(n int, to string) (string, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience())
	defer cancel()
	cmd := w.command(ctx, inside, "env", probeArgs(probe{Do: "birth", To: to})...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	var errs strings.Builder
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		return "", err
	}
	var pid int
	if _, err := fmt.Fscanln(out, &pid); err != nil {
		return "", fmt.Errorf("no pid: %w: %s", err, errs.String())
	}
	w.join(n, pid)
	if _, err := stdin.Write([]byte{1}); err != nil {
		return "", err
	}
	said, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil {
		return string(said), fmt.Errorf("%w: %s", err, errs.String())
	}
	return string(said), nil
}

// attachments are those of status but home's.
func (w *world) attachments() (list []control.Attachment) {
	w.t.Helper()
	for _, a := range w.status().Attachments {
		if a.ID != attach.Home {
			list = append(list, a)
		}
	}
	return list
}

// A step whose first act is a datagram, in a namespace of its own: nothing
// leaves it uncaptured and nothing is dropped, on a busy machine too. Afterwards
// the namespaces have ended, and all of their attachments.
func TestStepsInNamespacesAreCapturedFromTheFirstPacket(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	w.start(w.config(second))
	steps, loops := 40, 8
	switch {
	case labtest.Soak():
		steps = 500
	case testing.Short():
		steps, loops = 10, 2
	}
	for range loops {
		w.lab.StartCommand(exec.Command("sh", "-c", "while :; do :; done"))
	}
	for n := range steps {
		to := port(far4, 7000)
		if n%2 == 1 {
			to = port(far6, 7000)
		}
		if said, err := w.step(n%250, to); err != nil || said != "answered\n" {
			t.Fatalf("step %d: %q, %v; gate %d", n, said, err, w.status().Counters.GateDropsTotal)
		}
	}
	w.noLeak("steps")
	if n := w.status().Counters.GateDropsTotal; n != 0 {
		t.Errorf("%d packets were dropped by the gate", n)
	}
	labtest.Eventually(t, patience(), func() bool { return len(w.attachments()) == 0 }, "all attachments have ended")
	labtest.Eventually(t, patience(), func() bool { return !strings.Contains(w.machine.Run("ip", "-br", "link"), "in") }, "all links have gone")
}

// waiting is a selected process in a namespace of its own, which waits.
type waiting struct {
	cmd   *exec.Cmd
	stdin io.Closer
	pid   int // of the process that is in the namespace
}

// wait starts one that has executed something in its namespace: it is offline
// until join gives it a way out.
func (w *world) wait() *waiting {
	w.t.Helper()
	// The pid is that of the shell: unshare executes it.
	cmd := w.command(context.Background(), inside, "unshare", "-n", "sh", "-c", "echo $$; read x")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	p := &waiting{cmd: cmd, stdin: stdin}
	w.t.Cleanup(func() { p.stdin.Close(); _ = p.cmd.Wait() })
	if _, err := fmt.Fscanln(out, &p.pid); err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (p *waiting) end() {
	p.stdin.Close()
	_ = p.cmd.Wait()
}

// state is that of the attachment of a process's namespace, "" for none.
func (w *world) stateOf(pid int) string {
	w.t.Helper()
	ino := inodeOf(pid)
	for _, a := range w.attachments() {
		if uint64(a.NetnsIno) == ino {
			return a.State
		}
	}
	return ""
}

func inodeOf(pid int) uint64 {
	var st unix.Stat_t
	_ = unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st)
	return st.Ino
}

// A namespace without a way out is left offline, is captured when it gets one,
// Where IPv6 is left alone, as docker has none by itself, each change makes cgtun look
// With on_exit = "closed" a namespace without a way out for both families, or for one
// of them, that gets one while cgtun is not there is shut; the next start attaches it,
// A privileged step that takes our things away inside of its own namespace gains
// nothing: they are back at once, and until then nothing gets out.
func TestStepThatTakesItsNamespaceApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	// The senders make a thousand sessions, which the race detector makes dear.
	w.start(w.config("[limits]\nmemory = \"2GiB\"\n" + second))
	p := w.wait()
	w.join(1, p.pid)
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(p.pid) == attach.StateUp }, "it is up")
	step := func(args ...string) *exec.Cmd {
		return w.command(context.Background(), inside, "nsenter", append([]string{"-t", strconv.Itoa(p.pid), "-n"}, args...)...)
	}
	senders := []*labtest.Proc{}
	for _, far := range []string{far4, far6} {
		cmd := step(append([]string{"env"}, probeArgs(probe{Do: "every", Network: "udp", To: port(far, 7000)})...)...)
		senders = append(senders, w.lab.StartCommand(cmd))
	}
	for _, take := range []string{"nft flush ruleset", "ip rule del pref 10101", "ip -6 rule del pref 10101", "ip link set tun0 down", "ip link del tun0"} {
		if out, err := step(strings.Fields(take)...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", take, err, out)
		}
		for _, far := range []string{far4, far6} {
			labtest.Eventually(t, patience(), func() bool {
				out, err := step(append([]string{"env"}, probeArgs(probe{Do: "dial", Network: "udp", To: port(far, 7000), Say: "x", Wait: time.Second})...)...).Output()
				return err == nil && strings.Contains(string(out), `"Heard":"x"`)
			}, "after %s, to %s", take, far)
		}
		if n := w.leaks.Packets(); n != 0 {
			t.Errorf("%s: %d packets left", take, n)
			w.leaks.Reset()
		}
	}
	for _, s := range senders {
		s.Signal(syscall.SIGKILL)
		_ = s.Wait()
	}
}

// Many namespaces at once are all attached, in little memory each, and all end.
// A stop with ten of them takes no longer than one without.
func TestManyNamespacesAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	d := w.start(w.config(second))
	n := 50
	switch {
	case labtest.Soak():
		n = 200
	case testing.Short():
		n = 15
	}
	before := memoryOf(t, d.pid(), "VmRSS")
	var all []*waiting
	for range n {
		all = append(all, w.wait())
	}
	labtest.Eventually(t, patience(), func() bool { return len(w.attachments()) == n }, "all are seen")
	if now := memoryOf(t, d.pid(), "VmRSS"); !raceEnabled && now-before > n*100<<10 {
		t.Errorf("%d KiB for each offline namespace, want nothing", (now-before)/n>>10)
	}
	began := time.Now()
	for i, p := range all {
		w.join(i, p.pid)
	}
	up := func() (up int) {
		for _, a := range w.attachments() {
			if a.State == attach.StateUp {
				up++
			}
		}
		return up
	}
	labtest.Eventually(t, 4*patience(), func() bool { return up() == n }, "all are up, %d of %d are", up(), n)
	t.Logf("%d attachments: %d KiB and %v each, with the making of their links", n, (memoryOf(t, d.pid(), "VmRSS")-before)/n>>10, time.Since(began)/time.Duration(n))
	for _, p := range all[10:] {
		p.end()
	}
	labtest.Eventually(t, patience(), func() bool { return len(w.attachments()) == 10 }, "ten are left")
	d.stop()
}

// pid is that of cgtun itself.
func (d *daemon) pid() int { return d.w.status().PID }

// A namespace ends with its last process, although it is attached and a flow of
// it lives: its link at the machine goes with it.
func TestNamespacesEndWithTheirLastProcess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	w.server.ServeEcho(":7000")
	w.start(w.config(second))
	rounds := 100
	switch {
	case labtest.Soak():
		rounds = 1000
	case testing.Short():
		rounds = 10
	}
	const atOnce = 10
	for round := 0; round < rounds; round += atOnce {
		var all []*waiting
		for i := range atOnce {
			p := w.wait()
			w.join(i, p.pid)
			all = append(all, p)
		}
		var held []*labtest.Proc
		for _, p := range all[:atOnce/2] {
			hold := probeArgs(probe{Do: "late", To: port(far4, 7000)}) // a connection, and then it waits
			held = append(held, w.lab.StartCommand(w.command(context.Background(), inside, "nsenter", append([]string{"-t", strconv.Itoa(p.pid), "-n", "env"}, hold...)...)))
		}
		for _, h := range held {
			h.WaitOutput("ready", patience())
			h.Signal(syscall.SIGKILL)
			_ = h.Wait()
		}
		for _, p := range all {
			p.end()
		}
		labtest.Eventually(t, 2*patience(), func() bool {
			return len(w.attachments()) == 0 && !strings.Contains(w.machine.Run("ip", "-br", "link"), "in")
		}, "round %d: attachments and links have gone: %d, %s", round, len(w.attachments()), w.machine.Run("ip", "-br", "link"))
	}
}

// Killed at any moment, with namespaces that are being attached, the next start
// takes over, and after cleanup nothing is left in any of them.
func TestKilledWithNamespaces(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	all := []*waiting{w.wait(), w.wait(), w.wait()}
	for i, p := range all {
		w.join(i, p.pid)
	}
	state := func(pid int) (text string) {
		for _, args := range []string{"ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "nft list ruleset", "ip -br link"} {
			out, err := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(pid), "-n"}, strings.Fields(args)...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v %s", args, err, out)
			}
			text += string(out)
		}
		return text
	}
	var before []string
	for _, p := range all {
		before = append(before, state(p.pid))
	}
	machine := w.lab.Snapshot(w.machine)
	kills := 10
	switch {
	case labtest.Soak():
		kills = 50
	case testing.Short():
		kills = 4
	}
	for i := range kills {
		d := &daemon{Proc: w.lab.StartCommand(w.daemonCommand(w.config(second))), w: w}
		time.Sleep(time.Duration(i*1500/kills) * time.Millisecond) // the moment, not a wait
		d.kill()
	}
	d := w.start(w.config(second))
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(all[0].pid) == attach.StateUp }, "the next start attaches")
	d.stop()
	for i, p := range all {
		if after := state(p.pid); after != before[i] {
			t.Errorf("after the next start:\n%s\nwas\n%s", after, before[i])
		}
	}
	d = w.start(w.config(second))
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(all[0].pid) == attach.StateUp }, "attached again")
	d.kill()
	if out, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s %s", code, out, errs)
	}
	for i, p := range all {
		if after := state(p.pid); after != before[i] {
			t.Errorf("after cleanup:\n%s\nwas\n%s", after, before[i])
		}
	}
	if diff := machine.Diff(w.lab.Snapshot(w.machine)); diff != "" {
		t.Errorf("the machine is not as it was:\n%s", diff)
	}
}
