package main_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// Devices of every MTU, with what the kernel leaves to devices and without:
// streams, however they end, and datagrams of every size pass, on a path of 1,500
// bytes.
func TestEveryMTU(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ethtool")
	server := w.server.ServeExchange(":7001")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	orders := w.serveOrders(":7002")
	type device struct {
		mtu      int
		offloads bool
	}
	devices, n, size := []device{{1280, true}, {9000, false}, {65535, true}}, 30, 4<<20
	if labtest.Soak() {
		devices, n, size = nil, 1000, 1<<30
		for _, mtu := range []int{1280, 1500, 9000, 65535} {
			devices = append(devices, device{mtu, true}, device{mtu, false})
		}
	}
	for _, tt := range devices {
		text := strings.Replace(w.config(second), "[tun]", fmt.Sprintf("[tun]\nmtu = %d", tt.mtu), 1)
		d := w.start(text)
		if got := strings.Fields(w.machine.Run("ip", "-o", "link", "show", "dev", "tun0")); !strings.Contains(strings.Join(got, " "), fmt.Sprintf("mtu %d ", tt.mtu)) {
			t.Errorf("device: %v, want an MTU of %d", got, tt.mtu)
		}
		if !tt.offloads {
			for _, dev := range []string{"tun0", "eth1"} {
				w.machine.Run("ethtool", "-K", dev, "tx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off")
			}
		}
		for _, far := range []string{far4, far6} {
			for _, q := range []probe{
				{Do: "exchange", To: port(far, 7001), N: size}, {Do: "mix", To: port(far, 7002), N: n, Seed: int64(tt.mtu)},
				{Do: "sizes", To: port(far, 7000)},
			} {
				began := time.Now()
				if out, err := w.try(inside, "env", probeArgs(q)...); err != nil {
					t.Errorf("MTU %d, offloads %v, %s to %s: %v %s", tt.mtu, tt.offloads, q.Do, far, err, out)
				}
				if labtest.Soak() {
					t.Logf("MTU %d, offloads %v, %s of %d to %s: %v", tt.mtu, tt.offloads, q.Do, q.N, far, time.Since(began).Round(time.Millisecond))
				}
			}
		}
		d.stop()
	}
	if err := errors.Join(server.Err(), orders.Err()); err != nil {
		t.Error(err)
	}
	w.noLeak("every MTU")
}
