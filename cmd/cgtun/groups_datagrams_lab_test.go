package main_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

func init() { probes["talk"] = talk }

// UDP and ICMP move to the other path when theirs falls silent, and when its link goes
// down: the process notices a gap of some seconds, and keeps its socket.
func TestDatagramsMoveToTheOtherPath(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		begin func(*world)
	}{
		{"black hole", func(w *world) { w.fault("drop") }},
		{"link down", func(w *world) { w.router.Run("ip", "link", "set", "eth0", "down") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "ping")
			echo := w.server.ServeUDPEcho(port(far4, 7000))
			outbounds, _, _ := strings.Cut(twoPaths, "[[rule]]")
			w.start(w.config(outbounds + "[[rule]]\nuse = \"in-order\"\n"))
			talks := map[string]*labtest.Proc{
				"UDP":  w.startProbe(inside, probe{Do: "talk", To: port(far4, 7000)}),
				"ICMP": w.lab.StartCommand(w.command(context.Background(), inside, "ping", "-i", "0.2", far4)),
			}
			answers := func(of string) int { return strings.Count(talks[of].Output(), "seq") }
			for what := range talks {
				labtest.Eventually(t, 10*time.Second, func() bool { return answers(what) > 3 }, what)
			}
			for _, f := range w.flows() {
				if len(f.Path) != 1 || f.Path[0] != "a" {
					t.Errorf("before: %+v", f)
				}
			}
			tt.begin(w)
			for what, p := range talks {
				before := answers(what)
				labtest.Eventually(t, 15*time.Second, func() bool { return answers(what) >= before+5 }, what+" goes on")
				p.Stop()
			}
			second := false
			for _, c := range echo.Clients() {
				second = second || isSecond(c)
			}
			if !second {
				t.Error("no datagram came by the other path")
			}
		})
	}
}

// talk sends a datagram ten times a second from one socket, and tells of each answer.
func talk(q probe) error {
	c, err := net.Dial("udp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("ready")
	b := make([]byte, 16)
	for n := 0; ; n++ {
		_, _ = c.Write([]byte("x")) // the path may fail: the next one goes another way
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Read(b); err == nil {
			fmt.Println("seq", n)
			time.Sleep(100 * time.Millisecond)
		}
	}
}
