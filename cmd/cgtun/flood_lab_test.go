package main_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/internal/labtest"
)

func init() {
	probes["steady"] = steady
	probes["flood"] = flood
}

// pace is what a steady client found.
type pace struct {
	N, Failed     int
	P50, P99, Max time.Duration
	Why           string // of the last failure
}

// steady connects, speaks and closes, again and again, until SIGTERM; then it
// prints a pace.
func steady(q probe) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	fmt.Println("ready")
	d := probeDialer(q)
	var found pace
	var took []time.Duration
	for {
		began := time.Now()
		c, err := d.Dial(q.Network, q.To)
		if err == nil {
			err = echoOnce(c, "hello")
			c.Close()
		}
		took = append(took, time.Since(began))
		if found.N++; err != nil {
			found.Failed++
			found.Why = err.Error()
		}
		select {
		case <-stop:
			slices.Sort(took)
			found.P50, found.P99, found.Max = took[len(took)/2], took[len(took)*99/100], took[len(took)-1]
			return json.NewEncoder(os.Stdout).Encode(found)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// flood sends N packets of the kind Say to the IPv4 address and port To, from the
// addresses of Device, "FIRST N": so many from FIRST on.
func flood(q probe) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to := netip.MustParseAddrPort(q.To)
	var first string
	var sources int
	if _, err := fmt.Sscanf(q.Device, "%s %d", &first, &sources); err != nil {
		return err
	}
	froms := []netip.Addr{netip.MustParseAddr(first)}
	for len(froms) < sources {
		froms = append(froms, froms[len(froms)-1].Next())
	}
	sa := &unix.SockaddrInet4{Addr: to.Addr().As4()}
	for i := range q.N {
		from, port := froms[i%sources], uint16(1024+i/sources%60000)
		for _, pkt := range floodPackets(q.Say, i, netip.AddrPortFrom(from, port), to) {
			err := unix.Sendto(fd, pkt, 0, sa)
			for errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN) {
				time.Sleep(time.Millisecond)
				err = unix.Sendto(fd, pkt, 0, sa)
			}
			// Of a source that is not the namespace's: the guard.
			if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("packet %d: %w", i, err)
			}
		}
		if i%100 == 99 {
			time.Sleep(500 * time.Microsecond) // what is more the device's queue loses
		}
	}
	return nil
}

// floodPackets is the i-th of a kind.
func floodPackets(kind string, i int, from, to netip.AddrPort) [][]byte {
	switch kind {
	case "syn":
		return [][]byte{ip4(from.Addr(), to.Addr(), unix.IPPROTO_TCP, 0, 0, tcpSYN(from, to, uint32(i)))}
	case "udp":
		return [][]byte{datagram(from.Addr(), to.Addr(), from.Port(), to.Port()+uint16(i%7))}
	}
	// Fragments: of datagrams that never end, that overlap, that are tiny, and that
	// would be longer than a packet can be.
	id, data := uint16(i), make([]byte, 1400)
	piece := func(offset int, more uint16, n int) []byte {
		return ip4(from.Addr(), to.Addr(), unix.IPPROTO_UDP, id, uint16(offset/8)|more<<13, data[:n])
	}
	switch i % 4 {
	case 0:
		return [][]byte{piece(0, 1, 1400)}
	case 1:
		return [][]byte{piece(0, 1, 800), piece(400, 1, 800), piece(0, 1, 1200), piece(800, 0, 8)}
	case 2:
		return [][]byte{piece(0, 1, 8), piece(8, 1, 8), piece(16, 0, 8)}
	}
	return [][]byte{piece(0, 1, 1400), piece(65528, 0, 1400), piece(65528, 1, 8)}
}

// ip4 is a packet; the kernel makes the sum.
func ip4(from, to netip.Addr, proto byte, id, fragment uint16, data []byte) []byte {
	b := []byte{0x45, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(20+len(data)))
	b = binary.BigEndian.AppendUint16(b, id)
	b = binary.BigEndian.AppendUint16(b, fragment)
	b = append(b, 64, proto, 0, 0)
	return append(append(append(b, from.AsSlice()...), to.AsSlice()...), data...)
}

func tcpSYN(from, to netip.AddrPort, seq uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0, 5<<4, 2, 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(append(from.Addr().AsSlice(), to.Addr().AsSlice()...), 0, unix.IPPROTO_TCP, 0, byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], checksum(append(pseudo, b...)))
	return b
}

// floodPhase is one flood; the box has the nft rule meanwhile.
type floodPhase struct {
	name, rule string
	q          probe
}

// floodPhases come from the addresses real and spoofed, in full in the soak form.
func floodPhases(real, spoofed string) []floodPhase {
	n := func(short, soak int) int {
		if labtest.Soak() {
			return soak
		}
		return short
	}
	hole, server := "203.0.113.99:80", port(far4, 7000)
	return []floodPhase{
		{"nothing", "", probe{Do: "flood", Say: "syn", To: hole, N: 1, Device: real}}, // to compare with
		{"F1 SYNs that nobody answers", "", probe{Do: "flood", Say: "syn", To: hole, N: n(10_000, 200_000), Device: real}},
		{"F1 SYNs of others", "", probe{Do: "flood", Say: "syn", To: server, N: n(5_000, 200_000), Device: spoofed}},
		{"F1 handshakes without an end", "tcp flags & rst == rst drop", probe{Do: "flood", Say: "syn", To: server, N: n(5_000, 200_000), Device: real}},
		{"F6 handshakes that are reset", "", probe{Do: "flood", Say: "syn", To: server, N: n(5_000, 100_000), Device: real}},
		{"F5 connects to a black hole", "", probe{Do: "many", Network: "tcp", To: hole, N: n(2_500, 10_000), Wait: 2 * time.Second}},
		{"F2 datagrams of many flows", "", probe{Do: "flood", Say: "udp", To: server, N: n(10_000, 200_000), Device: real}},
		{"F3 fragments", "", probe{Do: "flood", Say: "fragments", To: server, N: n(5_000, 200_000), Device: real}},
	}
}

// beside returns what steady clients in the selected cgroup find while the box floods:
// by TCP and by UDP.
func (p floodPhase) beside(w *world, box *labtest.Host) (found [2]pace) {
	w.t.Helper()
	if p.rule != "" {
		box.Run("nft", "add table inet mute; add chain inet mute o { type filter hook output priority 0; }; add rule inet mute o "+p.rule)
		defer box.Run("nft", "delete table inet mute")
	}
	var others [2]*labtest.Proc
	for i, network := range []string{"tcp", "udp"} {
		others[i] = w.startProbe(inside, probe{Do: "steady", Network: network, To: port(far4, 7000), Wait: 10 * time.Second})
	}
	if _, err := box.Try("env", probeArgs(p.q)...); err != nil {
		w.t.Errorf("%s: %v", p.name, err)
	}
	if p.q.N == 1 {
		time.Sleep(time.Second) // for as long is measured
	}
	for i, other := range others {
		other.Signal(syscall.SIGTERM)
		err := other.Wait()
		if _, text, _ := strings.Cut(other.Output(), "ready"); json.Unmarshal([]byte(text), &found[i]) != nil || found[i].N == 0 {
			w.t.Fatalf("%s: %v %s", p.name, err, other.Output())
		}
	}
	return found
}

// TestFloodsOfOneLeaveTheOthersAlone: whatever a container sends, others connect as
// before, the memory is bounded, and all is as it was some time later. The soak form
// compares with the kernel's own forwarding, which the machine does before cgtun
// starts.
//
//	machine                                  router ─── server
//	box (10.60.0.2, 10.60.1.0/24) ── cgtun ──  │  203.0.113.99: nobody answers
//	sel: steady ──────────────────── cgtun ────┘
func TestFloodsOfOneLeaveTheOthersAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	box := w.lab.Host("box")
	w.lab.Link(w.machine, box, "10.60.0.1/24", "10.60.0.2/24", "fd60::1/64", "fd60::2/64")
	box.Run("ip", "route", "add", "default", "via", "10.60.0.1")
	const sources = 100
	var add strings.Builder
	for i := range sources {
		fmt.Fprintf(&add, "addr add 10.60.1.%d/32 dev lo\n", 1+i)
	}
	box.Run("sh", "-c", "printf '"+add.String()+"' | ip -batch -")
	w.router.Run("ip", "route", "add", "blackhole", "203.0.113.99")
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	phases := floodPhases(fmt.Sprintf("10.60.1.1 %d", sources), "10.66.0.1 200")

	kernel := map[string][2]pace{}
	if labtest.Soak() {
		w.machine.Run("ip", "route", "add", "10.60.1.0/24", "via", "10.60.0.2")
		w.router.Run("ip", "route", "add", "10.60.0.0/15", "via", "10.1.0.2")
		w.machine.Forward()
		for _, p := range phases {
			kernel[p.name] = p.beside(w, box)
		}
		w.machine.Sysctl("net.ipv4.ip_forward", "0")
	}

	text := strings.Replace(strings.Replace(w.config(second), `"debug"`, `"warn"`, 1), "[select]", fmt.Sprintf("[select]\nnetns = [%q]", box.Name), 1)
	d := w.start(text)
	base, files := memoryOf(t, d.Pid, "VmRSS"), openSockets(t, d.Pid)
	for _, p := range phases {
		began := time.Now()
		found := p.beside(w, box)
		for i, network := range []string{"TCP", "UDP"} {
			f, k := found[i], kernel[p.name][i]
			t.Logf("%-29s others by %s: %4d, p50 %8v, p99 %8v, at most %8v, %d failed", p.name+":", network, f.N, ms(f.P50), ms(f.P99), ms(f.Max), f.Failed)
			if k.N > 0 {
				t.Logf("%29s beside the kernel: %4d, p50 %8v, p99 %8v, at most %8v, %d failed", "", k.N, ms(k.P50), ms(k.P99), ms(k.Max), k.Failed)
			}
			lost := 0
			if network == "UDP" {
				lost = 1 + f.N/50 // a datagram may be lost on a machine that is busy
			}
			if f.Failed > lost || labtest.Soak() && f.P99 > time.Second {
				t.Errorf("%s: another source: %+v", p.name, f)
			}
		}
		s, peak := w.status(), memoryOf(t, d.Pid, "VmHWM")
		t.Logf("%29s %v, %d flows live, at most %d MiB more", "", time.Since(began).Round(time.Millisecond), s.Counters.FlowsLive, (peak-base)>>20)
		if peak > base+256<<20 && !raceEnabled {
			t.Errorf("%s: %d MiB above the start", p.name, (peak-base)>>20)
		}
		if labtest.Soak() {
			w.settle(d, p.name, base, files)
		}
	}
	// Those of connections are gone.
	labtest.Eventually(t, time.Minute, func() bool { return w.living("tcp") == 0 }, "no connection is left")
	t.Logf("%d sockets at the start, %d now", files, openSockets(t, d.Pid))
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Errorf("after the floods: %+v", a)
	}
}

func ms(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

// living returns how many flows live, of a protocol or of all.
func (w *world) living(proto string) (n int) {
	for _, f := range w.flows() {
		if f.State != flow.StateClosed && (proto == "" || f.Proto == proto) {
			n++
		}
	}
	return n
}

// settle waits until what a flood has left is gone: of sources of datagrams 64 may
// stay for five minutes, in each of two namespaces.
func (w *world) settle(d *daemon, name string, base, files int) {
	w.t.Helper()
	ended := time.Now()
	for {
		rss, sockets := memoryOf(w.t, d.Pid, "VmRSS"), openSockets(w.t, d.Pid)
		took := time.Since(ended)
		done := rss < base+64<<20 && sockets < files+2*64+50
		if done || took > time.Minute {
			w.t.Logf("%29s %v later: %d MiB more than at the start, %d flows, %d sockets (%d at the start)", "", took.Round(time.Second), (rss-base)>>20, w.living(""), sockets, files)
			if !done {
				w.t.Errorf("%s: it has not gone", name)
			}
			return
		}
		time.Sleep(time.Second)
	}
}
