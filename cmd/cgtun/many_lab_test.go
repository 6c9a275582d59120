package main_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

// Thousands of connections at once; afterwards nothing is left of them.
func TestManyConnectionsAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := 1000
	if labtest.Soak() {
		n = 9000
	}
	// Not by splice, which takes three descriptors.
	w.server.Serve(":7000", func(c *net.TCPConn) error {
		_, err := io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 64))
		return err
	})
	d := w.start(w.config(second))
	before := resident(t, d.Pid)
	p := w.startProbe(inside, probe{Do: "hold", Network: "tcp", To: port(far4, 7000), N: n})
	if live := w.status().Counters.FlowsLive; live != uint64(n) {
		t.Errorf("%d flows live, want %d", live, n)
	}
	each := func() int { return (resident(t, d.Pid) - before) / n }
	if labtest.Soak() && !raceEnabled {
		// Of a thousand it would not show that their stacks are 8 KiB instead of 4.
		labtest.Eventually(t, patience(), func() bool { return each() < 17<<10 }, "idle connections are small")
	}
	t.Logf("%d connections: %d bytes each", n, each())
	p.Signal(unix.SIGKILL)
	_ = p.Wait()
	labtest.Eventually(t, 15*time.Second, func() bool { return w.status().Counters.FlowsLive == 0 }, "all flows have ended")
	labtest.Eventually(t, 15*time.Second, func() bool { return openSockets(t, d.Pid) < 20 }, "cgtun's sockets are closed")
	w.noLeak("many connections")
}

// resident returns the bytes of memory that a process has.
func resident(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, _ := strconv.Atoi(strings.Fields(string(text))[1])
	return pages * os.Getpagesize()
}

func openSockets(t *testing.T, pid int) (n int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, _ := os.Readlink(dir + e.Name()); strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}
