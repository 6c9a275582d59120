package main_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/control"
	"cgtun/internal/labtest"
)

// Two namespaces with one and the same address, as two docker daemons make them, speak
// from one and the same port to one server, and each hears its own answers.
func TestSameAddressesDoNotMix(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "socat")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeEcho(port(far4, 7000))
	w.start(w.config(second))
	var pids []string
	for i := range 2 {
		pid, dev := strconv.Itoa(w.wait().pid), fmt.Sprintf("in%d", i)
		w.machine.Run("ip", "link", "add", dev, "up", "type", "veth", "peer", "name", "eth0", "netns", pid)
		w.run(outside, "nsenter", "-t", pid, "-n", "sh", "-ec", "ip addr add 10.50.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.50.0.1")
		pids = append(pids, pid)
	}
	labtest.Eventually(t, patience(), func() bool {
		return !slices.ContainsFunc(w.attachments(), func(a control.Attachment) bool { return a.State != attach.StateUp }) && len(w.attachments()) == 2
	}, "both are attached")
	for _, proto := range []string{"udp", "tcp"} {
		type end struct {
			in  io.WriteCloser
			out *bufio.Reader
		}
		var ends []end
		for _, pid := range pids {
			cmd := w.command(context.Background(), inside, "nsenter", "-t", pid, "-n", "socat", "-", proto+":"+port(far4, 7000)+",sourceport=4444")
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			kill := func() { _ = cmd.Process.Kill() }
			stop := time.AfterFunc(patience(), kill)
			defer func() { stop.Stop(); kill(); _ = cmd.Wait() }()
			ends = append(ends, end{in, bufio.NewReader(out)})
		}
		for n := range 20 {
			for i, e := range ends {
				fmt.Fprintf(e.in, "%s %d of %s\n", proto, n, pids[i])
			}
			for i, e := range ends {
				want := fmt.Sprintf("%s %d of %s\n", proto, n, pids[i])
				if got, err := e.out.ReadString('\n'); got != want {
					t.Fatalf("%s heard %q, %v, want %q", pids[i], got, err, want)
				}
			}
		}
		of := make(map[string]bool)
		for _, f := range w.flows() {
			if f.Proto == proto && f.Src.String() == "10.50.0.2:4444" {
				of[string(f.Attachment)] = true
			}
		}
		if len(of) != 2 {
			t.Errorf("%s: flows of that address are in %v, want two attachments", proto, of)
		}
	}
	w.noLeak("two with one address")
}
