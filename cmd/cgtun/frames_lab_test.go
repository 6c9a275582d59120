package main_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

func init() { probes["frames"] = frames }

// frames hands datagrams to To, ten each, to a device by packet(7): by its queues
// and beside them. What is refused is no error.
func frames(q probe) error {
	dev, err := net.InterfaceByName(q.Device)
	if err != nil {
		return err
	}
	far := netip.MustParseAddr(q.To)
	own, ether := netip.MustParseAddr("10.1.0.2"), uint16(unix.ETH_P_IP)
	if far.Is6() {
		own, ether = netip.MustParseAddr("fd01::2"), unix.ETH_P_IPV6
	}
	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, dev.HardwareAddr...)
	frame = binary.BigEndian.AppendUint16(frame, ether)
	frame = append(frame, datagram(own, far, 8888, 7777)...)
	for _, beside := range []int{0, 1} {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		// If it is refused, a frame is sent by the queues once more.
		_ = unix.SetsockoptInt(fd, unix.SOL_PACKET, 20, beside) // PACKET_QDISC_BYPASS
		for range 10 {
			_ = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Protocol: ether<<8 | ether>>8, Ifindex: dev.Index, Halen: 6})
		}
	}
	fmt.Println("ready")
	return nil
}

// Frames that a selected process with CAP_NET_RAW hands to a device itself leave
// neither home nor a namespace that is attached, nor by a device that comes later;
// those of others do. After a kill they leave again, or not where that is closed.
func TestFramesDoNotLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.routed()
	d := w.start(w.config(second))
	inner := w.lab.Host("inner")
	w.lab.Link(inner, w.machine, "10.50.9.2/24", "10.50.9.1/24", "fd50:9::2/64", "fd50:9::1/64")
	inner.Run("ip", "route", "add", "default", "via", "10.50.9.1")
	hand := func(h *labtest.Host, c *labtest.Cgroup, device, far string) {
		t.Helper()
		cmd := c.In(context.Background(), h, os.Args[0])
		cmd.Env = append(os.Environ(), probeArgs(probe{Do: "frames", Device: device, To: far})[0])
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	before := w.status().Counters.TurnedAwayTotal["frames"]
	for _, far := range []string{far4, far6} {
		hand(w.machine, w.sel, "eth0", far)
		w.noLeak("from home to " + far)
	}
	if n := w.status().Counters.TurnedAwayTotal["frames"] - before; n != 2*(20+2) {
		t.Errorf("%d counted, want 44", n)
	}
	w.lab.StartCommand(w.sel.In(context.Background(), inner, "sleep", "100"))
	labtest.Eventually(t, patience(), func() bool {
		all := w.attachments()
		return len(all) == 1 && all[0].State == attach.StateUp
	}, "the other namespace is attached")
	hand(inner, w.sel, "eth0", far4)
	w.noLeak("from another namespace")

	w.lab.Link(w.machine, w.router, "10.7.0.2/24", "10.7.0.1/24")
	late := w.router.MeterMatch(`iifname "eth3" udp dport 7777`)
	labtest.Eventually(t, patience(), func() bool {
		late.Reset()
		hand(w.machine, w.sel, "eth3", far4)
		return late.Packets() == 0
	}, "a device that came later")

	hand(w.machine, w.lab.Cgroup("other"), "eth0", far4)
	if n := w.leaks.Packets(); n != 20 {
		t.Errorf("%d of 20 frames of others arrived", n)
	}
	w.leaks.Reset()
	d.stop()
	hand(w.machine, w.sel, "eth0", far4)
	if n := w.leaks.Packets(); n != 20 {
		t.Errorf("%d of 20 frames arrived after the end", n)
	}

	inward := w.machine.MeterMatch(`iifname "eth2" udp dport 7777`)
	arrive := func(when string, want uint64) {
		t.Helper()
		inward.Reset()
		hand(inner, w.sel, "eth0", far4)
		if n := inward.Packets(); n != want {
			t.Errorf("%s: %d frames arrived from another namespace, want %d", when, n, want)
		}
	}
	for _, tt := range []struct {
		config   string
		arriving uint64
		filter   bool // one is left
	}{{w.config(second), 20, true}, {w.closedConfig(), 0, false}} {
		arrive("not started", 20)
		d := w.start(tt.config)
		labtest.Eventually(t, patience(), func() bool {
			all := w.attachments()
			return len(all) == 1 && all[0].State == attach.StateUp
		}, "the other namespace is attached")
		arrive("started", 0)
		d.kill()
		arrive("killed", tt.arriving)
		if out, errs, code := w.cgtun("cleanup"); code != 0 || tt.filter && !strings.Contains(out, "removed filters of ") {
			t.Errorf("cleanup: %d %s %s", code, out, errs)
		}
	}
	arrive("cleaned up", 20)
	if out := inner.Run("tc", "qdisc"); strings.Contains(out, "clsact") {
		t.Errorf("left in the other namespace: %s", out)
	}
}
