package main_test

import (
	"fmt"
	"strings"
	"testing"
)

// Devices of every MTU, with what the kernel leaves to devices and without:
// streams and datagrams of every size pass, on a path of 1,500 bytes.
func TestEveryMTU(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ethtool")
	server := w.server.ServeExchange(":7001")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	for _, tt := range []struct {
		mtu      int
		offloads bool
	}{{1280, true}, {9000, false}, {65535, true}} {
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
			if out, err := w.try(inside, "env", probeArgs(probe{Do: "exchange", To: port(far, 7001), N: 4 << 20})...); err != nil {
				t.Errorf("MTU %d, offloads %v, to %s: %v %s", tt.mtu, tt.offloads, far, err, out)
			}
			if out, err := w.try(inside, "env", probeArgs(probe{Do: "sizes", To: port(far, 7000)})...); err != nil {
				t.Errorf("MTU %d, offloads %v, to %s: %v %s", tt.mtu, tt.offloads, far, err, out)
			}
		}
		d.stop()
	}
	if err := server.Err(); err != nil {
		t.Error(err)
	}
	w.noLeak("every MTU")
}
