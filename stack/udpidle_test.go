package stack

import (
	"context"
	"io"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/flow"
)

func sourceN(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(n >> 8), byte(n)}), 4000)
}

func TestLongestIdleSessionMakesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, _, sources := startUDP(t, UDPOptions{Sessions: 3})
		send := func(src netip.AddrPort) {
			u.packet(local, udpPacket(src, server4, []byte("x")))
			time.Sleep(time.Millisecond)
		}
		var conns []flow.PacketConn
		for n := range 3 {
			send(sourceN(n))
			conns = append(conns, <-sources)
			readOne(t, conns[n])
		}
		send(sourceN(0))                                             // used again by its client
		_, _ = conns[1].WriteBatch([]flow.Datagram{{Peer: server4}}) // and this by its server
		time.Sleep(time.Millisecond)
		send(sourceN(3))
		<-sources
		if _, err := conns[2].ReadBatch(make([]flow.Datagram, 1)); err != io.EOF {
			t.Errorf("the idle one: %v, want EOF", err)
		}
		if got := u.counters(); got.Sessions != 3 || got.Evicted != 1 {
			t.Errorf("counters %+v", got)
		}
		readOne(t, conns[0]) // lives
	})
}

// Where memory is short, the sessions that there are make room for new ones.
func TestSessionsAreNoMoreWhereMemoryIsShort(t *testing.T) {
	u, _, _ := startUDP(t, UDPOptions{Sessions: 40})
	open := func(from, to int) int {
		for n := from; n < to; n++ {
			u.packet(local, udpPacket(sourceN(n), server4, nil))
		}
		return u.counters().Sessions
	}
	tight := true
	u.cfg.Tight = func() bool { return tight }
	if n := open(0, 20); n != 5 {
		t.Errorf("%d sessions, want the few that there always may be", n)
	}
	tight = false
	open(20, 30)
	tight = true
	if n := open(30, 50); n != 15 {
		t.Errorf("%d sessions, want no more than there were", n)
	}
}

// Sessions that have ended and are not gone yet are no more than half of those that
// there may be: more are not opened meanwhile.
func TestEndedSessionsThatAreNotGoneAreBounded(t *testing.T) {
	release := make(chan struct{})
	u := newUDP(udpConfig{Proto: flow.UDP, UDPOptions: UDPOptions{Sessions: 32}, Write: new(fakeTun).write, Handler: packetsHandler{func(_ context.Context, c flow.PacketConn) {
		c.Begun()
		<-release
	}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = u.run(ctx) }()
	for n := range 100 {
		u.packet(local, udpPacket(sourceN(n), server4, nil))
		for n < 48 && u.handlers.Load() <= int64(n) { // it has not begun
			time.Sleep(time.Millisecond)
		}
	}
	if got := u.handlers.Load(); got > 48 {
		t.Errorf("%d sessions are there, ended ones too, want 48 at most", got)
	}
	close(release)
	for u.handlers.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
	u.packet(local, udpPacket(sourceN(99), server4, nil))
	// It may end before it has the datagram, which then opens another one.
	if got := u.counters(); got.Opened < 49 || got.QueueFull == 0 {
		t.Errorf("counters %+v", got)
	}
	cancel()
	<-done
}

func TestSourceCannotTakeAllSessions(t *testing.T) {
	u, _, sources := startUDP(t, UDPOptions{Sessions: 100, SessionsPerSource: 2})
	u.packet(local, udpPacket(sourceN(7), server4, nil))
	first := <-sources
	for port := range 50 {
		u.packet(local, udpPacket(netip.AddrPortFrom(client4.Addr(), uint16(1000+port)), server4, nil))
	}
	if got := u.counters(); got.Sessions != 3 || got.Evicted != 48 {
		t.Errorf("counters %+v", got)
	}
	if len(u.sources) != 2 || u.idle.Len() != 3 {
		t.Errorf("%d source lists, %d in the idle list", len(u.sources), u.idle.Len())
	}
	readOne(t, first)
}

func TestIdleSessionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, _, sources := startUDP(t, UDPOptions{})
		web := netip.MustParseAddrPort("192.0.2.7:443")
		u.packet(local, udpPacket(sourceN(1), server4, nil)) // DNS
		dns := <-sources
		u.packet(local, udpPacket(sourceN(2), web, nil))
		quic := <-sources
		readOne(t, dns)
		readOne(t, quic)
		ended := func(c flow.PacketConn, want time.Duration) {
			start := time.Now()
			if _, err := c.ReadBatch(make([]flow.Datagram, 1)); err != io.EOF {
				t.Errorf("read: %v, want EOF", err)
			}
			if got := time.Since(start); got < want || got > want+2*sweepEvery {
				t.Errorf("ended after %v, want %v", got, want)
			}
		}
		ended(dns, 30*time.Second)
		_, _ = quic.WriteBatch([]flow.Datagram{{Peer: web}}) // not idle
		ended(quic, 5*time.Minute)
		if got := u.counters(); got.Sessions != 0 || got.Evicted != 0 {
			t.Errorf("counters %+v", got)
		}
		// The next datagram begins a new one.
		u.packet(local, udpPacket(sourceN(1), server4, nil))
		if c := <-sources; c == dns {
			t.Error("an ended session came back")
		}
	})
}

// What a flood leaves goes soon, but for as many sessions as anybody has, and for
// those that are used.
func TestManyIdleSessionsEndSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const sessions, few = 64, 8
		u, _, sources := startUDP(t, UDPOptions{Sessions: sessions})
		web := netip.MustParseAddrPort("192.0.2.7:443")
		for n := range sessions {
			u.packet(local, udpPacket(sourceN(n), web, nil))
			_, _ = (<-sources).WriteBatch([]flow.Datagram{{Peer: web}})
		}
		for range 6 {
			time.Sleep(10 * time.Second)
			for n := range few + 2 {
				u.packet(local, udpPacket(sourceN(n), web, nil))
			}
		}
		if n := u.counters().Sessions; n != few+2 {
			t.Errorf("%d sessions a minute later, want the %d that are used", n, few+2)
		}
		time.Sleep(time.Minute)
		if n := u.counters().Sessions; n != few {
			t.Errorf("%d sessions after another minute, want %d", n, few)
		}
	})
}

// Where there are many, those that nobody has answered go soon, the others stay.
func TestUnansweredSessionsEndSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const answered, few, many = 5, 10, 20
		u, _, sources := startUDP(t, UDPOptions{Sessions: few * 64})
		web := netip.MustParseAddrPort("192.0.2.7:443")
		for n := range many {
			u.packet(local, udpPacket(sourceN(n), web, nil))
			if c := <-sources; n < answered {
				_, _ = c.WriteBatch([]flow.Datagram{{Peer: web}})
			}
		}
		time.Sleep(45 * time.Second)
		if n := u.counters().Sessions; n != few {
			t.Errorf("%d sessions, want %d", n, few)
		}
		for n := range answered {
			if u.sessions[sourceN(n)] == nil {
				t.Errorf("session %d was answered, and is gone", n)
			}
		}
	})
}

// Where there are many, those that nobody can use any more go soon, answered or not.
func TestSessionsWithoutASocketEndSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const few, many = 10, 20
		left := func(sources []netip.AddrPort) []netip.AddrPort {
			return slices.DeleteFunc(sources, func(src netip.AddrPort) bool { return src == sourceN(0) || src == sourceN(1) })
		}
		u, _, sources := startUDP(t, UDPOptions{Sessions: few * 64})
		u.cfg.Left = left
		web := netip.MustParseAddrPort("192.0.2.7:443")
		open := func(from, to int) {
			for n := from; n < to; n++ {
				u.packet(local, udpPacket(sourceN(n), web, nil))
				_, _ = (<-sources).WriteBatch([]flow.Datagram{{Peer: web}})
			}
		}
		open(0, few)
		time.Sleep(time.Minute)
		if n := u.counters().Sessions; n != few {
			t.Errorf("%d sessions, want all %d: they are few", n, few)
		}
		open(few, many)
		time.Sleep(2 * sweepEvery)
		if n := u.counters().Sessions; n != many-few+2 {
			t.Errorf("%d sessions, want the new ones and the two with a socket", n)
		}
		time.Sleep(time.Minute)
		if n := u.counters().Sessions; n != 2 {
			t.Errorf("%d sessions a minute later, want 2", n)
		}
	})
}
