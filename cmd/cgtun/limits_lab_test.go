package main_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

func init() {
	probes["crowd"] = crowd
	probes["chat"] = chat
}

// chat says something on one connection again and again, until that fails.
func chat(q probe) error {
	c, err := probeDialer(q).Dial("tcp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("ready")
	for {
		if err := echoOnce(c, "hello"); err != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// crowd opens N connections and keeps those that it gets; it says how many.
func crowd(q probe) error {
	d := probeDialer(q)
	kept := make([]net.Conn, 0, q.N)
	defer runtime.KeepAlive(&kept)
	var refused int
	for range q.N {
		c, err := d.Dial("tcp", q.To)
		if err != nil {
			refused++
			continue
		}
		if err := echoOnce(c, "hello"); err != nil {
			return fmt.Errorf("a connection that was accepted: %w", err)
		}
		kept = append(kept, c)
	}
	fmt.Println("refused", refused)
	fmt.Println("ready")
	time.Sleep(10 * time.Minute)
	return nil
}

// Without descriptors new connections are refused at once, those that there are
// go on, the log says it a few times, not each time, and it is over when it is
// over.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	before := w.lab.Snapshot(w.machine)
	daemon := w.daemonCommand(strings.Replace(w.config(second), `"debug"`, `"info"`, 1))
	shell := exec.Command("sh", append([]string{"-c", `ulimit -n 256; exec "$@"`, "sh"}, daemon.Args...)...)
	d := w.startCommand(w.self.Command(shell))
	old := w.startProbe(inside, probe{Do: "chat", To: port(far4, 7000)})
	const limit, crowd = 256, 1000
	p := w.startProbe(inside, probe{Do: "crowd", To: port(far4, 7000), N: crowd, Wait: 2 * time.Second})
	var refused int
	if _, err := fmt.Sscanf(p.Output(), "refused %d", &refused); err != nil || refused < crowd-limit {
		t.Errorf("of %d connections %d were refused, with %d descriptors: %s", crowd, refused, limit, p.Output())
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Pid))
	if err != nil || len(open) > limit*9/10 || len(open) < limit/4 {
		t.Errorf("%d descriptors are open, %v; want nine tenths of %d at most", len(open), err, limit)
	}
	w.status() // the control socket answers
	p.Signal(syscall.SIGKILL)
	_ = p.Wait()
	labtest.Eventually(t, patience(), func() bool {
		return w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x", Wait: 500 * time.Millisecond}).Heard == "x"
	}, "new connections when descriptors are free again")
	if old.Exited() {
		t.Errorf("the old connection: %v %s", old.Wait(), old.Output())
	}
	for _, once := range []string{"new flows are refused", "new flows are served again"} {
		if n := strings.Count(d.Output(), once); n != 1 {
			t.Errorf("%q is said %d times:\n%.4000s", once, n, d.Output())
		}
	}
	if n := strings.Count(d.Output(), "\n"); n > 40 {
		t.Errorf("%d lines of log:\n%.4000s", n, d.Output())
	}
	w.noLeak("out of descriptors")
	d.stop()
	w.unchanged(before, "stopped")
}

// A crowd on whose connections nothing moves takes all the room there is, of
// descriptors or, where there are enough, of memory; the idlest of them give way to
// others, and that is counted.
func TestIdleCrowdGivesWay(t *testing.T) {
	if !labtest.Soak() {
		return // half a minute of silence: TestIdleConnectionsMakeRoom has a clock of its own
	}
	t.Run("descriptors", func(t *testing.T) { idleCrowd(t, 3000, 3000, "") })
	t.Run("memory", func(t *testing.T) { idleCrowd(t, 10_000, 7000, "[limits]\nmemory = \"128MiB\"\n") })
}

func idleCrowd(t *testing.T, descriptors, crowd int, limits string) {
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	daemon := w.daemonCommand(strings.Replace(w.config(second)+limits, `"debug"`, `"info"`, 1))
	shell := exec.Command("sh", append([]string{"-c", fmt.Sprintf(`ulimit -n %d; exec "$@"`, descriptors), "sh"}, daemon.Args...)...)
	w.startCommand(w.self.Command(shell))
	old := w.startProbe(inside, probe{Do: "chat", To: port(far4, 7000)})
	p := w.startProbe(inside, probe{Do: "crowd", To: port(far4, 7000), N: crowd, Wait: 20 * time.Second})
	t.Log(strings.TrimSpace(p.Output()))
	began := time.Now()
	labtest.Eventually(t, time.Minute, func() bool {
		return w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far6, 7000), Say: "x", Wait: 500 * time.Millisecond}).Heard == "x"
	}, "room for another one")
	n := w.status().Counters.TurnedAwayTotal["idle"]
	t.Logf("room after %v, %d idle connections have ended", time.Since(began).Round(time.Second), n)
	if n == 0 || old.Exited() {
		t.Errorf("%d idle connections have ended; one that is used: %s", n, old.Output())
	}
}
