package stack_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/stack"
)

// streamFunc handles streams by a function.
type streamFunc func(context.Context, flow.Stream)

func (f streamFunc) ServeStream(ctx context.Context, s flow.Stream)  { f(ctx, s) }
func (streamFunc) ServePackets(_ context.Context, c flow.PacketConn) { c.Close() }

// tcpFrom is the next segment to a port with all of these flags; nil: none came.
func (w *wire) tcpFrom(port uint16, flags header.TCPFlags) header.TCP {
	return w.tcpThat(port, flags, flags)
}

// tcpThat is the same with flags, and no others of mask.
func (w *wire) tcpThat(port uint16, mask, flags header.TCPFlags) (tcp header.TCP) {
	pkt := w.answer(func(b []byte) bool {
		return len(b) >= 40 && b[9] == 6 && binary.BigEndian.Uint16(b[22:]) == port && header.TCP(b[20:]).Flags()&mask == flags
	})
	if pkt == nil {
		return nil
	}
	return header.TCP(pkt[20:])
}

// hand is a client whose segments are made by hand.
type hand struct {
	t        *testing.T
	w        *wire
	port     uint16
	seq, ack uint32
}

// segment is the next one.
func (h *hand) segment(flags header.TCPFlags, data []byte) wirePacket {
	pkt := encode(header.TCPFields{SrcPort: h.port, DstPort: 80, SeqNum: h.seq, AckNum: h.ack,
		DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535}, data)
	h.seq += uint32(len(data))
	if flags&(header.TCPFlagSyn|header.TCPFlagFin) != 0 {
		h.seq++
	}
	return wirePacket{pkt: pkt}
}

// shake sends a SYN behind other segments and notes the answer.
func (h *hand) shake(before ...wirePacket) {
	h.t.Helper()
	h.w.burst(append(before, h.segment(header.TCPFlagSyn, nil))...)
	h.shaken()
}

func (h *hand) shaken() {
	h.t.Helper()
	tcp := h.w.tcpThat(h.port, header.TCPFlagSyn|header.TCPFlagRst, header.TCPFlagSyn)
	if tcp == nil || tcp.AckNumber() != h.seq {
		h.t.Fatalf("the SYN was not answered by SYN-ACK within a second: %v", tcp)
	}
	h.ack = tcp.SequenceNumber() + 1
}

// A client that uses its port again the moment the connection before it has
// ended is connected at once, whoever closed first.
func TestPortIsUsedAgainAtOnce(t *testing.T) {
	for _, tt := range []struct {
		name        string
		serverFirst bool
		rounds      int
	}{{"server closes first", true, 50}, {"client closes first", false, 300}} {
		t.Run(tt.name, func(t *testing.T) {
			w, _ := startWireFor(t, streamFunc(func(_ context.Context, s flow.Stream) {
				c, err := s.Accept()
				if err != nil {
					return
				}
				if !tt.serverFirst {
					_, _ = io.Copy(io.Discard, c)
				}
				c.Close()
			}), stack.Options{})
			h := &hand{t: t, w: w, port: 4000, seq: 1}
			h.shake()
			for range tt.rounds {
				last := []wirePacket{h.segment(header.TCPFlagAck, nil)}
				if !tt.serverFirst {
					last = append(last, h.segment(header.TCPFlagAck|header.TCPFlagFin, nil))
				}
				w.burst(last...)
				fin := w.tcpFrom(h.port, header.TCPFlagFin)
				if fin == nil {
					t.Fatal("the stack did not close its side")
				}
				h.ack = fin.SequenceNumber() + 1
				flags := header.TCPFlags(header.TCPFlagAck)
				if tt.serverFirst {
					flags |= header.TCPFlagFin
				}
				end := h.segment(flags, nil)
				h.seq += 100_000
				h.ack = 0
				h.shake(end)
			}
		})
	}
}

// A SYN for a connection that lives is challenged (RFC 5961), and does not end
// it.
func TestSYNDoesNotEndALiveConnection(t *testing.T) {
	w, s := startWire(t, stack.Options{})
	h := &hand{t: t, w: w, port: 4001, seq: 1}
	h.shake()
	w.burst(h.segment(header.TCPFlagAck, nil))
	labtest.Eventually(t, 10*time.Second, func() bool { return s.Stats().Accepted == 1 }, "the handshake is done")
	other := *h
	other.seq, other.ack = 77_777, 0
	w.burst(other.segment(header.TCPFlagSyn, nil))
	tcp := w.tcpThat(h.port, header.TCPFlagSyn|header.TCPFlagRst|header.TCPFlagAck, header.TCPFlagAck)
	if tcp == nil || tcp.AckNumber() != h.seq {
		t.Errorf("the SYN was answered by %v, want an ACK of %d", tcp, h.seq)
	}
	if st := s.Stats(); st.Conns != 1 || st.LateSYN != 1 {
		t.Errorf("%d connections, %d late SYNs; want 1 and 1", st.Conns, st.LateSYN)
	}
}

// A client that sends and resets before anybody could read: all that it sent
// arrives.
func TestResetBehindTheFirstBytes(t *testing.T) {
	const rounds = 300
	type got struct {
		data []byte
		err  error
	}
	ends := make(chan got, rounds)
	w, s := startWireFor(t, streamFunc(func(_ context.Context, s flow.Stream) {
		c, err := s.Accept()
		if err != nil {
			ends <- got{nil, err}
			return
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		data, err := io.ReadAll(c)
		ends <- got{data, err}
	}), stack.Options{})
	want := bytes.Repeat([]byte("before"), 200)
	lost := 0
	for i := range rounds {
		h := &hand{t: t, w: w, port: uint16(5000 + i), seq: uint32(i)}
		h.shake()
		w.burst(h.segment(header.TCPFlagAck, nil), h.segment(header.TCPFlagAck|header.TCPFlagPsh, want), h.segment(header.TCPFlagRst, nil))
		if g := <-ends; !bytes.Equal(g.data, want) {
			lost++
			t.Logf("%d bytes of %d, %v", len(g.data), len(want), g.err)
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d clients lost what they had sent", lost, rounds)
	}
	// A client that resets without a byte is not kept.
	h := &hand{t: t, w: w, port: 4999, seq: 7}
	h.shake()
	w.burst(h.segment(header.TCPFlagRst, nil))
	select {
	case g := <-ends:
		if g.err == nil {
			t.Error("a client that reset was served")
		}
	case <-time.After(5 * time.Second):
		t.Error("a client that reset in its handshake holds the flow")
	}
	labtest.Eventually(t, 10*time.Second, func() bool { return s.Stats().Conns == 0 }, "connections are left")
}

// A client that resets in its handshake and tries again from the same port is
// connected.
func TestPortIsUsedAgainAfterReset(t *testing.T) {
	w, _ := startWireFor(t, streamFunc(func(_ context.Context, s flow.Stream) {
		if c, err := s.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}
	}), stack.Options{})
	h := &hand{t: t, w: w, port: 4002, seq: 1}
	h.shake()
	for range 200 {
		last := []wirePacket{h.segment(header.TCPFlagAck, nil), h.segment(header.TCPFlagRst, nil)}
		h.seq += 100_000
		h.ack = 0
		h.shake(last...)
	}
}

// That both sides have ended in order is no break: what the client sent before
// its end may take the server long to read.
func TestEndOfBothSidesIsNoBreak(t *testing.T) {
	type direct interface {
		flow.Conn
		Notify(func(readable, writable, ended bool))
	}
	for _, reset := range []bool{false, true} {
		broke, over := make(chan struct{}), make(chan struct{})
		var once sync.Once
		w, s := startWireFor(t, streamFunc(func(_ context.Context, s flow.Stream) {
			conn, err := s.Accept()
			if err != nil {
				return
			}
			c := conn.(direct)
			c.Notify(func(_, _, ended bool) {
				if ended {
					once.Do(func() { close(broke) })
				}
			})
			_ = c.CloseWrite()
			<-over
			c.Notify(nil)
			c.Close()
		}), stack.Options{})
		h := &hand{t: t, w: w, port: 4003, seq: 1}
		h.shake()
		w.burst(h.segment(header.TCPFlagAck, nil))
		fin := w.tcpFrom(h.port, header.TCPFlagFin)
		if fin == nil {
			t.Fatal("the stack did not close its side")
		}
		h.ack = fin.SequenceNumber() + 1
		flags := header.TCPFlags(header.TCPFlagAck | header.TCPFlagFin)
		if reset {
			flags = header.TCPFlagRst
		}
		w.burst(h.segment(flags, nil))
		labtest.Eventually(t, 10*time.Second, func() bool { return s.Endpoints() == 0 }, "the connection has ended")
		if reset {
			<-broke
		}
		close(over)
		select {
		case <-broke:
			if !reset {
				t.Error("the end of both sides was told as a break")
			}
		default:
		}
	}
}
