package survival_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/internal/labtest"
)

// lab is
//
//	machine                                    router              server
//	┌────────────────────────────────┐
//	│                      ┌─── eth0 │ path a   eth0 ┐
//	│ sel ── tun0 ── cgtun ┴─── eth1 │ path b   eth1 ┴ eth2 ── eth0  203.0.113.10: what is downloaded
//	└────────────────────────────────┘                              203.0.113.11, .12: SOCKS
//
// Without cgtun what is in sel has two default routes.
type lab struct {
	t                       *testing.T
	in                      *labtest.Lab
	machine, router, server *labtest.Host
	selected, sel           *labtest.Cgroup // by cgtun; where the clients are
	proxies                 [2]*proxy
	dir, socket             string
	number                  int
}

const (
	far                = "203.0.113.10"
	plainPort, tlsPort = "7000", "7443"
	proxyPort          = "1080"
	directly, proxied  = "directly", "proxied"
)

var labs atomic.Int32

func newLab(t *testing.T) *lab {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("nft"), labtest.Tool("microsocks"))
	in := labtest.New(t)
	l := &lab{t: t, in: in, machine: in.Host("machine"), router: in.Host("router"), server: in.Host("server"), dir: t.TempDir()}
	// Numbers of the process's own, apart from those of cmd/cgtun.
	l.number = 20_000_000 + os.Getpid()%100_000*100 + int(labs.Add(1))
	l.socket = filepath.Join(l.dir, "s")
	in.Link(l.machine, l.router, "10.1.0.2/24", "10.1.0.1/24")
	in.Link(l.machine, l.router, "10.2.0.2/24", "10.2.0.1/24")
	in.Link(l.router, l.server, "10.9.0.1/24", "10.9.0.2/24")
	l.router.Forward()
	l.router.Run("ip", "route", "add", "203.0.113.0/24", "via", "10.9.0.2")
	l.server.Run("ip", "route", "add", "default", "via", "10.9.0.1")
	for _, a := range []string{far, "203.0.113.11", "203.0.113.12"} {
		l.server.Run("ip", "addr", "add", a+"/32", "dev", "lo")
	}
	l.machine.Run("ip", "route", "add", "default", "via", "10.1.0.1", "metric", "100")
	l.machine.Run("ip", "route", "add", "default", "via", "10.2.0.1", "metric", "200")
	l.selected = in.Cgroup("sel")
	l.sel = l.selected
	// Faults look at what connections have brought.
	l.router.Run("nft", "add table inet count; add chain inet count f { type filter hook forward priority -10; }; add rule inet count f ct state new counter")
	l.router.Sysctl("net.netfilter.nf_conntrack_acct", "1")
	l.server.Serve(":"+plainPort, serveBody)
	l.server.Serve(":"+tlsPort, serveTLS)
	for i := range l.proxies {
		l.proxies[i] = &proxy{host: l.server, addr: fmt.Sprintf("203.0.113.%d", 11+i)}
		l.proxies[i].start()
	}
	return l
}

// proxy is a SOCKS server that can be killed and started again.
type proxy struct {
	host *labtest.Host
	addr string
	*labtest.Proc
}

func (p *proxy) start() { p.Proc = p.host.Start("microsocks", "-i", p.addr, "-p", proxyPort) }

// program returns the path of cgtun, built once.
var program = sync.OnceValues(func() (string, error) { return labtest.Program() })

// setting is how cgtun is set up: one row of the table.
type setting struct {
	name  string
	group string // of the members %q, as TOML
	alone bool   // the first path is all that there is
	off   bool   // no cgtun
}

var settings = []setting{
	{name: "no cgtun, two default routes", off: true},
	{name: "cgtun, one path", alone: true},
	{name: "race", group: `type = "race"`},
	{name: "fallback", group: `type = "fallback"`},
	{name: "balance by destination", group: `type = "balance"`},
	{name: "balance by load", group: "type = \"balance\"\nby = \"load\""},
	{name: "race without replay", group: "type = \"race\"\nreplay = false"},
	{name: "race that asks the next only after a failure", group: "type = \"race\"\nstagger = \"5s\""},
	{name: "race without either", group: "type = \"race\"\nstagger = \"5s\"\nreplay = false"},
}

// config has two paths, directly and by a SOCKS server on each.
func (l *lab) config(s setting) string {
	text := labtest.Config(l.selected, l.number, l.socket, "")
	for i, name := range []string{"a", "b"} {
		text += fmt.Sprintf(`
[[outbound]]
name = %q
type = "direct"
interface = "eth%d"
[[outbound]]
name = "s%[1]s"
type = "socks5"
server = "%[3]s"
via = %[1]q
`, name, i, l.proxies[i].addr+":"+proxyPort)
	}
	for _, g := range []struct{ name, members string }{{directly, `"a", "b"`}, {proxied, `"sa", "sb"`}} {
		members := g.members
		if s.alone {
			members, _, _ = strings.Cut(members, ",")
		}
		text += fmt.Sprintf("[[group]]\nname = %q\noutbounds = [%s]\n%s\n", g.name, members, s.group)
	}
	return text
}

// start has cgtun send all by the group of that name, and waits until it is ready.
func (l *lab) start(s setting, group string) {
	l.t.Helper()
	path, err := program()
	if err != nil {
		l.t.Fatal(err)
	}
	file := filepath.Join(l.dir, "config.toml")
	if err := os.WriteFile(file, []byte(l.config(s)+fmt.Sprintf("[[rule]]\nuse = %q\n", group)), 0o600); err != nil {
		l.t.Fatal(err)
	}
	d := l.in.StartCommand(exec.Command("ip", "netns", "exec", l.machine.Name, path, "-c", file))
	l.t.Cleanup(func() {
		if d.Exited() {
			l.t.Error("cgtun has ended before its time")
			return
		}
		if _, err := d.Stop(); err != nil {
			l.t.Errorf("cgtun ended with %v", err)
		}
		if out := os.Getenv("CGTUN_SURVIVAL_LOG"); out != "" {
			_ = os.WriteFile(filepath.Join(out, strings.ReplaceAll(l.t.Name(), "/", "_")+".log"), []byte(d.Output()), 0o644)
		}
	})
	d.WaitOutput("msg=ready", 20*time.Second)
}

// status is what cgtun says of itself.
func (l *lab) status() (s control.Status) {
	l.t.Helper()
	path, _ := program()
	out, err := l.machine.Command(context.Background(), path, "-s", l.socket, "status", "--json").Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		l.t.Fatalf("ask for the status: %v", err)
	}
	return s
}
