package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

func init() {
	probes["stall"] = stall
	probes["hoard"] = hoard
}

// swapped is what each side of a stalled connection sends: more than all
// buffers on the way hold together.
var swapped = sync.OnceValue(func() []byte {
	b := make([]byte, 768<<10)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
})

// swap writes at once, and reads only after read is closed.
func swap(c *net.TCPConn, read <-chan struct{}) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(swapped())
		sent <- errors.Join(err, c.CloseWrite())
	}()
	<-read
	buf := make([]byte, 16<<10)
	for n := 0; ; {
		m, err := c.Read(buf)
		if n+m > len(swapped()) || !bytes.Equal(buf[:m], swapped()[n:n+m]) {
			return fmt.Errorf("other bytes than were sent, at %d", n)
		}
		n += m
		switch {
		case err == io.EOF && n == len(swapped()):
			return <-sent
		case err == io.EOF:
			return fmt.Errorf("%d bytes of %d", n, len(swapped()))
		case err != nil:
			return err
		}
	}
}

// stall opens N connections on which it sends and does not read, until SIGUSR1;
// then it reads.
func stall(q probe) error {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGUSR1)
	read := make(chan struct{})
	ends := make(chan error, q.N)
	d := probeDialer(q)
	for i := range q.N {
		c, err := d.Dial("tcp", q.To)
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		go func() { ends <- swap(c.(*net.TCPConn), read) }()
	}
	fmt.Println("ready")
	<-told
	close(read)
	var failed []error
	for range q.N {
		if err := <-ends; err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d connections of %d failed: %w", len(failed), q.N, failed[0])
	}
	return nil
}

// memoryOf reads a line of /proc/PID/status, in bytes.
func memoryOf(t *testing.T, pid int, key string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatalf("no %s of process %d", key, pid)
	return 0
}

// A thousand connections whose ends send and do not read stay within
// [limits] memory, others go on beside them, and when they read at last nothing
// was lost.
func TestStalledFlowsStayWithinTheMemory(t *testing.T) {
	const limit = 256 << 20
	flows := 1000
	if raceEnabled {
		flows = 50 // the detector's own memory is many times that of a flow
	}
	w := newWorld(t)
	// The kernel's own buffers are no memory of cgtun's; small, they leave it more.
	for _, h := range []*labtest.Host{w.machine, w.server} {
		h.Sysctl("net.ipv4.tcp_rmem", "4096 32768 65536")
		h.Sysctl("net.ipv4.tcp_wmem", "4096 32768 65536")
	}
	read := make(chan struct{})
	var once sync.Once
	release := func() { once.Do(func() { close(read) }) }
	defer release()
	stalled := w.server.Serve(":7100", func(c *net.TCPConn) error { return swap(c, read) })
	w.server.ServeEcho(":7000")
	d := w.start(w.config(second))
	start := memoryOf(t, d.Pid, "VmRSS")
	old := w.startProbe(inside, probe{Do: "chat", To: port(far4, 7000)})
	p := w.startProbe(inside, probe{Do: "stall", To: port(far4, 7100), N: flows, Wait: 10 * time.Second})

	var moved uint64
	labtest.Eventually(t, time.Minute, func() bool {
		time.Sleep(500 * time.Millisecond) // a connection that has stalled is known by the time alone
		var now uint64
		for _, f := range w.flows() {
			if f.Dst.Port() == 7100 {
				now += uint64(f.UpBytes + f.DownBytes)
			}
		}
		same := now == moved
		moved = now
		return same
	}, "the connections have stalled")
	rss, peak := memoryOf(t, d.Pid, "VmRSS"), memoryOf(t, d.Pid, "VmHWM")
	t.Logf("start %d MiB, stalled %d MiB, at most %d MiB; %d MiB handed on", start>>20, rss>>20, peak>>20, moved>>20)
	for range 20 {
		if heard := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}).Heard; heard != "x" {
			t.Errorf("a new connection beside the stalled ones heard %q", heard)
		}
	}
	if old.Exited() {
		t.Errorf("the old connection: %v %s", old.Wait(), old.Output())
	}

	p.Signal(syscall.SIGUSR1)
	release()
	// 1.5 GiB, each way by two sides that compare it: minutes on a machine that is busy.
	labtest.Eventually(t, 6*time.Minute, p.Exited, "the connections have ended")
	if err := errors.Join(p.Wait(), stalled.Err()); err != nil {
		t.Errorf("%v\n%s", err, p.Output())
	}
	peak = memoryOf(t, d.Pid, "VmHWM")
	t.Logf("at most %d MiB until the end", peak>>20)
	if peak > start+limit && !raceEnabled {
		t.Errorf("%d MiB at most, want %d at the start and %d more", peak>>20, start>>20, limit>>20)
	}
	w.noLeak("stalled flows")
}

// hoard opens connections until one is refused, N at most, and only then sends on
// all of them; it never reads.
func hoard(q probe) error {
	d := probeDialer(q)
	var kept []net.Conn
	for len(kept) < q.N {
		c, err := d.Dial("tcp", q.To)
		if err != nil {
			break
		}
		kept = append(kept, c)
	}
	fmt.Println("opened", len(kept))
	for _, c := range kept {
		go func() { _, _ = c.Write(swapped()) }()
	}
	fmt.Println("ready")
	time.Sleep(10 * time.Minute)
	return nil
}

// As many connections as are let in, which all stall afterwards, stay within [limits]
// memory: it is kept free for what they may yet fill.
func TestEveryFlowThatIsLetInHasItsRoom(t *testing.T) {
	t.Parallel()
	limit, flows := 64<<20, 2500
	if labtest.Soak() {
		limit, flows = 256<<20, 15000
	}
	if raceEnabled {
		flows = 50
	}
	w := newWorld(t)
	for _, h := range []*labtest.Host{w.machine, w.server} {
		h.Sysctl("net.ipv4.tcp_rmem", "4096 32768 65536")
		h.Sysctl("net.ipv4.tcp_wmem", "4096 32768 65536")
	}
	end := make(chan struct{})
	var once sync.Once
	stop := func() { once.Do(func() { close(end) }) }
	defer stop()
	w.server.Serve(":7100", func(c *net.TCPConn) error {
		go func() { _, _ = c.Write(swapped()) }()
		<-end
		return nil
	})
	text := strings.Replace(w.config(second), `"debug"`, `"warn"`, 1) + fmt.Sprintf("[limits]\nmemory = \"%dMiB\"\n", limit>>20)
	d := w.start(text)
	w.server.ServeEcho(":7000")
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Fatalf("%+v", a)
	}
	// Pages of the program, which come when they are needed, are no memory of flows.
	const flowsMemory = "RssAnon"
	start := memoryOf(t, d.Pid, flowsMemory)
	p := w.startProbe(inside, probe{Do: "hoard", To: port(far4, 7100), N: flows, Wait: 2 * time.Second})
	peak, grown := 0, time.Now()
	labtest.Eventually(t, time.Minute, func() bool {
		if now := memoryOf(t, d.Pid, flowsMemory); now > peak {
			peak, grown = now, time.Now()
		}
		return time.Since(grown) > 3*time.Second // that nothing grows is known by the time alone
	}, "memory is full")
	t.Logf("%s: %d MiB at the start, %d MiB at most", strings.TrimSpace(strings.SplitN(p.Output(), "\n", 2)[0]), start>>20, peak>>20)
	// What the runtime had at its start without having touched it is the program's own.
	limit += limit / 8
	if peak > start+limit && !raceEnabled {
		t.Errorf("%d MiB at most, want %d at the start and %d more", peak>>20, start>>20, limit>>20)
	}
	p.Signal(syscall.SIGKILL)
	_ = p.Wait()
	stop()
}
