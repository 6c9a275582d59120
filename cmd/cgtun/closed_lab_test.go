package main_test

import (
	"strings"
	"syscall"
	"testing"
)

// With on_exit = "closed" who is selected reaches nothing from the first death
// on, whatever that is, until cleanup: others go on, and so does what is
// bypassed.
func TestClosedHoldsAfterDeath(t *testing.T) {
	t.Parallel()
	makes(t)
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(":7001")
	before := w.lab.Snapshot(w.machine)
	text := strings.Replace(w.config(second), "[tun]", "on_exit = \"closed\"\n[tun]", 1)
	for _, death := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		d := w.start(text)
		if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
			t.Fatalf("%v, alive: %+v", death, a)
		}
		if death == syscall.SIGKILL {
			d.kill()
		} else {
			d.stop()
		}
		for _, q := range []probe{
			{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}, {Do: "dial", Network: "tcp", To: port(far6, 7000), Say: "x"},
			{Do: "dial", Network: "udp", To: port(far4, 7001), Say: "x"}, {Do: "dial", Network: "udp", To: port(far6, 7001), Say: "x"},
		} {
			if a := w.probe(inside, q); a.Heard != "" {
				t.Errorf("%v: %s %s reached: %+v", death, q.Network, q.To, a)
			}
		}
		w.noLeak(death.String())
		if _, errs, code := w.cgtun("status"); code != 1 || !strings.Contains(errs, "closed") || !strings.Contains(errs, "cgtun cleanup") {
			t.Errorf("%v: status: %d %q", death, code, errs)
		}
	}
	if out, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Fatalf("cleanup: %d: %s%s", code, out, errs)
	}
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "x"}); a.Heard != "x" {
		t.Errorf("opened: %+v", a)
	}
	w.unchanged(before, "cleanup")
}
