package main_test

import (
	"context"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

func init() { probes["stream"] = stream }

// stream sends a thousand datagrams a second until it is killed, some of them
// from a new socket.
func stream(q probe) error {
	var c net.Conn
	n := 0
	for range time.Tick(time.Millisecond) {
		if n++; n%50 == 0 && c != nil {
			c.Close()
			c = nil
		}
		if c == nil {
			var err error
			if c, err = net.Dial("udp", q.To); err != nil {
				continue
			}
		}
		_, _ = c.Write([]byte("x"))
	}
	return nil
}

// With on_exit closed nothing that is selected leaves beside cgtun, while it is
// killed and started again and again, after it was stopped, in home and in
// another namespace, until cleanup.
func TestClosedOutlivesKillInEveryNamespace(t *testing.T) {
	t.Parallel()
	labtest.Alone(t)
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	inner := w.lab.Host("inner")
	w.lab.Link(inner, w.machine, "10.50.9.2/24", "10.50.9.1/24", "fd50:9::2/64", "fd50:9::1/64")
	inner.Run("ip", "route", "add", "default", "via", "10.50.9.1")
	inner.Run("ip", "route", "add", "default", "via", "fd50:9::1")
	text := strings.Replace(w.config(second), "[route]", "[route]\non_exit = \"closed\"", 1)
	d := w.start(text)
	for _, h := range []*labtest.Host{w.machine, inner} {
		for _, to := range []string{port(far4, 7000), port(far6, 7000)} {
			cmd := w.sel.In(context.Background(), h, os.Args[0])
			cmd.Env = append(os.Environ(), probeArgs(probe{Do: "stream", To: to})[0])
			w.lab.StartCommand(cmd)
		}
	}
	up := func() bool {
		all := w.attachments()
		return len(all) == 1 && all[0].State == "up" && all[0].UpBytes > 0
	}
	labtest.Eventually(t, patience(), up, "the other namespace is attached")
	w.noLeak("while it runs")
	for n := range 3 {
		d.kill()
		if n == 1 {
			// The machine's firewall is loaded anew, and a socket is bound to
			// the uplink: that needs no capability.
			w.machine.Run("nft", "flush", "ruleset")
			w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Device: "eth0", Wait: time.Second})
		}
		time.Sleep(500 * time.Millisecond) // five hundred datagrams each
		w.noLeak("killed")
		d = w.start(text)
		labtest.Eventually(t, patience(), up, "attached again")
		w.noLeak("started again")
	}
	d.Signal(syscall.SIGTERM) // how long that may take is for other tests
	if err := d.Wait(); err != nil {
		t.Errorf("cgtun ended with %v", err)
	}
	time.Sleep(500 * time.Millisecond)
	w.noLeak("stopped")
	if _, errs, code := w.cgtun("status"); code != 1 || !strings.Contains(errs, "cgtun cleanup") {
		t.Errorf("status: %d %q, want that it is shut, and how to open it", code, errs)
	}
	if out, errs, code := w.cgtun("cleanup"); code != 0 || !strings.Contains(out, "pinned") {
		t.Errorf("cleanup: %d %s%s", code, out, errs)
	}
	labtest.Eventually(t, patience(), func() bool { return w.leaks.Packets() > 1000 }, "opened, all goes by the uplink")
}
