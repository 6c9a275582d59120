package main_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

func init() { probes["downloads"] = downloads }

// TestSurvival is the bench of what groups are for. Downloads of 1 to 5 MB begin
// at seeded times, each is tried once, while one path or the other fails in one of
// eight ways, never both at once. A loss is avoidable if no fault began while the
// download ran: there was a good path all the time. Nobody can know of a fault that
// shows in the midst of flows alone before it has broken one; once it has, none more
// is to be lost.
func TestSurvival(t *testing.T) {
	t.Parallel()
	run, seeds := survival{downloads: 50, lasts: 30 * time.Second}, 1
	if labtest.Soak() {
		run, seeds = survival{downloads: 200, lasts: 2 * time.Minute}, 20
	}
	for seed := range seeds {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			run.test(t, uint64(seed))
		})
	}
}

// survival is the size of one run.
type survival struct {
	downloads int
	lasts     time.Duration
}

// trouble is one way in which a path fails: rules of nft for the packets of its
// link, or the link itself.
type trouble struct {
	name  string
	rules []string // "in" and "out" stand for the packets that come and go by the link
	down  bool
}

var troubles = []trouble{
	{name: "near link down", down: true},
	{name: "far link down", rules: []string{"in reject with icmpx host-unreachable", "out drop"}},
	{name: "all dropped", rules: []string{"in drop", "out drop"}},
	{name: "reset of everything", rules: []string{"in meta l4proto tcp reject with tcp reset"}},
	{name: "reset past 300 kB", rules: []string{"in meta l4proto tcp ct reply bytes > 300000 reject with tcp reset"}},
	{name: "stall past 300 kB", rules: []string{"in ct reply bytes > 300000 drop", "out ct reply bytes > 300000 drop"}},
	{name: "30 % loss", rules: []string{"in numgen random mod 100 < 30 drop", "out numgen random mod 100 < 30 drop"}},
	{name: "half of the connections refused", rules: []string{"in tcp flags syn / syn,ack numgen random mod 2 0 reject with tcp reset"}},
}

// begin makes a trouble of one link of the router, and returns how it ends.
func (w *world) begin(tr trouble, link string) (end func()) {
	if tr.down {
		w.router.Run("ip", "link", "set", link, "down")
		return func() { w.router.Run("ip", "link", "set", link, "up") }
	}
	text := "add table inet trouble; add chain inet trouble f { type filter hook forward priority 0; };"
	for _, r := range tr.rules {
		r = strings.NewReplacer("in ", fmt.Sprintf("iifname %q ", link), "out ", fmt.Sprintf("oifname %q ", link)).Replace(r[:4]) + r[4:]
		text += "add rule inet trouble f " + r + ";"
	}
	w.router.Run("nft", text)
	return func() { w.router.Run("nft", "delete table inet trouble") }
}

// happened is a trouble in time.
type happened struct {
	what       string
	begin, end time.Time
}

func (s survival) test(t *testing.T, seed uint64) {
	w := newWorld(t)
	w.router.Run("nft", "add table inet count; add chain inet count f { type filter hook forward priority -10; }; add rule inet count f ct state new counter")
	w.router.Sysctl("net.netfilter.nf_conntrack_acct", "1")
	w.server.Serve(":7000", serveBody)
	w.start(w.config(strings.ReplaceAll(twoPaths, "7000", "7100")))
	random := rand.New(rand.NewPCG(seed, 1))
	client := w.startProbe(inside, probe{Do: "downloads", To: port(far4, 7000), N: s.downloads, Seed: int64(seed), Wait: s.lasts})
	var troubled []happened
	over := time.Now().Add(s.lasts)
	for time.Now().Before(over) {
		time.Sleep(time.Duration(500+random.IntN(1500)) * time.Millisecond)
		tr, link := troubles[random.IntN(len(troubles))], fmt.Sprintf("eth%d", random.IntN(2))
		h := happened{what: tr.name + " of " + link, begin: time.Now()}
		end := w.begin(tr, link)
		time.Sleep(time.Duration(2000+random.IntN(4000)) * time.Millisecond)
		end()
		h.end = time.Now()
		troubled = append(troubled, h)
	}
	if err := client.Wait(); err != nil {
		t.Fatalf("downloads: %v\n%s", err, client.Output())
	}
	lost := lostDownloads(client.Output())
	avoidable, known := 0, 0
	for _, d := range lost {
		during := "no fault began while it ran"
		for _, h := range troubled {
			if h.begin.After(d.Begin) && h.begin.Before(d.End) {
				during = "while " + h.what
			}
		}
		if strings.HasPrefix(during, "no ") {
			avoidable++
			for _, h := range troubled {
				if !h.begin.Before(d.End) || !h.end.After(d.Begin) {
					continue
				}
				during += ", in the midst of " + h.what
				if slices.ContainsFunc(lost, func(l download) bool { return l.End.After(h.begin) && l.End.Before(d.Begin) }) {
					known++
				}
			}
		}
		t.Logf("lost from %s to %s after %d of %d bytes, %s: %s", d.Begin.Format("05.000"), d.End.Format("05.000"), d.Got, d.Want, during, d.Err)
	}
	h := w.status().Counters.HiddenTotal
	t.Logf("seed %d: %d of %d downloads (%.1f %%); lost %d, avoidably %d, of a known fault %d; %d faults; hidden: dial %d, reset %d, close %d, stall %d",
		seed, s.downloads-len(lost), s.downloads, 100*float64(s.downloads-len(lost))/float64(s.downloads), len(lost), avoidable, known, len(troubled), h.Dial, h.Reset, h.Close, h.Stall)
	if known > 0 {
		t.Errorf("%d downloads were given to a path that had broken others by the same fault before", known)
	}
}

// lostDownloads reads what the client tells.
func lostDownloads(output string) (lost []download) {
	for line := range strings.Lines(output) {
		var d download
		if json.Unmarshal([]byte(line), &d) == nil && d.Err != "" {
			lost = append(lost, d)
		}
	}
	return lost
}

// serveBody answers a request for N bytes with them, 2 MB a second, and waits for
// the client's end. What does not get through is not left behind.
func serveBody(c *net.TCPConn) error {
	_ = c.SetLinger(0)
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return nil // the path failed
	}
	n, err := strconv.ParseInt(strings.TrimPrefix(strings.Fields(line)[1], "/"), 10, 64)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", n)
	body := labtest.Pattern(n)
	const part, every = 64 << 10, 32 * time.Millisecond
	for ; n > 0; n -= part {
		if _, err := io.CopyN(c, body, min(n, part)); err != nil {
			return nil
		}
		time.Sleep(every)
	}
	_, _ = io.Copy(io.Discard, c)
	_ = c.SetLinger(-1)
	return nil
}

// download is what became of one.
type download struct {
	Begin, End time.Time
	Got, Want  int64
	Err        string
}

// downloads begins N of them within Wait, and tells of each.
func downloads(q probe) error {
	random := rand.New(rand.NewPCG(uint64(q.Seed), 2))
	var all sync.WaitGroup
	var mu sync.Mutex
	fmt.Println("ready")
	for range q.N {
		at, size := time.Duration(random.Int64N(int64(q.Wait))), 1e6+random.Int64N(4e6)
		all.Go(func() {
			time.Sleep(at)
			d := download{Begin: time.Now(), Want: size}
			var err error
			if d.Got, err = fetchBody(q.To, size); err != nil {
				d.Err = err.Error()
			}
			d.End = time.Now()
			mu.Lock()
			defer mu.Unlock()
			_ = json.NewEncoder(os.Stdout).Encode(d)
		})
	}
	all.Wait()
	return nil
}

// fetchBody downloads so many bytes, once.
func fetchBody(to string, size int64) (got int64, err error) {
	c, err := net.DialTimeout("tcp", to, 30*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(c, "GET /%d HTTP/1.1\r\nHost: a.example\r\n\r\n", size); err != nil {
		return 0, err
	}
	r := &counting{r: bufio.NewReader(c)}
	for line := ""; line != "\r\n"; {
		if line, err = r.r.ReadString('\n'); err != nil {
			return 0, fmt.Errorf("head: %w", err)
		}
	}
	err = labtest.CheckPattern(io.LimitReader(r, size), size)
	return r.n, err
}

// counting counts what is read.
type counting struct {
	r *bufio.Reader
	n int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
