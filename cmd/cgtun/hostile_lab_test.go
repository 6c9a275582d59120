package main_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/control"
	"cgtun/internal/labtest"
)

func init() {
	probes["spray"] = spray
	probes["many"] = many
}

// SIGTERM while dials hang in a black hole, datagram sessions are open and bulk
// runs both ways: two seconds, and the system is as it was.
func TestStopWhileBusy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.router.Run("ip", "route", "add", "blackhole", "203.0.113.99")
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeExchange(":7001")
	before := w.lab.Snapshot(w.machine)
	d := w.start(w.config(second))
	busy := []*labtest.Proc{
		w.lab.StartCommand(w.command(t.Context(), inside, "env", probeArgs(probe{Do: "many", Network: "tcp", To: "203.0.113.99:80", N: 100, Wait: time.Minute})...)),
		w.lab.StartCommand(w.command(t.Context(), inside, "env", probeArgs(probe{Do: "exchange", To: port(far4, 7001), N: 4 << 30})...)),
		w.startProbe(inside, probe{Do: "spray", To: port(far4, 7000), N: 200}),
	}
	labtest.Eventually(t, 10*time.Second, func() bool { return w.status().Counters.FlowsLive >= 301 }, "all flows live")
	d.stop()
	for _, p := range busy {
		if !p.Exited() {
			p.Signal(syscall.SIGKILL)
		}
		_ = p.Wait()
	}
	w.unchanged(before, "stopped while busy")
}

// many dials N times at once and waits.
func many(q probe) error {
	done := make(chan error, q.N)
	for range q.N {
		go func() {
			_, err := q.dial()
			done <- err
		}()
	}
	for range q.N {
		<-done // each fails in the end: that is what it is for
	}
	return nil
}

// spray has N datagram sockets ask once each, and keeps them.
func spray(q probe) error {
	d := probeDialer(q)
	kept := make([]net.Conn, 0, q.N)
	defer runtime.KeepAlive(&kept)
	for i := range q.N {
		c, err := d.Dial("udp", q.To)
		if err != nil {
			return err
		}
		if err := echoOnce(c, "hello"); err != nil {
			return fmt.Errorf("socket %d: %w", i, err)
		}
		kept = append(kept, c)
	}
	fmt.Println("ready")
	time.Sleep(10 * time.Minute)
	return nil
}

// SIGTERM at any point of the start: the system is as it was.
func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	before := w.lab.Snapshot(w.machine)
	text, _ := w.created("made")
	began := time.Now()
	w.start(text).stop()
	whole := time.Since(began)
	for i := range 10 {
		d := w.lab.StartCommand(w.daemonCommand(text))
		time.Sleep(rand.N(whole)) // the point of the signal: not a wait
		d.Signal(syscall.SIGTERM)
		err := d.Wait()
		// Before cgtun listens for it, the signal ends the process itself.
		if err != nil && d.Output() != "" {
			t.Errorf("stop %d: %v: %s", i, err, d.Output())
		}
		w.unchanged(before, fmt.Sprintf("stop %d", i))
	}
}

// The cgroup is removed and made again, by whoever: what starts in the new one
// is captured from its first packet.
func TestCgroupMadeAgainIsCaptured(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.start(w.config(second))
	for i := range 10 {
		if err := os.Remove(w.sel.Dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(w.sel.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(w.sel.Dir)
		if err != nil {
			t.Fatal(err)
		}
		q := probe{Do: "dial", Network: "tcp", To: port([]string{far4, far6}[i%2], 7000), Say: "hello"}
		// Born of a thread in the machine: nothing selected is ever elsewhere.
		cmd := exec.CommandContext(t.Context(), "env", probeArgs(q)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		var out strings.Builder
		cmd.Stdout = &out
		err = w.machine.Do(cmd.Run)
		dir.Close()
		if err != nil || !strings.Contains(out.String(), `"Heard":"hello"`) {
			t.Errorf("time %d: %v %s", i, err, out.String())
		}
		w.noLeak(fmt.Sprintf("time %d", i))
	}
}

// Somebody takes the device away while connections are made: it is back, or made
// again, and nothing leaves by the uplink meanwhile.
func TestDeviceTakenAwayLeaksNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	before := w.lab.Snapshot(w.machine)
	d := w.start(w.config(second))
	for _, cut := range [][]string{{"link", "set", "tun0", "down"}, {"link", "set", "tun0", "up"}, {"addr", "flush", "dev", "tun0"}} {
		w.machine.Run("ip", cut...)
		for _, far := range []string{far4, far6} {
			w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "x", Wait: 300 * time.Millisecond})
			w.noLeak(strings.Join(cut, " ") + " " + far)
		}
	}
	labtest.Eventually(t, patience(), func() bool {
		return w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x", Wait: 500 * time.Millisecond}).Heard == "x"
	}, "captured connections work again")
	w.noLeak("device back")
	// Deleted, and under another name: it is made again.
	for _, taken := range []string{"link del tun0", "link set tun0 down name gone0", "link del tun0"} {
		sender := w.lab.StartCommand(w.command(t.Context(), inside, "env", probeArgs(probe{Do: "stream", To: port(far4, 7000)})...))
		began := time.Now()
		w.machine.Run("ip", strings.Fields(taken)...)
		labtest.Eventually(t, patience(), func() bool {
			a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far6, 7000), Say: "x", Wait: 200 * time.Millisecond})
			return a.Heard == "x"
		}, "back after %s", taken)
		t.Logf("after %s a connection was answered in %v", taken, time.Since(began).Round(time.Millisecond))
		sender.Signal(syscall.SIGKILL)
		_ = sender.Wait()
		w.noLeak(taken)
	}
	if s := w.status(); s.State != control.Ready || len(s.Attachments) != 1 || s.Attachments[0].State != attach.StateUp {
		t.Errorf("status %+v", s)
	}
	d.stop()
	w.unchanged(before, "device deleted")
}

// Addresses and links that come and go are followed: a prefix that becomes
// connected is bypassed, and one that goes is captured again.
func TestConnectedPrefixesAreFollowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	echo := w.server.ServeEcho(":7000")
	w.start(w.config(second))
	connect := func() bool {
		if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port("203.0.113.10", 7000), Say: "x"}); a.Heard != "x" {
			return false
		}
		seen := echo.Clients()
		return isSecond(seen[len(seen)-1])
	}
	if !connect() {
		t.Error("not captured at first")
	}
	// The router answers for the prefix on the machine's link.
	w.router.Sysctl("net.ipv4.conf.eth0.proxy_arp", "1")
	w.machine.Run("ip", "addr", "add", "203.0.113.250/24", "dev", "eth0")
	w.router.Run("ip", "route", "add", "203.0.113.250", "dev", "eth0")
	labtest.Eventually(t, patience(), func() bool { return !connect() && w.leaks.Packets() > 0 }, "a connected prefix is bypassed")
	w.machine.Run("ip", "addr", "del", "203.0.113.250/24", "dev", "eth0")
	labtest.Eventually(t, patience(), connect, "captured again")
	w.leaks.Reset()
	if !connect() {
		t.Error("not captured in the end")
	}
	w.noLeak("captured again")
}
