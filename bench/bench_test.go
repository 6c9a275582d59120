package bench_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// lab is
//
//	routed ───────────── router ───────────── server
//	10.8.0.2     10.8.0.1      10.7.0.1    10.7.0.2
//	                      │
//	captured ── tun0 ── cgtun (its sockets are router's)
//	10.9.0.1
//
// routed takes the kernel's way, or asks one of the plain relays on router;
// captured has no other way than the tun. With CGTUN_BENCH_WAYS=cgtun,race,twin there are
// two others like it: raced, whose cgtun has a group of two paths, and twinned, whose
// cgtun is as captured's, to see what is chance.
type lab struct {
	b                                *testing.B
	routed, captured, router, server *labtest.Host
	splice, copy, cgtun              *program
	raced, twinned                   *labtest.Host // nil: not wanted
	race, twin                       *program
}

// wayNames are the columns of the table.
var wayNames = []string{"kernel", "splice", "copy", "cgtun"}

// withRace says whether groups are compared with outbounds, too.
func withRace() bool { return strings.Contains(os.Getenv("CGTUN_BENCH_WAYS"), "race") }

// way is one of the ways to the server.
type way struct {
	name        string
	from        *labtest.Host
	addr        string
	iperf, echo string   // ports
	by          *program // the process that relays, if any
}

func (l *lab) ways() []way {
	all := []way{
		{"kernel", l.routed, serverIP, iperfPort, echoPort, nil},
		{"splice", l.routed, routerIP, iperfPort, echoPort, l.splice},
		{"copy", l.routed, routerIP, copyIperfPort, copyEchoPort, l.copy},
		{"cgtun", l.captured, serverIP, iperfPort, echoPort, l.cgtun},
	}
	only := os.Getenv("CGTUN_BENCH_WAYS")
	if l.raced != nil {
		all = append(all, way{"race", l.raced, serverIP, iperfPort, echoPort, l.race}, way{"twin", l.twinned, serverIP, iperfPort, echoPort, l.twin})
	}
	return slices.DeleteFunc(all, func(w way) bool { return only != "" && !strings.Contains(only, w.name) })
}

func newLab(b *testing.B) *lab {
	labtest.Need(b, labtest.Root, labtest.Tool("iperf3"), labtest.Tool("ip"))
	in := labtest.New(b)
	l := &lab{b: b, routed: in.Host("routed"), captured: in.Host("captured"), router: in.Host("router"), server: in.Host("server")}
	in.Link(l.routed, l.router, "10.8.0.2/24", "10.8.0.1/24")
	in.Link(l.router, l.server, "10.7.0.1/24", "10.7.0.2/24")
	l.router.Forward()
	l.routed.Run("ip", "route", "add", "default", "via", "10.8.0.1")
	l.server.Run("ip", "route", "add", "default", "via", "10.7.0.1")
	hosts := []*labtest.Host{l.routed, l.captured, l.router, l.server}
	if withRace() {
		l.raced, l.twinned = in.Host("raced"), in.Host("twinned")
		hosts = append(hosts, l.raced, l.twinned)
	}
	for _, h := range hosts {
		h.Sysctl("net.ipv4.ip_local_port_range", "10000 65000")
		h.Sysctl("net.ipv4.tcp_max_syn_backlog", "16384")
		h.Sysctl("net.core.somaxconn", "16384")
		// Or the ports that one measurement leaves in TIME-WAIT slow down the next.
		h.Sysctl("net.ipv4.tcp_max_tw_buckets", "0")
	}
	l.server.Start("iperf3", "-s", "-p", iperfPort)
	l.start(l.server, "server", "")
	l.splice = l.start(l.router, "splice", "")
	l.copy = l.start(l.router, "copy", "")
	l.cgtun = l.capture("cgtun", l.captured)
	if l.raced != nil {
		l.race, l.twin = l.capture("race", l.raced), l.capture("cgtun", l.twinned)
	}
	return l
}

// capture starts a cgtun to which all goes that h sends.
func (l *lab) capture(role string, h *labtest.Host) *program {
	p := l.start(l.router, role, h.Path)
	h.Run("ip", "route", "add", "default", "dev", "tun0")
	return p
}

// program is a role that runs in the background.
type program struct {
	cmd *exec.Cmd
	b   *testing.B
}

func (l *lab) command(h *labtest.Host, role, arg string) *exec.Cmd {
	exe, err := os.Executable()
	if err != nil {
		l.b.Fatal(err)
	}
	cmd := h.Command(context.Background(), exe)
	cmd.Env = append(os.Environ(), roleEnv+"="+role, argEnv+"="+arg)
	cmd.Stderr = os.Stderr
	return cmd
}

// start runs a role until stop or the end of the benchmark, and returns when it
// says that it is ready.
func (l *lab) start(h *labtest.Host, role, arg string) *program {
	l.b.Helper()
	cmd := l.command(h, role, arg)
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.b.Fatal(err)
	}
	p := &program{cmd: cmd, b: l.b}
	l.b.Cleanup(p.stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		l.b.Fatalf("%s: %q, %v", role, line, err)
	}
	return p
}

func (p *program) stop() {
	if p.cmd.ProcessState != nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.b.Errorf("%v: %v", p.cmd.Args, err)
	}
}

// cpu is what the process has used, in seconds.
func (p *program) cpu() float64 {
	if p == nil {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		p.b.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100
}

// rss is in KiB.
func (p *program) rss() float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.b.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb
		}
	}
	return 0
}

// ask runs a role in the foreground and returns its figures.
func (l *lab) ask(h *labtest.Host, role, arg string) map[string]float64 {
	l.b.Helper()
	cmd := l.command(h, role, arg)
	out, err := cmd.Output()
	if err != nil {
		l.b.Fatalf("%s %s: %v", role, arg, err)
	}
	var figures map[string]float64
	if err := json.Unmarshal(out, &figures); err != nil {
		l.b.Fatalf("%s: %v in %q", role, err, out)
	}
	return figures
}

// iperf returns Gbit/s as received, and the share of datagrams lost.
func (l *lab) iperf(w way, args ...string) (gbits, lost float64) {
	l.b.Helper()
	args = append([]string{"-J", "-c", w.addr, "-p", w.iperf}, args...)
	out, err := w.from.Try("iperf3", args...)
	var r struct {
		Error string
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
			Sum struct {
				BitsPerSecond float64 `json:"bits_per_second"`
				LostPercent   float64 `json:"lost_percent"`
			}
		}
	}
	if jerr := json.Unmarshal([]byte(out), &r); err != nil || jerr != nil {
		l.b.Fatalf("iperf3 %s by %s: %v, %v, %s", args, w.name, err, jerr, r.Error)
	}
	return r.End.Received.BitsPerSecond / 1e9, r.End.Sum.LostPercent / 100
}

func setting(name string, def int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return def
}

// cells collects the figures of a run and prints medians.
type cells struct {
	rows   []string
	values map[string]map[string][]float64
}

func (c *cells) add(row, way string, v float64) {
	if c.values == nil {
		c.values = make(map[string]map[string][]float64)
	}
	if c.values[row] == nil {
		c.values[row] = make(map[string][]float64)
		c.rows = append(c.rows, row)
	}
	c.values[row][way] = append(c.values[row][way], v)
}

func (c *cells) median(row, way string) (float64, bool) {
	v := slices.Clone(c.values[row][way])
	if len(v) == 0 {
		return 0, false
	}
	slices.Sort(v)
	return v[len(v)/2], true
}

// printPairs prints, for each row, the median of a way's ratios to cgtun in the same
// round, and between what that median lies with 95 % (by the sign test).
func (c *cells) printPairs(ways ...string) {
	for _, row := range c.rows {
		fmt.Printf("%-42s", row)
		base := c.values[row]["cgtun"]
		for _, w := range ways {
			var ratios []float64
			for i, v := range c.values[row][w] {
				ratios = append(ratios, v/base[i])
			}
			if len(ratios) == 0 {
				continue
			}
			slices.Sort(ratios)
			n := len(ratios)
			k := max(0, int(float64(n)/2-0.98*math.Sqrt(float64(n))))
			fmt.Printf("  %s/cgtun %.4f (%.4f to %.4f, of %d)", w, (ratios[(n-1)/2]+ratios[n/2])/2, ratios[k], ratios[n-1-k], n)
		}
		fmt.Println()
	}
	fmt.Println()
}

func (c *cells) print() {
	wayNames := wayNames
	if withRace() {
		wayNames = []string{"race", "twin", "cgtun"}
		defer c.printPairs("race", "twin")
	}
	fmt.Printf("\n%-42s", "median")
	for _, w := range wayNames {
		fmt.Printf(" %10s", w)
	}
	for _, w := range wayNames[:len(wayNames)-1] {
		fmt.Printf(" %14s", "cgtun/"+w)
	}
	fmt.Println()
	for _, row := range c.rows {
		fmt.Printf("%-42s", row)
		ours, _ := c.median(row, "cgtun")
		for _, w := range wayNames {
			fmt.Print(cell(c.median(row, w)))
		}
		for _, w := range wayNames[:len(wayNames)-1] {
			v, ok := c.median(row, w)
			ok = ok && v != 0
			if !ok {
				v = 1
			}
			fmt.Print("    ", cell(ours/v, ok))
		}
		fmt.Println()
	}
	fmt.Println()
}

func cell(v float64, ok bool) string {
	if !ok {
		return fmt.Sprintf(" %10s", "-")
	}
	return fmt.Sprintf(" %10.2f", v)
}

// BenchmarkEndToEnd prints one table. CGTUN_BENCH_ROUNDS (3) and
// CGTUN_BENCH_SECONDS (1, of each bulk cell and rate) make it longer, CGTUN_BENCH_ONLY
// (bulk,rate,latency,udp,memory), CGTUN_BENCH_CELL ("tcp up 4") and
// CGTUN_BENCH_WAYS ("splice,cgtun") shorter. CGTUN_BENCH_HANDLER=plain leaves the
// router out, CGTUN_BENCH_QUEUES has more queues, CGTUN_BENCH_PROFILE=FILE
// takes a CPU profile of cgtun, and FILE.allocs one of what it allocates.
func BenchmarkEndToEnd(b *testing.B) {
	only := os.Getenv("CGTUN_BENCH_ONLY")
	wanted := func(part string) bool { return only == "" || strings.Contains(only, part) }
	for b.Loop() {
		l := newLab(b)
		var c cells
		for range setting("CGTUN_BENCH_ROUNDS", 3) {
			if wanted("bulk") {
				l.bulk(&c)
			}
			if wanted("rate") {
				l.rates(&c)
			}
			if wanted("latency") {
				l.latencies(&c)
			}
			if wanted("udp") {
				l.datagrams(&c)
			}
		}
		if wanted("memory") {
			l.memory(&c)
		}
		c.print()
	}
}

// bulk is TCP with 1, 4 and 16 streams each way, and the CPU time of it.
func (l *lab) bulk(c *cells) {
	seconds := setting("CGTUN_BENCH_SECONDS", 1)
	for _, streams := range []int{1, 4, 16} {
		for _, dir := range []string{"up", "down"} {
			args := []string{"-t", strconv.Itoa(seconds), "-P", strconv.Itoa(streams)}
			if dir == "down" {
				args = append(args, "-R")
			}
			cell := fmt.Sprintf("tcp %s %d", dir, streams)
			if only := os.Getenv("CGTUN_BENCH_CELL"); only != "" && only != cell {
				continue
			}
			for _, w := range l.ways() {
				before := w.by.cpu()
				gbits, _ := l.iperf(w, args...)
				c.add(cell+", Gbit/s", w.name, gbits)
				if w.by != nil {
					gigabytes := gbits / 8 * float64(seconds)
					c.add("cpu of the relay, "+dir+", s/GB", w.name, (w.by.cpu()-before)/gigabytes)
				}
			}
		}
	}
}

// rates are of connections with a byte each way, and with a request.
func (l *lab) rates(c *cells) {
	for _, role := range []string{"rate", "requests"} {
		row := map[string]string{"rate": "", "requests": ", request"}[role]
		ways := l.ways()
		rand.Shuffle(len(ways), func(i, j int) { ways[i], ways[j] = ways[j], ways[i] })
		for _, w := range ways {
			before := w.by.cpu()
			f := l.ask(w.from, role, w.addr+":"+w.echo)
			c.add("connections/s"+row, w.name, f["rate"])
			if w.by != nil {
				c.add("cpu of the relay each"+row+", µs", w.name, (w.by.cpu()-before)/f["done"]*1e6)
			}
		}
	}
}

func (l *lab) latencies(c *cells) {
	for _, w := range l.ways() {
		f := l.ask(w.from, "latency", w.addr+":"+w.echo)
		c.add("connect + first byte p50, µs", w.name, f["first50"])
		c.add("connect + first byte p99, µs", w.name, f["first99"])
		c.add("round trip, open p50, µs", w.name, f["open50"])
		c.add("round trip, open p99, µs", w.name, f["open99"])
	}
}

// datagrams offers 120,000 datagrams of 1,200 bytes a second.
func (l *lab) datagrams(c *cells) {
	for _, dir := range []string{"up", "down"} {
		for _, w := range l.ways() {
			if w.by != nil && w.by != l.cgtun {
				continue // knows no datagrams
			}
			args := []string{"-u", "-l", "1200", "-b", "1152M", "-t", strconv.Itoa(setting("CGTUN_BENCH_SECONDS", 1))}
			if dir == "down" {
				args = append(args, "-R")
			}
			_, lost := l.iperf(w, args...)
			c.add("udp "+dir+" 120k/s, share arrived", w.name, 1-lost)
		}
	}
}

// memory is what a process holds with idle connections: just after they were
// opened, and when it has had time to give back what only the opening needed.
// 10,000 would need more descriptors than some systems allow.
func (l *lab) memory(c *cells) {
	for _, w := range l.ways() {
		name := w.name
		if name != "splice" && name != "cgtun" && name != "race" {
			continue
		}
		for _, n := range []int{1000, 9000} {
			if name == "splice" && n > 4000 {
				continue // two sockets and two pipes each
			}
			w.by = l.fresh(name)
			base := w.by.rss()
			if n == 1000 {
				c.add("memory at start, MiB", name, base/1024)
			}
			holder := l.start(w.from, "idle", fmt.Sprintf("%d %s:%s", n, w.addr, w.echo))
			row := fmt.Sprintf("memory at %d idle, KiB each", n)
			c.add(row+", at once", name, (w.by.rss()-base)/float64(n))
			time.Sleep(settleTime)
			c.add(row, name, (w.by.rss()-base)/float64(n))
			holder.stop()
		}
	}
}

// settleTime is more than two periods of the stack's trimming.
const settleTime = 5 * time.Second

// fresh restarts a relay: what earlier work left is not asked.
func (l *lab) fresh(name string) *program {
	switch name {
	case "cgtun":
		l.cgtun.stop()
		l.cgtun = l.capture(name, l.captured)
		return l.cgtun
	case "race":
		l.race.stop()
		l.race = l.capture(name, l.raced)
		return l.race
	}
	l.splice.stop()
	l.splice = l.start(l.router, name, "")
	return l.splice
}
