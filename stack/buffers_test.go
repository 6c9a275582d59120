package stack_test

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/stack"
)

const limit = 256 << 20

// What a client that takes nothing can have waiting for it is less when the
// memory is half full.
func TestSendBufferFollowsTheMemory(t *testing.T) {
	for _, tt := range []struct {
		name        string
		used, limit int64
		least, most int
	}{
		{"empty", 0, limit, 128 << 10, 4 << 20},
		{"a third full", limit / 3, limit, 64 << 10, 120 << 10},
		{"half full", limit / 2, limit, 16 << 10, 32 << 10},
		{"nearly full", limit / 32 * 31, limit, 16 << 10, 32 << 10},
		{"far beyond", 1 << 40, 1, 16 << 10, 32 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := stack.NewBuffers()
			b.Fit(tt.used, tt.limit)
			taken := make(chan int, 1)
			w, _ := startWireFor(t, streamFunc(func(_ context.Context, s flow.Stream) {
				c, err := s.Accept()
				if err != nil {
					return
				}
				_ = c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)) // nothing tells that it takes no more
				n, _ := c.Write(make([]byte, 8<<20))
				taken <- n
				_ = c.Close()
			}), stack.Options{TCP: stack.TCPOptions{Buffers: b, Linger: time.Second}})
			h := &hand{t: t, w: w, port: 4100, seq: 1}
			h.shake()
			w.burst(h.segment(header.TCPFlagAck, nil))
			if n := <-taken; n < tt.least || n > tt.most {
				t.Errorf("%d bytes were taken, want %d to %d", n, tt.least, tt.most)
			}
			w.burst(h.segment(header.TCPFlagRst, nil))
		})
	}
}

// With the memory nearly full a client is held to 4 KiB, whatever it was
// promised; later it can send the rest, and nothing is lost.
func TestCutReceiveBufferLosesNothing(t *testing.T) {
	b := stack.NewBuffers()
	read, got := make(chan struct{}), make(chan []byte, 1)
	w, s := startWireFor(t, streamFunc(func(_ context.Context, s flow.Stream) {
		c, err := s.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		<-read
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		all, _ := io.ReadAll(c)
		got <- all
	}), stack.Options{TCP: stack.TCPOptions{Buffers: b}})
	h := &hand{t: t, w: w, port: 4101, seq: 1}
	h.shake()
	first := h.seq
	w.burst(h.segment(header.TCPFlagAck, nil))
	labtest.Eventually(t, 10*time.Second, func() bool { return s.Stats().Accepted == 1 }, "the handshake is done")
	b.Fit(limit/8*7, limit)
	if n := s.Stats().Cut; n != 1 {
		t.Errorf("%d buffers were cut, want 1", n)
	}
	want := pattern(24_000, 5)
	// acked sends what is not acknowledged, and returns how much then is.
	acked := 0
	send := func() {
		h.seq = first + uint32(acked)
		for rest := want[acked:]; len(rest) > 0; rest = rest[min(1200, len(rest)):] {
			w.burst(h.segment(header.TCPFlagAck, rest[:min(1200, len(rest))]))
		}
		for {
			tcp := w.tcpFrom(h.port, header.TCPFlagAck)
			if tcp == nil {
				return
			}
			acked = max(acked, int(tcp.AckNumber()-first))
			if acked == len(want) {
				return
			}
		}
	}
	send()
	if acked > 12_000 {
		t.Errorf("%d bytes were taken with a buffer of 4 KiB", acked)
	}
	b.Fit(0, limit)
	close(read)
	labtest.Eventually(t, 20*time.Second, func() bool { send(); return acked == len(want) }, "all is taken")
	h.seq = first + uint32(len(want))
	w.burst(h.segment(header.TCPFlagAck|header.TCPFlagFin, nil))
	if all := <-got; !bytes.Equal(all, want) {
		t.Errorf("%d bytes arrived, or others, want %d", len(all), len(want))
	}
}
