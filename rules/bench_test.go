package rules_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"cgtun/flow"
	"cgtun/rules"
)

// many makes rules with so many random prefixes each, v4 and v6, all with a
// port that no flow here has, and one that decides at the end.
func many(n, each int) ([]rules.Config, []netip.Addr) {
	rnd := rand.New(rand.NewPCG(3, 4))
	var list []rules.Config
	var inside []netip.Addr
	for i := range n {
		c := rules.Config{Use: fmt.Sprint(i), Port: []rules.PortRange{{From: 1, To: 10}}, Netns: []string{"lab1", "home"}, Src: prefixes("192.0.2.0/24", "fd00::/8")}
		for j := range each {
			a := netip.AddrFrom4([4]byte{byte(1 + rnd.IntN(222)), byte(rnd.IntN(256)), byte(rnd.IntN(256)), 0})
			if j%4 == 0 {
				a = netip.AddrFrom16([16]byte{0x20, 1, byte(rnd.IntN(256)), byte(rnd.IntN(256)), byte(rnd.IntN(256)), byte(rnd.IntN(256))})
			}
			p, _ := a.Prefix(a.BitLen()/2 + rnd.IntN(9))
			c.CIDR = append(c.CIDR, p)
			inside = append(inside, a)
		}
		list = append(list, c)
	}
	return append(list, rules.Config{Cgroup: []string{"/docker/buildkit/**", "/cgtun"}, Use: "last"}), inside
}

func flows(inside []netip.Addr) []rules.Facts {
	owner := &flow.Owner{Cgroup: "/cgtun/step"}
	var list []rules.Facts
	for i := range 1024 {
		f := tcp("192.0.2.1:443")
		f.Dst = netip.AddrPortFrom(inside[i*len(inside)/1024], 443)
		list = append(list, rules.Facts{Flow: f, Owner: owner, Known: rules.FactOwner})
	}
	return list
}

func BenchmarkMatch(b *testing.B) {
	for _, size := range []struct{ rules, prefixes int }{{1, 10_000}, {10, 1000}, {100, 100}, {1000, 10}, {1000, 1000}} {
		b.Run(fmt.Sprintf("rules=%d/prefixes=%d", size.rules, size.rules*size.prefixes), func(b *testing.B) {
			list, inside := many(size.rules, size.prefixes)
			s, facts := compile(b, list...), flows(inside)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if v, _ := s.Match(&facts[i%len(facts)]); v.Use != "last" {
					b.Fatalf("%+v", v)
				}
			}
		})
	}
}

func TestMatchAllocatesNothing(t *testing.T) {
	list, inside := many(100, 100)
	s, facts := compile(t, list...), flows(inside)
	i := 0
	if n := testing.AllocsPerRun(5000, func() {
		s.Match(&facts[i%len(facts)])
		i++
	}); n != 0 {
		t.Errorf("%v allocations a match, want 0", n)
	}
}

func BenchmarkCompile(b *testing.B) {
	list, _ := many(100, 100)
	b.ReportAllocs()
	for b.Loop() {
		compile(b, list...)
	}
}
