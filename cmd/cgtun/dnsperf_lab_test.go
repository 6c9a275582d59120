package main_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// Of cached answers cgtun gives about as many a second as dnsmasq beside it on
// the same machine, and loses none. The figure counts in full runs alone.
func TestCachedQueriesASecond(t *testing.T) {
	w := newWorld(t, "dnsmasq", "dnsperf")
	rounds, seconds, names := 1, "1", 1000
	if labtest.Soak() {
		rounds, seconds = 5, "5"
	}
	w.resolvers("nameserver " + far4 + "\n")
	w.zone(w.server, far4, "192.0.2.77", "--address=/bench.example/192.0.2.1")
	w.zone(w.server, far6, "192.0.2.77")
	w.listening(53)
	const beside = "10.1.0.2" // a dnsmasq of the machine, that asks the same server
	w.machine.Start("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root",
		"--pid-file=", "--listen-address="+beside, "--server="+far4, "--cache-size=10000", "--min-cache-ttl=600")
	var questions strings.Builder
	for i := range names {
		fmt.Fprintf(&questions, "n%d.bench.example A\n", i)
	}
	file := filepath.Join(w.dir, "questions")
	if err := os.WriteFile(file, []byte(questions.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	w.start(strings.Replace(w.config(second), `"debug"`, `"info"`, 1))
	perSecond, lost := regexp.MustCompile(`Queries per second:\s+([\d.]+)`), regexp.MustCompile(`Queries lost:\s+(\d+)`)
	measure := func(at where, server string) (rate float64) {
		out := w.run(at, "dnsperf", "-s", server, "-d", file, "-l", seconds, "-c", "8", "-q", "100")
		got, gone := perSecond.FindStringSubmatch(out), lost.FindStringSubmatch(out)
		if got == nil || gone == nil {
			t.Fatalf("dnsperf: %s", out)
		}
		if gone[1] != "0" && at == inside {
			t.Errorf("%s queries were lost", gone[1])
		}
		rate, err := strconv.ParseFloat(got[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return rate
	}
	var best float64
	for range rounds {
		dnsmasq, ours := measure(outside, beside), measure(inside, far4)
		t.Logf("dnsmasq %.0f a second, cgtun %.0f: %.2f", dnsmasq, ours, ours/dnsmasq)
		best = max(best, ours/dnsmasq)
	}
	if labtest.Soak() && best < 0.8 {
		t.Errorf("at best %.2f of dnsmasq's rate, want 0.8", best)
	}
}

// A flood of names that nobody has asked for before fills neither more memory than
// flows may take nor the table of sockets, whether they are answered or not, and the next query is
// answered.
func TestFloodOfNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "dig", "dnsmasq", "dnsperf")
	seconds := "1"
	if labtest.Soak() {
		seconds = "60"
	}
	w.resolvers("nameserver " + far4 + "\n")
	w.zone(w.server, far4, "192.0.2.77", "--address=/flood.example/192.0.2.1")
	w.zone(w.server, far6, "192.0.2.77")
	w.listening(53)
	var questions strings.Builder
	for i := range 200_000 {
		fmt.Fprintf(&questions, "n%d.flood.example A\n", i)
	}
	file := filepath.Join(w.dir, "questions")
	if err := os.WriteFile(file, []byte(questions.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	d := w.start(strings.Replace(w.config(second), `"debug"`, `"info"`, 1))
	start, sockets := memoryOf(t, d.Pid, "VmRSS"), openSockets(t, d.Pid)
	for _, server := range []string{far4, "203.0.113.99"} { // at the second one is nobody
		out := w.run(inside, "dnsperf", "-s", server, "-d", file, "-l", seconds, "-c", "8", "-q", "20000", "-t", "1")
		peak := memoryOf(t, d.Pid, "VmHWM")
		t.Logf("@%s: %d KiB more than at the start; %s", server, (peak-start)>>10, regexp.MustCompile(`Queries per second:.*`).FindString(out))
		if peak-start > 256<<20 && !raceEnabled { // [limits] memory
			t.Errorf("@%s: %d MiB more than at the start", server, (peak-start)>>20)
		}
		labtest.Eventually(t, 20*time.Second, func() bool {
			out, err := w.try(inside, "dig", "+short", "+tries=1", "+time=5", "name.example", "@"+far4)
			return err == nil && strings.TrimSpace(out) == "192.0.2.77"
		}, "name.example after a flood @%s", server)
	}
	labtest.Eventually(t, 20*time.Second, func() bool { return openSockets(t, d.Pid) <= sockets+10 }, "sockets are closed")
}
