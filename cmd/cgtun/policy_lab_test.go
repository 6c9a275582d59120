package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"cgtun/control"
	"cgtun/internal/labtest"
)

func init() { probes["reach"] = reach }

// reach dials every target of To, "NETWORK ADDR:PORT[ DEVICE]" a line, and prints
// the answers by line.
func reach(q probe) error {
	var mu sync.Mutex
	var work sync.WaitGroup
	all := map[string]answer{}
	for _, line := range strings.Split(q.To, "\n") {
		words := strings.Fields(line)
		one := probe{Network: words[0], To: words[1], Say: "hello", Wait: q.Wait}
		if len(words) > 2 {
			one.Device = words[2]
		}
		work.Go(func() {
			a, err := one.dial()
			a.failed(err)
			mu.Lock()
			defer mu.Unlock()
			all[line] = a
		})
	}
	work.Wait()
	return json.NewEncoder(os.Stdout).Encode(all)
}

// TestContainerReachesNoMoreThanBefore: what a process in a container's network
// reaches with cgtun is what it reaches without. What it would not send into the
// device by itself, it does by hand: bound to the device.
//
//	            ┌───────────────────────────── machine
//	box         │ docker0 172.17.0.1                   :7001 on all addresses
//	172.17.0.2 ─┤ fd17::1               eth0 ── router :7002 on loopback
//	            │   ✗ FORWARD
//	neighbour   │ br-0123456789ab 172.18.0.1
//	172.18.0.2 ─┤ fd18::1
func TestContainerReachesNoMoreThanBefore(t *testing.T) {
	w := newWorld(t, "microsocks")
	box, neighbour := w.lab.Host("box"), w.lab.Host("neighbour")
	for i, b := range []struct {
		bridge string
		host   *labtest.Host
	}{{"docker0", box}, {"br-0123456789ab", neighbour}} {
		n := 17 + i
		w.machine.Run("ip", "link", "add", b.bridge, "type", "bridge")
		w.machine.Run("ip", "addr", "add", fmt.Sprintf("172.%d.0.1/16", n), "dev", b.bridge)
		w.machine.Run("ip", "addr", "add", fmt.Sprintf("fd%d::1/64", n), "dev", b.bridge, "nodad")
		w.machine.Run("ip", "link", "set", b.bridge, "up")
		w.lab.Link(w.machine, b.host, "", fmt.Sprintf("172.%d.0.2/16", n), "", fmt.Sprintf("fd%d::2/64", n))
		w.machine.Run("ip", "link", "set", fmt.Sprintf("eth%d", 2+i), "master", b.bridge)
		b.host.Run("ip", "route", "add", "default", "via", fmt.Sprintf("172.%d.0.1", n))
		b.host.Run("ip", "route", "add", "default", "via", fmt.Sprintf("fd%d::1", n))
	}
	w.machine.Forward()
	w.router.Run("ip", "route", "add", "172.16.0.0/12", "via", "10.1.0.2")
	w.router.Run("ip", "route", "add", "fd17::/16", "via", "fd01::2")
	// As docker isolates its networks; and home's services are closed to them.
	w.machine.Run("nft", "add table inet isolate; add chain inet isolate f { type filter hook forward priority 0; }; "+
		"add rule inet isolate f iifname docker0 oifname br-0123456789ab drop; "+
		"add chain inet isolate i { type filter hook input priority 0; }; add rule inet isolate i iifname docker0 meta l4proto { tcp, udp } reject")
	for _, h := range []*labtest.Host{w.machine, neighbour, w.server} {
		h.ServeEcho(":7001")
	}
	w.server.ServeUDPEcho(far4 + ":7001")
	w.server.ServeUDPEcho("[" + far6 + "]:7001")
	neighbour.ServeUDPEcho(":7001")
	for _, a := range []string{"127.0.0.1", "[::1]", "10.1.0.2", "[fd01::2]", "172.17.0.1", "172.18.0.1"} {
		w.machine.ServeUDPEcho(a + ":7001")
	}
	w.machine.Run("ip", "addr", "add", "172.31.0.1/32", "dev", "lo")
	w.machine.ServeEcho("127.0.0.1:7002")
	w.machine.ServeEcho("[::1]:7002")
	// Forms that others beyond home could take for the addresses inside.
	forms := w.router.MeterMatch("ip6 daddr { ::/96, 64:ff9b::/96, 2002::/16 }")

	var targets []string
	add := func(ports string, addrs ...string) {
		for _, a := range addrs {
			for port := range strings.FieldsSeq(ports) {
				for _, network := range []string{"tcp", "udp"} {
					for _, dev := range []string{"", " tun0"} {
						targets = append(targets, fmt.Sprintf("%s %s:%s%s", network, a, port, dev))
					}
				}
			}
		}
	}
	add("7001", far4, "["+far6+"]") // these are reached
	add("7001 7002", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254")
	add("7001", "10.1.0.2", "10.2.0.2", "[fd01::2]", "172.17.0.1", "172.18.0.1", "[fd18::1]", "172.18.0.2", "[fd18::2]", "[::ffff:172.18.0.2]")
	add("7001", "[64:ff9b::7f00:1]", "[64:ff9b::a01:2]", "[64:ff9b::ac12:2]", "[2002:7f00:1::]", "[2002:ac12:2::1]", "[::127.0.0.1]", "[::172.18.0.2]")
	tryAll := func(lines []string) (all map[string]answer) {
		t.Helper()
		out := box.Run("env", probeArgs(probe{Do: "reach", To: strings.Join(lines, "\n"), Wait: 3e9})...)
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			t.Fatal(err)
		}
		return all
	}
	var plain []string
	for _, line := range targets {
		if !strings.HasSuffix(line, "tun0") {
			plain = append(plain, line)
		}
	}
	before := tryAll(plain)
	if before["tcp "+far4+":7001"].Heard == "" || before["udp ["+far6+"]:7001"].Heard == "" || before["tcp 172.18.0.2:7001"].Heard != "" {
		t.Fatalf("the lab is not as wanted: %+v", before)
	}

	text := strings.Replace(w.config(`
[[outbound]]
name = "second"
type = "direct"
interface = "eth1"
[[outbound]]
name = "marked"
type = "direct"
mark = 3
[[outbound]]
name = "relay"
type = "socks5"
server = "127.0.0.1:1080"
`), "[select]", fmt.Sprintf("[select]\nnetns = [%q]", box.Name), 1)
	// A proxy of the machine's own would dial what it is told to.
	w.machine.Start("microsocks", "-i", "127.0.0.1", "-p", "1080")
	for _, use := range []string{"direct", "second", "marked", "relay"} {
		t.Run(use, func(t *testing.T) {
			w.t = t
			d := w.start(text + fmt.Sprintf("[[rule]]\nuse = %q\n", use))
			defer d.stop()
			forms.Reset()
			for line, got := range tryAll(targets) {
				if use == "relay" && strings.HasPrefix(line, "udp") && got.Heard == "" {
					continue // this proxy has no datagrams
				}
				reached := strings.Contains(line, far4) || strings.Contains(line, far6)
				want := before[strings.TrimSuffix(line, " tun0")].Heard
				if !reached && strings.HasSuffix(line, " tun0") {
					want = ""
				}
				if got.Heard != want {
					t.Errorf("%s: heard %q (%s), want %q; without cgtun %+v", line, got.Heard, got.Errno, want, before[line])
				}
				// By eth1 they mean somebody else than the neighbour.
				denied := use != "second" && (strings.Contains(line, " 172.18.0.2:") || strings.Contains(line, "ac12:2]"))
				if denied = denied || strings.Contains(line, "[64:ff9b::7f00:1]"); denied && strings.HasPrefix(line, "tcp") && got.Errno != "ECONNREFUSED" {
					t.Errorf("%s: %q, want to be refused at once", line, got.Errno)
				}
			}
			if n := forms.Packets(); n != 0 && use != "second" {
				t.Errorf("%d packets to other forms of addresses have left", n)
			}
			if c := w.status().Counters; c.DeniedTotal == 0 || c.TurnedAwayTotal["policy"] == 0 {
				t.Errorf("counters %+v", c)
			}
			for _, o := range w.status().Outbounds {
				if o.FailuresTotal != 0 && use != "second" && use != "relay" {
					t.Errorf("denials count as failures: %+v", o)
				}
			}
			e := ask[control.Explain](w, "explain", "[2002:ac1f:1::]:80")
			if _, other, _ := strings.Cut(e.Why, "refused from other namespaces"); !strings.Contains(other, "172.31.0.1") {
				t.Errorf("explain says %+v", e)
			}
		})
	}
	w.t = t
	// What is wanted can be opened.
	w.start(text + "[policy]\nallow = [\"172.18.0.2\", \"64:ff9b::/96\"]\n")
	open := tryAll([]string{"tcp 172.18.0.2:7001", "udp 172.18.0.2:7001", "tcp [fd18::2]:7001"})
	if open["tcp 172.18.0.2:7001"].Heard != "hello" || open["udp 172.18.0.2:7001"].Heard != "hello" || open["tcp [fd18::2]:7001"].Heard != "" {
		t.Errorf("with [policy] allow: %+v", open)
	}
}
