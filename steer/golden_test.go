package steer_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/steer"
)

// plan is the smallest plan with the default numbers.
func plan() steer.Plan {
	return steer.Plan{Mark: 101, Mask: 0xffffffff, Table: 101, Priority: 10101, Device: "tun0"}
}

func refOf(t testing.TB, h *labtest.Host) netns.Ref {
	t.Helper()
	ref, err := netns.Named(h.Path)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// state is all that steering may change in a namespace, as text.
func state(h *labtest.Host) string {
	return h.Run("nft", "list", "ruleset") + h.Run("ip", "rule") + h.Run("ip", "-6", "rule") +
		h.Run("ip", "route", "show", "table", "all") + h.Run("ip", "-6", "route", "show", "table", "all")
}

// A plan and what the tools of the system show of it afterwards. The files
// are the specification: read them when a rule is changed. UPDATE=1 writes
// them anew.
func TestPlanAsText(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"), labtest.Tool("ip"))
	tests := []struct {
		name   string
		noV6   bool
		change func(*steer.Plan)
	}{
		{name: "plain", change: func(*steer.Plan) {}},
		{name: "masked", change: func(p *steer.Plan) {
			p.Mark, p.Mask, p.Table, p.Priority, p.Device = 0x4500, 0xff00, 4500, 900, "capture7"
		}},
		{name: "cgroups", change: func(p *steer.Plan) {
			p.Self = steer.Cgroup{Path: "/x/self", ID: 0x123456, Level: 2}
			p.Cgroups = []steer.Cgroup{
				{Path: "/c", ID: 0x10003, Level: 1}, {Path: "/a/b", ID: 0x10002, Level: 2}, {Path: "/a", ID: 0x10001, Level: 1},
			}
			p.Others = []steer.Cgroup{{Path: "/a/c", ID: 0x10005, Level: 2}, {Path: "/a/b/d", ID: 0x10004, Level: 3}}
			p.Bypass = []netip.Prefix{
				netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("10.1.1.7/24"),
				netip.MustParsePrefix("10.1.1.64/26"), netip.MustParsePrefix("::ffff:192.0.2.0/120"),
				netip.MustParsePrefix("fd09::/64"),
			}
		}},
		{name: "interfaces", change: func(p *steer.Plan) { p.All, p.Interfaces, p.No6 = true, []string{"br1", "br0"}, true }},
		{name: "nov6", noV6: true, change: func(*steer.Plan) {}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := labtest.New(t).Host("home")
			p := plan()
			tt.change(&p)
			h.Run("ip", "tuntap", "add", p.Device, "mode", "tun")
			if tt.noV6 {
				h.Sysctl("net.ipv6.conf."+p.Device+".disable_ipv6", "1")
			}
			h.Run("ip", "link", "set", p.Device, "up")
			before := state(h)
			table := strconv.Itoa(p.Table)
			s, err := steer.OpenHome(refOf(t, h), p.Table)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time changes nothing
				if err := s.Apply(p); err != nil {
					t.Fatal(err)
				}
			}
			if s.V6() == (tt.noV6 || p.No6) {
				t.Errorf("V6() = %v", s.V6())
			}
			got := "# nft list ruleset\n" + h.Run("nft", "list", "ruleset") +
				"# ip rule\n" + h.Run("ip", "rule") + "# ip -6 rule\n" + h.Run("ip", "-6", "rule") +
				"# ip route show table\n" + h.Run("ip", "route", "show", "table", table)
			v6, _ := h.Try("ip", "-6", "route", "show", "table", table)
			got += "# ip -6 route show table\n" + v6
			golden(t, tt.name, got)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if after := state(h); after != before {
				t.Errorf("after Close:\n%s\nbefore:\n%s", after, before)
			}
			h.Run("ip", "link", "del", p.Device)
		})
	}
}

// The program that owns a table is shown with its name, which is the test's.
var progname = regexp.MustCompile(`# progname \S+`)

func golden(t *testing.T, name, got string) {
	t.Helper()
	lines := strings.Split(progname.ReplaceAllString(got, "# progname PROGRAM"), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ")
	}
	got = strings.Join(lines, "\n")
	path := filepath.Join("testdata", name+".txt")
	if os.Getenv("UPDATE") == "1" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant:\n%s", path, got, want)
	}
}
