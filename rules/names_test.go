package rules_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"cgtun/flow"
	"cgtun/rules"
)

// listed is a rule whose domain_file held text.
func listed(t testing.TB, text, use string) rules.Config {
	t.Helper()
	c := rules.Config{DomainFile: []string{"f"}, Use: use}
	if err := c.ListedNames.ReadNames(strings.NewReader(text), func(line, col int, what string) {
		t.Errorf("line %d, column %d: %s", line, col, what)
	}); err != nil {
		t.Fatal(err)
	}
	return c
}

func named(name string) *rules.Facts {
	return &rules.Facts{Flow: tcp("192.0.2.1:443"), Name: name, Known: rules.FactName | rules.FactOwner}
}

// Names are met exactly, by suffix at a dot, by a word, by an expression, or by a
// list of either kind.
func TestNames(t *testing.T) {
	list := "# a list\r\n\nads.example # all of it\n.tracker.example\n*.pixel.example.\n0.0.0.0 one.example TWO.example\n::1 three.example\nxn--bcher-kva.example\nb\u00fccher.test\n"
	tests := []struct {
		name string
		rule rules.Config
		yes  []string
		no   []string
	}{
		{"exact", rules.Config{Domain: []string{"a.Example.", "b.example"}}, []string{"a.example", "b.example"}, []string{"x.a.example", "example", "aa.example", ""}},
		{"suffix", rules.Config{DomainSuffix: []string{"example", ".b.test"}}, []string{"example", "a.example", "x.y.example", "b.test", "a.b.test"}, []string{"anexample", "example.org", "test", "xb.test", ""}},
		{"word", rules.Config{DomainKeyword: []string{"GooG"}}, []string{"goog", "www.google.example"}, []string{"go.og", ""}},
		{"expression", rules.Config{DomainRegex: []string{`^A\d+\.example$`, "x{3}"}}, []string{"a12.example", "wxxxw"}, []string{"a.example", "xa1.example", ""}},
		{"several", rules.Config{Domain: []string{"a.test"}, DomainKeyword: []string{"key"}}, []string{"a.test", "thekey"}, []string{"b.test"}},
		{"list", listed(t, list, ""), []string{"ads.example", "x.ads.example", "tracker.example", "a.pixel.example", "one.example", "two.example", "three.example", "www.xn--bcher-kva.example", "xn--bcher-kva.test"},
			[]string{"x.one.example", "example", "a.three.example", ""}},
		{"empty list", listed(t, "#\n", ""), nil, []string{"a.example", ""}},
		{"and a port", rules.Config{Domain: []string{"a.test"}, Port: []rules.PortRange{{From: 80, To: 80}}}, nil, []string{"a.test"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.rule.Use = "yes"
			s := compile(t, tt.rule, always("no"))
			for want, names := range map[string][]string{"yes": tt.yes, "no": tt.no} {
				for _, name := range names {
					if v, missing := s.Match(named(name)); v.Use != want || missing != 0 {
						t.Errorf("%q: %s, missing %v, want %s", name, v.Use, missing, want)
					}
				}
			}
		})
	}
}

// Of several rules the first one counts, whatever they know a name by.
func TestFirstNameRuleCounts(t *testing.T) {
	s := compile(t,
		rules.Config{Domain: []string{"www.a.example"}, Use: "1"},
		rules.Config{DomainSuffix: []string{"b.a.example"}, Use: "2"},
		rules.Config{DomainKeyword: []string{"key"}, Use: "3"},
		rules.Config{DomainSuffix: []string{"a.example"}, Domain: []string{"x.b.a.example"}, Use: "4"},
		rules.Config{DomainSuffix: []string{"example"}, Use: "5"},
		rules.Config{Domain: []string{"www.a.example", "y.example"}, Use: "6"},
	)
	for name, want := range map[string]string{
		"www.a.example": "1", "x.b.a.example": "2", "key.b.a.example": "2", "key.a.example": "3", "c.a.example": "4", "y.example": "5", "example": "5", "test": "direct", "": "direct",
	} {
		if v, _ := s.Match(named(name)); v.Use != want {
			t.Errorf("%q: %s, want %s", name, v.Use, want)
		}
	}
}

// A name is asked for only where a rule hangs on it that nothing else decides.
func TestNameIsMissing(t *testing.T) {
	byName := rules.Config{Domain: []string{"a.test"}, Use: "named"}
	onPort := byName
	onPort.Port = []rules.PortRange{{From: 80, To: 80}}
	byOwner := byName
	byOwner.Cgroup = []string{"/other"}
	before := rules.Config{CIDR: prefixes("192.0.2.0/24"), Use: "before"}
	for _, tt := range []struct {
		name    string
		set     *rules.Set
		want    string
		missing rules.Fact
	}{
		{"hangs on it", compile(t, byName, always("last")), "", rules.FactName},
		{"decided before", compile(t, before, byName), "before", 0},
		{"another port", compile(t, onPort, always("last")), "last", 0},
		{"another process", compile(t, byOwner, always("last")), "last", 0},
		{"no such rule", compile(t, always("last")), "last", 0},
	} {
		f := &rules.Facts{Flow: tcp("192.0.2.1:443"), Owner: &flow.Owner{Cgroup: "/cgtun"}, Known: rules.FactOwner}
		if v, missing := tt.set.Match(f); v.Use != tt.want || missing != tt.missing {
			t.Errorf("%s: %s, missing %v", tt.name, v.Use, missing)
		}
	}
}

// What is wrong in a list has its place, and the rest of it counts.
func TestListOfNamesHasMistakes(t *testing.T) {
	var n rules.Names
	var got []string
	err := n.ReadNames(strings.NewReader("good.example\nbad..example\n  x/y\nname other\n0.0.0.0 good2.example not;good\n"+strings.Repeat("a", 64)+".example\n"),
		func(line, col int, _ string) { got = append(got, fmt.Sprintf("%d:%d", line, col)) })
	if err != nil || fmt.Sprint(got) != "[2:1 3:3 4:1 5:23 6:1]" || n.Len() != 2 {
		t.Errorf("%v, %v, %d names", err, got, n.Len())
	}
}

func FuzzReadNames(f *testing.F) {
	f.Add("example.org\n0.0.0.0 a b # c\n*.x.\n\ufeffy")
	f.Fuzz(func(t *testing.T, text string) {
		c := rules.Config{DomainFile: []string{"f"}, Use: "yes"}
		bad := 0
		_ = c.ListedNames.ReadNames(strings.NewReader(text), func(line, col int, what string) {
			if bad++; line < 1 || col < 1 {
				t.Fatalf("place %d:%d", line, col)
			}
		})
		if words := len(strings.Fields(text)); c.ListedNames.Len() > words {
			t.Fatalf("%d names of %d words", c.ListedNames.Len(), words)
		}
		s := compile(t, c)
		for word := range strings.FieldsSeq(text) {
			s.Match(named(word))
		}
	})
}

// million is a rule with that many names, and names that are below some of them.
func million(t testing.TB, n int) (rules.Config, []string) {
	var b strings.Builder
	var below []string
	for i := range n {
		name := fmt.Sprintf("host%d.zone%d.example%d.test", i, i%1000, i%7)
		b.WriteString(name)
		b.WriteByte('\n')
		if i%(n/1024+1) == 0 {
			below = append(below, "www."+name, fmt.Sprintf("www.host.zone%d.example.test", i))
		}
	}
	return listed(t, b.String(), "listed"), below
}

func BenchmarkMatchName(b *testing.B) {
	list, names := million(b, 1_000_000)
	all, inside := many(100, 1000)
	s := compile(b, append([]rules.Config{list}, all...)...)
	facts := flows(inside)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		f := &facts[i%len(facts)]
		f.Name, f.Known = names[i%len(names)], rules.FactName|rules.FactOwner
		if v, missing := s.Match(f); missing != 0 || v.Use != "listed" && v.Use != "last" {
			b.Fatalf("%+v", v)
		}
	}
}

// A million names are compiled into little memory, and a decision allocates
// nothing.
func TestManyNamesInLittleMemory(t *testing.T) {
	n := 1_000_000
	if testing.Short() {
		n = 100_000
	}
	list, names := million(t, n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s := compile(t, list, always("last"))
	list = rules.Config{}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / int64(n); each > 40 {
		t.Errorf("%d bytes a name", each)
	}
	i := 0
	f := named("")
	if got := testing.AllocsPerRun(1000, func() { f.Name = names[i%len(names)]; s.Match(f); i++ }); got != 0 {
		t.Errorf("%v allocations a match", got)
	}
	runtime.KeepAlive(s)
}
