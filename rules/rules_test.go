package rules_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"cgtun/flow"
	"cgtun/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func prefixes(list ...string) []netip.Prefix {
	out := []netip.Prefix{}
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func tcp(dst string) *flow.Flow {
	return &flow.Flow{Proto: flow.TCP, Src: netip.MustParseAddrPort("192.0.2.9:4000"), Dst: netip.MustParseAddrPort(dst), Attachment: "home"}
}

func compile(t testing.TB, list ...rules.Config) *rules.Set {
	t.Helper()
	s, err := rules.Compile(list)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// always makes a rule that any flow meets, to show that a rule before it did not.
func always(use string) rules.Config { return rules.Config{Use: use} }

func TestConditions(t *testing.T) {
	owner := func(cgroup string) *flow.Owner { return &flow.Owner{Cgroup: cgroup} }
	udp53 := tcp("192.0.2.1:53")
	udp53.Proto = flow.UDP
	ping := &flow.Flow{Proto: flow.ICMP, Src: netip.MustParseAddrPort("192.0.2.9:77"), Dst: netip.MustParseAddrPort("192.0.2.1:0")}
	lab := tcp("192.0.2.1:53")
	lab.Attachment = "lab1"

	tests := []struct {
		name  string
		rule  rules.Config
		flow  *flow.Flow
		owner *flow.Owner
		want  bool
	}{
		{"no condition", rules.Config{}, tcp("192.0.2.1:80"), nil, true},
		{"in the prefix", rules.Config{CIDR: prefixes("192.0.2.0/24")}, tcp("192.0.2.255:80"), nil, true},
		{"beside the prefix", rules.Config{CIDR: prefixes("192.0.2.0/24")}, tcp("192.0.3.0:80"), nil, false},
		{"in the second prefix", rules.Config{CIDR: prefixes("10.0.0.0/8", "192.0.2.0/24")}, tcp("192.0.2.1:80"), nil, true},
		{"all of v4 is not v6", rules.Config{CIDR: prefixes("0.0.0.0/0")}, tcp("[2001:db8::1]:80"), nil, false},
		{"all of v6", rules.Config{CIDR: prefixes("::/0")}, tcp("[2001:db8::1]:80"), nil, true},
		{"v6 prefix", rules.Config{CIDR: prefixes("2001:db8::/32")}, tcp("[2001:db8:ffff::1]:80"), nil, true},
		{"mapped address is v4", rules.Config{CIDR: prefixes("192.0.2.0/24")}, tcp("[::ffff:192.0.2.1]:80"), nil, true},
		{"mapped prefix is v4", rules.Config{CIDR: prefixes("::ffff:192.0.2.0/120")}, tcp("192.0.2.1:80"), nil, true},
		{"zone does not matter", rules.Config{CIDR: prefixes("fe80::/10")}, tcp("[fe80::1%eth0]:80"), nil, true},
		{"from a file", rules.Config{CIDRFile: []string{"f"}, Listed: prefixes("192.0.2.0/24")}, tcp("192.0.2.1:80"), nil, true},
		{"file or key", rules.Config{CIDR: prefixes("10.0.0.0/8"), CIDRFile: []string{"f"}, Listed: prefixes("192.0.2.0/24")}, tcp("10.1.1.1:80"), nil, true},
		{"an empty file is met by nothing", rules.Config{CIDRFile: []string{"f"}}, tcp("192.0.2.1:80"), nil, false},
		{"source", rules.Config{Src: prefixes("192.0.2.8/31")}, tcp("10.0.0.1:80"), nil, true},
		{"other source", rules.Config{Src: prefixes("192.0.2.0/30")}, tcp("10.0.0.1:80"), nil, false},
		{"port", rules.Config{Port: []rules.PortRange{{From: 443, To: 443}, {From: 80, To: 80}}}, tcp("10.0.0.1:80"), nil, true},
		{"other port", rules.Config{Port: []rules.PortRange{{From: 443, To: 443}}}, tcp("10.0.0.1:80"), nil, false},
		{"first of a range", rules.Config{Port: []rules.PortRange{{From: 80, To: 90}}}, tcp("10.0.0.1:80"), nil, true},
		{"last of a range", rules.Config{Port: []rules.PortRange{{From: 80, To: 90}}}, tcp("10.0.0.1:90"), nil, true},
		{"before a range", rules.Config{Port: []rules.PortRange{{From: 80, To: 90}}}, tcp("10.0.0.1:79"), nil, false},
		{"after a range", rules.Config{Port: []rules.PortRange{{From: 80, To: 90}}}, tcp("10.0.0.1:91"), nil, false},
		{"after one of two that overlap", rules.Config{Port: []rules.PortRange{{From: 80, To: 90}, {From: 70, To: 99}}}, tcp("10.0.0.1:95"), nil, true},
		{"last port", rules.Config{Port: []rules.PortRange{{From: 8000, To: 65535}}}, tcp("10.0.0.1:65535"), nil, true},
		{"ping has no port", rules.Config{Port: []rules.PortRange{{From: 1, To: 65535}}}, ping, nil, false},
		{"proto", rules.Config{Proto: []string{"udp"}}, udp53, nil, true},
		{"other proto", rules.Config{Proto: []string{"udp", "icmp"}}, tcp("192.0.2.1:53"), nil, false},
		{"ping", rules.Config{Proto: []string{"udp", "icmp"}}, ping, nil, true},
		{"netns", rules.Config{Netns: []string{"lab1"}}, lab, nil, true},
		{"other netns", rules.Config{Netns: []string{"lab1", "lab2"}}, tcp("192.0.2.1:53"), nil, false},
		{"cgroup", rules.Config{Cgroup: []string{"/a"}}, tcp("192.0.2.1:53"), owner("/a"), true},
		{"beneath the cgroup", rules.Config{Cgroup: []string{"/a"}}, tcp("192.0.2.1:53"), owner("/a/b/c"), true},
		{"cgroup with the same beginning", rules.Config{Cgroup: []string{"/a"}}, tcp("192.0.2.1:53"), owner("/ab"), false},
		{"owner unknown", rules.Config{Cgroup: []string{"/**"}}, tcp("192.0.2.1:53"), nil, false},
		{"cgroup unknown", rules.Config{Cgroup: []string{"/"}}, tcp("192.0.2.1:53"), owner(""), false},
		{"all of several", rules.Config{CIDR: prefixes("10.0.0.0/8"), Port: []rules.PortRange{{From: 80, To: 80}}, Proto: []string{"tcp"}, Cgroup: []string{"/a"}}, tcp("10.0.0.1:80"), owner("/a"), true},
		{"all but one", rules.Config{CIDR: prefixes("10.0.0.0/8"), Port: []rules.PortRange{{From: 81, To: 81}}, Proto: []string{"tcp"}, Cgroup: []string{"/a"}}, tcp("10.0.0.1:80"), owner("/a"), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.rule.Use = "yes"
			s := compile(t, tt.rule, always("no"))
			v, missing := s.Match(&rules.Facts{Flow: tt.flow, Owner: tt.owner, Known: rules.FactOwner})
			if missing != 0 || (v.Use == "yes") != tt.want {
				t.Errorf("got %+v, missing %d; want a match: %v", v, missing, tt.want)
			}
		})
	}
}

func TestFirstMatchWins(t *testing.T) {
	s := compile(t,
		rules.Config{CIDR: prefixes("10.1.2.0/24"), Use: "narrow", Line: 3},
		rules.Config{CIDR: prefixes("10.0.0.0/8"), Use: "wide", Line: 7},
		rules.Config{CIDR: prefixes("10.1.3.0/24"), Use: "too late", Line: 11},
		rules.Config{Proto: []string{"udp"}, Use: "udp", Line: 15},
	)
	for dst, want := range map[string]rules.Verdict{
		"10.1.2.3:1":   {Rule: 1, Line: 3, Use: "narrow"},
		"10.9.9.9:1":   {Rule: 2, Line: 7, Use: "wide"},
		"10.1.3.1:1":   {Rule: 2, Line: 7, Use: "wide"},
		"192.0.2.77:1": {Use: "direct"},
	} {
		if got, _ := s.Match(&rules.Facts{Flow: tcp(dst)}); got != want {
			t.Errorf("%s: got %+v, want %+v", dst, got, want)
		}
	}
	if v, _ := rules.Empty().Match(&rules.Facts{Flow: tcp("10.0.0.1:1")}); v != (rules.Verdict{Use: "direct"}) {
		t.Errorf("without rules: got %+v", v)
	}
}

func TestOwnerIsAskedForOnlyIfItDecides(t *testing.T) {
	s := compile(t,
		rules.Config{Port: []rules.PortRange{{From: 22, To: 22}}, Use: "early"},
		rules.Config{CIDR: prefixes("10.0.0.0/8"), Cgroup: []string{"/a"}, Use: "owned"},
		always("rest"),
	)
	tests := []struct {
		name    string
		dst     string
		known   rules.Fact
		owner   *flow.Owner
		use     string
		missing rules.Fact
	}{
		{"decided before", "10.0.0.1:22", 0, nil, "early", 0},
		{"owner decides", "10.0.0.1:80", 0, nil, "", rules.FactOwner},
		{"the other condition fails", "192.0.2.1:80", 0, nil, "rest", 0},
		{"an owner that is not the last word", "10.0.0.1:80", 0, &flow.Owner{Cgroup: "/a"}, "", rules.FactOwner},
		{"known", "10.0.0.1:80", rules.FactOwner, &flow.Owner{Cgroup: "/a"}, "owned", 0},
		{"known to be nobody's", "10.0.0.1:80", rules.FactOwner, nil, "rest", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v, missing := s.Match(&rules.Facts{Flow: tcp(tt.dst), Owner: tt.owner, Known: tt.known})
			if v.Use != tt.use || missing != tt.missing {
				t.Errorf("got %q, missing %d; want %q, missing %d", v.Use, missing, tt.use, tt.missing)
			}
		})
	}
	if !s.NeedsOwner() || compile(t, always("x")).NeedsOwner() {
		t.Error("NeedsOwner: want true with a cgroup condition, false without")
	}
}

func TestOwnerIsMatchedByProcessAndUser(t *testing.T) {
	apt := &flow.Owner{Cgroup: "/a/b", Process: "/usr/bin/apt", PID: 7, UID: 0}
	named := &flow.Owner{Cgroup: "/a/b", Process: "apt", PID: 7, UID: 1000}
	for _, tt := range []struct {
		name  string
		rule  rules.Config
		owner *flow.Owner
		want  bool
	}{
		{"by name", rules.Config{Process: []string{"git", "apt"}}, apt, true},
		{"by path", rules.Config{Process: []string{"/usr/bin/apt"}}, apt, true},
		{"by another path", rules.Config{Process: []string{"/bin/apt"}}, apt, false},
		{"by part of a name", rules.Config{Process: []string{"ap", "bin"}}, apt, false},
		{"the name that it gave itself", rules.Config{Process: []string{"apt"}}, named, true},
		{"a path where only that is known", rules.Config{Process: []string{"/usr/bin/apt"}}, named, false},
		{"user by name", rules.Config{User: []string{"root"}}, apt, true},
		{"user by number", rules.Config{User: []string{"5", "1000"}}, named, true},
		{"another user", rules.Config{User: []string{"root"}}, named, false},
		{"a user that this machine does not have", rules.Config{User: []string{"no-such-user"}}, apt, false},
		{"all keys", rules.Config{Process: []string{"apt"}, User: []string{"0"}, Cgroup: []string{"/a/*"}}, apt, true},
		{"all keys but the user", rules.Config{Process: []string{"apt"}, User: []string{"0"}, Cgroup: []string{"/a/*"}}, named, false},
		{"all keys but the process", rules.Config{Process: []string{"git"}, User: []string{"0"}, Cgroup: []string{"/a/*"}}, apt, false},
		{"all keys but the cgroup", rules.Config{Process: []string{"apt"}, User: []string{"0"}, Cgroup: []string{"/b"}}, apt, false},
		{"nobody knows the owner", rules.Config{User: []string{"root"}}, nil, false},
		{"the process is not known", rules.Config{Process: []string{"apt"}}, &flow.Owner{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.rule.Use = "yes"
			s := compile(t, tt.rule)
			if !s.NeedsOwner() {
				t.Error("it does not need the owner")
			}
			v, _ := s.Match(&rules.Facts{Flow: tcp("10.0.0.1:1"), Owner: tt.owner, Known: rules.FactOwner})
			if (v.Use == "yes") != tt.want {
				t.Errorf("match: %v, want %v", !tt.want, tt.want)
			}
		})
	}
}

// Who denies a cgroup or a user denies those too of whom it is not known any more:
// to close a socket at once is no way around.
func TestLostOwnersAreDenied(t *testing.T) {
	for _, tt := range []struct {
		name string
		rule rules.Config
		want string
	}{
		{"a cgroup", rules.Config{Cgroup: []string{"/a"}, Use: "reject"}, "reject"},
		{"a user in silence", rules.Config{User: []string{"1000"}, Use: "drop"}, "drop"},
		{"for another port", rules.Config{Cgroup: []string{"/a"}, Port: []rules.PortRange{{From: 2, To: 2}}, Use: "reject"}, "direct"},
		{"a process, which calls itself what it likes", rules.Config{Process: []string{"apt"}, Use: "reject"}, "direct"},
		{"an outbound of theirs", rules.Config{Cgroup: []string{"/a"}, Use: "relay"}, "direct"},
	} {
		s := compile(t, tt.rule, rules.Config{Use: "direct"})
		facts := &rules.Facts{Flow: tcp("10.0.0.1:1"), Owner: &flow.Owner{Lost: true}, Known: rules.FactOwner}
		if v, _ := s.Match(facts); v.Use != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, v.Use, tt.want)
		}
		facts.Owner = nil
		if v, _ := s.Match(facts); v.Use != "direct" {
			t.Errorf("%s, of nobody here: %s", tt.name, v.Use)
		}
	}
}

// What is known of the cgroup alone decides as far as it goes.
func TestCgroupAloneDecidesWhatHangsOnIt(t *testing.T) {
	s := compile(t,
		rules.Config{Cgroup: []string{"/other"}, User: []string{"root"}, Use: "a"},
		rules.Config{Cgroup: []string{"/both"}, Process: []string{"apt"}, Use: "b"},
		rules.Config{Cgroup: []string{"/both", "/one"}, Use: "c"},
	)
	for cgroup, want := range map[string]struct {
		use     string
		missing rules.Fact
	}{"/one": {"c", 0}, "/both": {"", rules.FactOwner}, "/none": {"direct", 0}} {
		v, missing := s.Match(&rules.Facts{Flow: tcp("10.0.0.1:1"), Owner: &flow.Owner{Cgroup: cgroup}, Known: rules.FactCgroup})
		if v.Use != want.use || missing != want.missing {
			t.Errorf("%s: %q, missing %d, want %+v", cgroup, v.Use, missing, want)
		}
	}
}

func TestCgroupGlobs(t *testing.T) {
	tests := []struct {
		pattern string
		yes, no []string
	}{
		{"/", []string{"/", "/a", "/a/b"}, nil},
		{"/docker/**", []string{"/docker/x", "/docker/x/y"}, []string{"/docker", "/dockerd/x", "/a/docker/x"}},
		{"/docker/*", []string{"/docker/x", "/docker/x/y"}, []string{"/docker", "/podman/x"}},
		{"/a/*/c", []string{"/a/b/c", "/a/bb/c/d"}, []string{"/a/c", "/a/b/b/c", "/a/b/cc"}},
		{"/a/**/c", []string{"/a/c", "/a/b/c", "/a/b/b/c", "/a/bc/c/d"}, []string{"/a/bc", "/ac", "/a/b/cc"}},
		{"/*.slice/x-*.scope", []string{"/s.slice/x-1.scope", "/.slice/x-.scope/in"}, []string{"/s.slice/x-1.service", "/s/t.slice/x-1.scope"}},
		{"/**/buildkit", []string{"/buildkit", "/docker/buildkit/id", "/a/b/buildkit"}, []string{"/docker/buildkits", "/xbuildkit"}},
		{"/a**z", []string{"/az", "/a/b/z", "/axz/y"}, []string{"/a/b", "/ba/z"}},
		{"/*a*b/c", []string{"/xaxxb/c", "/ab/c", "/aabb/c"}, []string{"/ba/c", "/a/b/c"}},
		{"/**/a/**/b", []string{"/a/b", "/x/a/y/b", "/a/a/b/c"}, []string{"/b/a", "/a/xb"}},
		{`/sys-x\x2dy.slice`, []string{`/sys-x\x2dy.slice`}, []string{"/sys-x-y.slice"}},
	}
	for _, tt := range tests {
		s := compile(t, rules.Config{Cgroup: []string{tt.pattern}, Use: "yes"})
		match := func(path string) bool {
			v, _ := s.Match(&rules.Facts{Flow: tcp("10.0.0.1:1"), Owner: &flow.Owner{Cgroup: path}, Known: rules.FactOwner})
			return v.Use == "yes"
		}
		for _, path := range tt.yes {
			if !match(path) {
				t.Errorf("%s does not match %s", tt.pattern, path)
			}
		}
		for _, path := range tt.no {
			if match(path) {
				t.Errorf("%s matches %s", tt.pattern, path)
			}
		}
	}
}

// The index must say what asking one rule after the other says.
func TestIndexAgreesWithSearch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	addr := func() netip.Addr {
		return netip.AddrFrom4([4]byte{byte(8 + rnd.IntN(4)), byte(rnd.IntN(3)), byte(rnd.IntN(4)), byte(rnd.IntN(4))})
	}
	var list []rules.Config
	for n := range 70 {
		c := rules.Config{Use: fmt.Sprint(n)}
		for range rnd.IntN(4) {
			p, _ := addr().Prefix(12 + rnd.IntN(21))
			c.CIDR = append(c.CIDR, p)
		}
		if rnd.IntN(3) == 0 {
			p, _ := addr().Prefix(16 + rnd.IntN(17))
			c.Src = append(c.Src, p)
		}
		for range rnd.IntN(3) {
			from := uint16(1 + rnd.IntN(30))
			c.Port = append(c.Port, rules.PortRange{From: from, To: from + uint16(rnd.IntN(5))})
		}
		c.Proto = [][]string{nil, {"tcp"}, {"udp"}}[rnd.IntN(3)]
		if len(c.CIDR) > 0 && len(c.Port)+len(c.Src) > 0 {
			list = append(list, c)
		}
	}
	s := compile(t, list...)
	counts := map[bool]int{}
	for range 5000 {
		f := &flow.Flow{Proto: []flow.Proto{flow.TCP, flow.UDP}[rnd.IntN(2)],
			Src: netip.AddrPortFrom(addr(), 1), Dst: netip.AddrPortFrom(addr(), uint16(1+rnd.IntN(40)))}
		want := search(list, f)
		got, _ := s.Match(&rules.Facts{Flow: f})
		if got != want {
			t.Fatalf("%s %s -> %s: got %+v, want %+v", f.Proto, f.Src, f.Dst, got, want)
		}
		counts[got.Rule == 0]++
	}
	if counts[true] == 0 || counts[false] == 0 {
		t.Errorf("the flows do not reach both ends: %v", counts)
	}
}

func search(list []rules.Config, f *flow.Flow) rules.Verdict {
	within := func(list []netip.Prefix, a netip.Addr) bool {
		for _, p := range list {
			if p.Contains(a) {
				return true
			}
		}
		return len(list) == 0
	}
	for n, c := range list {
		port := len(c.Port) == 0
		for _, p := range c.Port {
			port = port || p.From <= f.Dst.Port() && f.Dst.Port() <= p.To
		}
		proto := len(c.Proto) == 0 || c.Proto[0] == f.Proto.String()
		if port && proto && within(c.CIDR, f.Dst.Addr()) && within(c.Src, f.Src.Addr()) {
			return rules.Verdict{Rule: n + 1, Use: c.Use}
		}
	}
	return rules.Verdict{Use: "direct"}
}

func TestCompileRefusesWhatItCannotServe(t *testing.T) {
	_, err := rules.Compile([]rules.Config{
		{Domain: []string{"a..example"}, DomainRegex: []string{"("}, Use: "direct"},
		{Cgroup: []string{"docker"}, Use: "direct"},
		{Proto: []string{"sctp"}, Use: "direct"},
	})
	if err == nil {
		t.Fatal("want an error: a condition left out would widen the rule")
	}
	for _, want := range []string{`rule 1: "a..example" is not a name`, "missing closing )", `rule 2: cgroup "docker"`, `rule 3: proto "sctp"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
}
