package labtest_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// client (10.9.0.1, fd09::1) ──── server (10.9.0.2, fd09::2)
func pair(t *testing.T) (lab *labtest.Lab, client, server *labtest.Host) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"), labtest.Tool("nft"), labtest.Tool("nsenter"))
	lab = labtest.New(t)
	client, server = lab.Host("client"), lab.Host("server")
	lab.Link(client, server, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	return lab, client, server
}

func TestExchangeBothFamilies(t *testing.T) {
	_, client, server := pair(t)
	srv := server.ServeExchange(":7000")
	for _, host := range []string{"10.9.0.2", "fd09::2"} {
		conn, err := client.Dial("tcp", net.JoinHostPort(host, "7000"))
		if err != nil {
			t.Fatal(err)
		}
		if err := labtest.Exchange(conn.(*net.TCPConn), labtest.Transfer{Up: 1 << 20, Down: 3 << 20}); err != nil {
			t.Error(host, err)
		}
		conn.Close()
	}
	srv.Close()
	if err := srv.Err(); err != nil {
		t.Error(err)
	}
	if got := fmt.Sprint(srv.Clients()); !strings.Contains(got, "10.9.0.1:") || !strings.Contains(got, "[fd09::1]:") {
		t.Errorf("the server saw %s", got)
	}
}

func TestExchangeSeesWrongBytes(t *testing.T) {
	if err := labtest.CheckPattern(labtest.Pattern(1000), 1000); err != nil {
		t.Error(err)
	}
	for _, wrong := range []string{"", "short", strings.Repeat("x", 1000)} {
		if labtest.CheckPattern(strings.NewReader(wrong), 1000) == nil {
			t.Errorf("%d wrong bytes pass", len(wrong))
		}
	}
}

func TestEchoAndMeter(t *testing.T) {
	_, client, server := pair(t)
	srv := server.ServeUDPEcho(":7001")
	all := server.Meter(nil, nil)
	mine := server.Meter([]string{"10.9.0.1"}, []string{"10.9.0.0/24"})
	six := server.Meter([]string{"fd09::/64"}, nil)
	conn, err := client.Dial("udp", "10.9.0.2:7001")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 10)
	for range 3 {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(buf); err != nil {
			t.Fatal(err)
		}
	}
	if n := mine.Packets(); n != 3 {
		t.Errorf("meter of the client's packets: %d, want 3", n)
	}
	if n := six.Packets(); n != 0 {
		t.Errorf("meter of v6 packets: %d, want 0", n)
	}
	if n := all.Packets(); n < 3 {
		t.Errorf("meter of all packets: %d, want 3 or more", n)
	}
	mine.Reset()
	if n := mine.Packets(); n != 0 {
		t.Errorf("meter after reset: %d", n)
	}
	if len(srv.Clients()) != 3 {
		t.Errorf("the server saw %v", srv.Clients())
	}
}

func TestCommandStartsInCgroup(t *testing.T) {
	labtest.Need(t, labtest.CgroupV2)
	lab, client, _ := pair(t)
	sel := lab.Cgroup("sel")
	out, err := sel.Command(client.Command(context.Background(), "cat", "/proc/self/cgroup")).Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := "0::" + sel.Path + "\n"; !strings.Contains(string(out), want) {
		t.Errorf("the process's cgroups are %q, want %q", out, want)
	}
}

func TestProc(t *testing.T) {
	_, client, _ := pair(t)
	p := client.Start("sh", "-c", "echo $$; exec sleep 60")
	p.WaitOutput("\n", 10*time.Second)
	if got := strings.TrimSpace(p.Output()); got != strconv.Itoa(p.Pid) {
		t.Errorf("pid of the program is %s, of Proc %d", got, p.Pid)
	}
	if took, err := p.Stop(); err == nil {
		t.Errorf("stop took %v: %v", took, err)
	}
}

func TestSnapshotShowsChanges(t *testing.T) {
	labtest.Need(t, labtest.CgroupV2)
	lab, client, _ := pair(t)
	sel := lab.Cgroup("sel")
	before := lab.Snapshot(client)
	if d := before.Diff(lab.Snapshot(client)); d != "" {
		t.Errorf("a state differs from itself:\n%s", d)
	}
	changes := map[string]string{
		"nft add table inet x":                                   "+ nft: table inet x",
		"ip -6 rule add pref 77 lookup 77":                       "+ ip -6 rule: 77:",
		"ip route add 10.1.0.0/16 via 10.9.0.2 table 9":          "+ ip -4 route: 10.1.0.0/16",
		"ip link add dum1 type veth peer dum2":                   "dum1",
		"ip addr add 10.7.7.7/32 dev lo":                         "10.7.7.7/32",
		"sh -c echo 1 > /proc/sys/net/ipv4/conf/lo/log_martians": "ipv4/conf/lo/log_martians:1",
		"mkdir " + sel.Dir + "/below":                            "+ cgroup: " + sel.Path + "/below",
	}
	for cmd, want := range changes {
		args := strings.Fields(cmd)
		if args[0] == "sh" {
			args = []string{"sh", "-c", strings.TrimPrefix(cmd, "sh -c ")}
		}
		client.Run(args[0], args[1:]...)
		if d := before.Diff(lab.Snapshot(client)); !strings.Contains(d, want) {
			t.Errorf("after %q the difference lacks %q:\n%s", cmd, want, d)
		}
	}
}

// recorder takes the place of a test whose lab must fail.
type recorder struct {
	testing.TB
	errors   []string
	cleanups []func()
}

func (r *recorder) Helper()                   {}
func (r *recorder) Failed() bool              { return false }
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Error(a ...any)            { r.errors = append(r.errors, fmt.Sprint(a...)) }
func (r *recorder) Errorf(f string, a ...any) { r.errors = append(r.errors, fmt.Sprintf(f, a...)) }

func (r *recorder) end() string {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
	return strings.Join(r.errors, "\n")
}

func TestLabSeesWhatIsLeft(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("nft"))
	tests := []struct {
		name string
		do   func(*labtest.Lab, *labtest.Host)
		want string
	}{
		{"nothing", func(*labtest.Lab, *labtest.Host) {}, ""},
		{"table", func(_ *labtest.Lab, h *labtest.Host) { h.Run("nft", "add", "table", "inet", "cgtun_7") }, "nft table inet cgtun_7"},
		{"rule", func(_ *labtest.Lab, h *labtest.Host) {
			h.Run("ip", "-6", "rule", "add", "pref", "7", "lookup", "7", "protocol", "197")
		}, "ip rule 7:"},
		{"rule of IPv4", func(_ *labtest.Lab, h *labtest.Host) {
			h.Run("ip", "rule", "add", "pref", "7", "lookup", "7", "protocol", "197")
		}, "ip rule 7:"},
		{"route", func(_ *labtest.Lab, h *labtest.Host) {
			h.Run("ip", "route", "add", "throw", "10.0.0.0/8", "table", "7", "proto", "197")
		}, "route throw 10.0.0.0/8"},
		{"route of IPv6", func(_ *labtest.Lab, h *labtest.Host) {
			h.Run("ip", "route", "add", "unreachable", "fd55::/64", "table", "7", "proto", "197")
		}, "route unreachable fd55::/64"},
		{"device", func(_ *labtest.Lab, h *labtest.Host) { h.Run("ip", "tuntap", "add", "tun9", "mode", "tun") }, "device tun9"},
		{"process", func(_ *labtest.Lab, h *labtest.Host) { h.Run("sh", "-c", "sleep 60 >/dev/null 2>&1 &") }, "process "},
		{"cgroup process", func(l *labtest.Lab, h *labtest.Host) {
			c := l.Cgroup("sel")
			if err := c.Command(h.Command(context.Background(), "sh", "-c", "sleep 60 >/dev/null 2>&1 &")).Run(); err != nil {
				t.Error(err)
			}
		}, "process "},
		{"made cgroup", func(l *labtest.Lab, h *labtest.Host) {
			c := l.Cgroup("sel")
			h.Run("mkdir", c.Dir+"/made")
			h.Run("setfattr", "-n", "user.cgtun", "-v", "1", c.Dir+"/made")
		}, "made by cgtun"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "made cgroup" {
				labtest.Need(t, labtest.Tool("setfattr"))
			}
			r := &recorder{TB: t}
			lab := labtest.New(r)
			tt.do(lab, lab.Host("h"))
			got := r.end()
			if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("the lab says %q, want %q in it", got, tt.want)
			}
		})
	}
}

func TestLabSeesNamespaceHeldOpen(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"))
	r := &recorder{TB: t}
	lab := labtest.New(r)
	h := lab.Host("h")
	f, err := os.Open(h.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer labtest.SetGoneWithin(time.Second)()
	if got := r.end(); !strings.Contains(got, "outlives the test") {
		t.Errorf("the lab says %q", got)
	}
}

// A connection that was closed, and whose FIN is lost, is left by nobody.
func TestLabEndsConnectionsThatNobodyHas(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"), labtest.Tool("ss"))
	lab := labtest.New(t)
	h := lab.Host("h")
	h.ServeEcho("127.0.0.1:7000")
	c, err := h.Dial("tcp", "127.0.0.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	h.LeavesBehind()
	h.Run("nft", "add table inet cut; add chain inet cut out { type filter hook output priority 0; policy drop; }")
	c.Close()
	t.Cleanup(labtest.SetGoneWithin(30 * time.Second))
}

func TestWhatKilledTestsLeftIsTakenAway(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	left := fmt.Sprintf("lab%dn1-host", ended.Process.Pid)
	alive := fmt.Sprintf("lab%dn99-host", os.Getpid())
	for _, name := range []string{left, alive} {
		if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	defer func() {
		if out, err := exec.Command("ip", "netns", "del", alive).CombinedOutput(); err != nil {
			t.Errorf("the namespace of a test that runs is gone: %s", out)
		}
	}()
	if err := labtest.Sweep(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/run/netns/" + left); err == nil {
		t.Errorf("%s is still there", left)
	}
}
