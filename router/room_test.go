package router_test

import (
	"io"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/router"
)

// isRefused tries a flow.
func isRefused(t *testing.T, r *router.Router) bool {
	t.Helper()
	c := newClient("198.51.100.1:80")
	done := serve(t, r, c)
	var why flow.Reason
	var accepted bool
	labtest.Eventually(t, 5*time.Second, func() bool {
		accepted, why = c.told(t)
		return accepted || why != flow.Closed
	}, "an answer")
	if accepted {
		_ = c.conn.Close()
	}
	wait(t, "end of the flow", done)
	return !accepted && why == flow.Refused
}

// Garbage that nobody has collected yet turns nobody away.
func TestGarbageIsNotMemoryInUse(t *testing.T) {
	const budget = 32 << 20
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	debug.FreeOSMemory()
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(io.Discard, c) })
	told := make(chan int64, 1000)
	r := route(t, router.Options{MaxMemory: budget, MemoryUsed: func(used, _ int64) { told <- used }}, out)
	for range 3 * budget >> 20 {
		runtime.KeepAlive(make([]byte, 1<<20))
	}
	stop := labtest.Background(t, "the router", r.Run)
	used := <-told
	if used > budget/2 {
		t.Errorf("%d MiB are said to be in use", used>>20)
	}
	if isRefused(t, r) {
		t.Error("a flow was refused")
	}
	stop()
}

// What flows have piled up turns new ones away, and they are served again when
// it is gone.
func TestMemoryIsBounded(t *testing.T) {
	const budget = 32 << 20
	debug.FreeOSMemory() // garbage of other tests is not what the router starts with
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(io.Discard, c) })
	r := route(t, router.Options{MaxMemory: budget}, out)
	defer labtest.Background(t, "the router", r.Run)()

	refused := func() bool { return isRefused(t, r) }
	if refused() {
		t.Fatal("refused with all of the memory free")
	}
	piled := make([]byte, 2*budget)
	for i := 0; i < len(piled); i += 4096 {
		piled[i] = 1
	}
	labtest.Eventually(t, 5*time.Second, refused, "new flows are refused")
	runtime.KeepAlive(piled)
	piled = nil
	// Nobody else collects garbage now: nothing is allocated any more.
	labtest.Eventually(t, 10*time.Second, func() bool { return !refused() }, "new flows are served again")
}
