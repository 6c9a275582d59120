package main_test

import (
	"net/netip"
	"strings"
	"testing"
)

// Streams, datagrams, ping and an IP protocol that cgtun does not carry, of
// both families, by processes that start in the cgroup and by ones that are
// moved there: carried over the second link or refused, never by the uplink.
func TestNoPacketOfSelectedLeaks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ping")
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	w.start(w.config(second))
	for _, at := range []where{inside, moved} {
		for _, far := range []string{far4, far6} {
			for _, network := range []string{"tcp", "udp"} {
				a := w.probe(at, probe{Do: "dial", Network: network, To: port(far, 7000), Say: "hello"})
				if a.Heard != "hello" || a.Errno != "" {
					t.Errorf("%v: %s to %s: %+v", at, network, far, a)
				}
				w.noLeak(at.String() + " " + network + " " + far)
			}
			a := w.probe(at, probe{Do: "raw", To: far, Proto: 132, Say: "an SCTP packet, as it were", N: 3})
			if a.Errno != "" {
				t.Errorf("%v: protocol 132 to %s: %+v", at, far, a)
			}
			w.noLeak(at.String() + " protocol 132 " + far)
			out, err := w.try(at, "ping", "-c2", "-i0.2", "-W1", far)
			if err == nil && !strings.Contains(out, " 0% packet loss") {
				t.Errorf("%v: ping %s: %s", at, far, out)
			}
			w.noLeak(at.String() + " ping " + far)
		}
	}
}

// The server sees who it was: own sockets leave by the second link.
func TestOutsideNeverTouchesTheDevice(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ping")
	echo := w.server.ServeEcho(":7000")
	w.start(w.config(second))
	sent, received := w.device()
	for _, far := range []string{far4, far6} {
		if a := w.probe(outside, probe{Do: "dial", Network: "tcp", To: port(far, 7000), Say: "hello"}); a.Heard != "hello" {
			t.Errorf("tcp to %s: %+v", far, a)
		}
		w.run(outside, "ping", "-c1", "-W2", far)
	}
	if s, r := w.device(); s != sent || r != received {
		t.Errorf("tun0 moved %d and %d packets more", s-sent, r-received)
	}
	for i, want := range []string{"10.1.0.2", "fd01::2"} {
		if got := echo.Clients()[i].Addr(); got != netip.MustParseAddr(want) {
			t.Errorf("the server saw %v, want %s", got, want)
		}
	}
	if n := w.leaks.Packets(); n == 0 {
		t.Error("the meter of the uplink counts nothing: it would not see a leak either")
	}
}
