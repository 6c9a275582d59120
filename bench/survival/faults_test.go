package survival_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"time"
)

// fault is one way in which a path fails.
type fault struct {
	name  string
	rules []string        // of nft; "in" and "out" stand for the packets that come and go by the link
	begin func(*lab, int) // or this, with the number of the path
	end   func(*lab, int) // of begin
	proxy bool            // only where flows go by a proxy
}

var faults = []fault{
	{name: "near link down", begin: link("down"), end: link("up")},
	{name: "far link down", rules: []string{"in reject with icmpx host-unreachable", "out drop"}},
	{name: "all dropped", rules: []string{"in drop", "out drop"}},
	{name: "reset of everything", rules: []string{"in meta l4proto tcp reject with tcp reset"}},
	{name: "reset past 300 kB", rules: []string{"in meta l4proto tcp ct reply bytes > 300000 reject with tcp reset"}},
	{name: "stall past 300 kB", rules: []string{"in ct reply bytes > 300000 drop", "out ct reply bytes > 300000 drop"}},
	{name: "30 % loss", rules: []string{"in numgen random mod 100 < 30 drop", "out numgen random mod 100 < 30 drop"}},
	{name: "SOCKS server dead", proxy: true,
		begin: func(l *lab, n int) { l.proxies[n].Signal(syscall.SIGKILL); _ = l.proxies[n].Wait() },
		end:   func(l *lab, n int) { l.proxies[n].start() }},
	{name: "SOCKS server never answers", proxy: true,
		begin: func(l *lab, n int) { l.proxies[n].Signal(syscall.SIGSTOP) },
		end:   func(l *lab, n int) { l.proxies[n].Signal(syscall.SIGCONT) }},
}

func link(state string) func(*lab, int) {
	return func(l *lab, n int) { l.router.Run("ip", "link", "set", fmt.Sprintf("eth%d", n), state) }
}

// on begins a fault of a path, off ends it.
func (f fault) on(l *lab, n int) {
	if f.begin != nil {
		f.begin(l, n)
		return
	}
	text := "add table inet fault; add chain inet fault f { type filter hook forward priority 0; };"
	for _, r := range f.rules {
		way, rest, _ := strings.Cut(r, " ")
		text += fmt.Sprintf("add rule inet fault f %s \"eth%d\" %s;", map[string]string{"in": "iifname", "out": "oifname"}[way], n, rest)
	}
	l.router.Run("nft", text)
}

func (f fault) off(l *lab, n int) {
	if f.end != nil {
		f.end(l, n)
		return
	}
	l.router.Run("nft", "delete table inet fault")
}

// planned is a fault in time, from the start of the run on.
type planned struct {
	fault
	path      int
	at, until time.Duration
}

// How long faults last, and how long both paths are good between them. So the
// kernel alone loses about one download in seven.
const (
	leastFault, mostFault = 2 * time.Second, 5 * time.Second
	leastGap, mostGap     = 1500 * time.Millisecond, 6 * time.Second
)

// plan draws the faults of a run, one at a time.
func plan(seed uint64, lasts time.Duration, proxied bool) (list []planned) {
	random := rand.New(rand.NewPCG(seed, 1))
	between := func(a, b time.Duration) time.Duration { return a + time.Duration(random.Int64N(int64(b-a))) }
	kinds := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return f.proxy && !proxied })
	for at := between(leastGap, mostGap); at < lasts; at += between(leastGap, mostGap) {
		p := planned{fault: kinds[random.IntN(len(kinds))], path: random.IntN(2), at: at}
		at += between(leastFault, mostFault)
		p.until = at
		list = append(list, p)
	}
	return list
}

// happened is a fault as it was: somewhere between begin and inForce it began.
type happened struct {
	what                string
	path                int
	begin, inForce, end time.Time
}

// beganIn says whether it began while d ran.
func (h happened) beganIn(d download) bool { return h.inForce.After(d.Begin) && h.begin.Before(d.End) }

// inflict has the faults happen, and returns when each did.
func (l *lab) inflict(list []planned) (all []happened) {
	start := time.Now()
	for _, p := range list {
		time.Sleep(time.Until(start.Add(p.at)))
		h := happened{what: p.name, path: p.path, begin: time.Now()}
		p.on(l, p.path)
		h.inForce = time.Now()
		time.Sleep(time.Until(start.Add(p.until)))
		p.off(l, p.path)
		h.end = time.Now()
		all = append(all, h)
	}
	return all
}
