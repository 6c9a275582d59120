package stack_test

import (
	"context"
	"crypto/sha256"
	"runtime/metrics"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
	"cgtun/stack"
	"cgtun/tun"
)

// working takes the time of a router for each flow, whose outbound never connects.
type working struct{}

func (working) ServeStream(ctx context.Context, s flow.Stream) {
	work()
	s.Begun()
	work()
	<-ctx.Done()
	work()
}

func (working) ServePackets(_ context.Context, c flow.PacketConn) { c.Close() }

// work is two steps of 20 µs, each in a goroutine of its own.
func work() {
	for range 2 {
		done := make(chan [32]byte)
		go func() { done <- sha256.Sum256(make([]byte, 24<<10)) }()
		<-done
	}
}

// A flood of SYNs that is more than the processors can serve does not fill them with
// goroutines before which nobody else has a turn.
func TestFloodLeavesTheProcessorsToOthers(t *testing.T) {
	w, s := startWireFor(t, working{}, stack.Options{})
	runnable := []metrics.Sample{{Name: "/sched/goroutines/runnable:goroutines"}}
	var sum, looks uint64
	sent := 0
	for began := time.Now(); time.Since(began) < time.Second; {
		var burst []wirePacket
		for range 200 {
			burst = append(burst, wirePacket{tun.Offload{}, segment(uint16(1024+sent), uint16(80+sent>>16), header.TCPFlagSyn, uint32(sent), nil)})
			sent++
		}
		w.burst(burst...)
		time.Sleep(2 * time.Millisecond)
		metrics.Read(runnable)
		sum += runnable[0].Value.Uint64()
		looks++
	}
	t.Logf("%d SYNs, %d goroutines waited for a processor on average; %+v", sent, sum/looks, s.Stats())
	if sum/looks > 100 {
		t.Errorf("%d goroutines waited for a processor on average", sum/looks)
	}
}
