package rules_test

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"cgtun/rules"
)

func TestReadPrefixes(t *testing.T) {
	const text = "\ufeff10.1.2.3/8 # masked\r\n" +
		"\n" +
		"  2001:db8::/32\t\n" +
		"# a comment\n" +
		"192.0.2.7\n" +
		"::ffff:198.51.100.0/120#mapped\n" +
		" 10.0.0.0/33\n" +
		"fe80::1%eth0\n" +
		"no prefix\n" +
		"2001:db8::1"
	var problems []string
	got, err := rules.ReadPrefixes(strings.NewReader(text), func(line, col int, what string) {
		what, _, _ = strings.Cut(what, ";")
		problems = append(problems, fmt.Sprintf("%d:%d: %s", line, col, what))
	})
	if err != nil {
		t.Fatal(err)
	}
	want := prefixes("10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32", "198.51.100.0/24", "2001:db8::1/128")
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	wantProblems := []string{`7:2: "10.0.0.0/33" cannot be read`, `8:1: "fe80::1%eth0" cannot be read`, `9:1: "no prefix" cannot be read`}
	if !slices.Equal(problems, wantProblems) {
		t.Errorf("got problems %q, want %q", problems, wantProblems)
	}
}

func TestReadPrefixesStopsAtAnEndlessLine(t *testing.T) {
	_, err := rules.ReadPrefixes(strings.NewReader("10.0.0.0/8\n"+strings.Repeat("1", 1<<17)), func(int, int, string) {})
	if !errors.Is(err, bufio.ErrTooLong) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("got %v, want a line that is too long, and which", err)
	}
}

// Every line is a prefix, a problem or nothing, what was read reads back as
// itself, and the index finds it.
func FuzzReadPrefixes(f *testing.F) {
	for _, seed := range []string{"10.0.0.0/8\n2001:db8::/32", "# x\n\n1.2.3.4 #y", "::ffff:1.2.3.4/97", "1.2.3.4/-1\n/\n0/0", "fe80::%1/10", "\ufeff::/0\r\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		problems := 0
		list, err := rules.ReadPrefixes(strings.NewReader(text), func(line, col int, what string) {
			problems++
			if line < 1 || col < 1 || what == "" {
				t.Fatalf("problem at %d:%d: %q", line, col, what)
			}
		})
		if err != nil {
			return
		}
		if n := strings.Count(text, "\n") + 1; len(list)+problems > n {
			t.Fatalf("%d prefixes and %d problems in %d lines", len(list), problems, n)
		}
		var again strings.Builder
		for _, p := range list {
			fmt.Fprintln(&again, p)
		}
		same, err := rules.ReadPrefixes(strings.NewReader(again.String()), func(_, _ int, what string) { t.Fatal(what) })
		if err != nil || !slices.Equal(same, list) {
			t.Fatalf("%v read back as %v, %v", list, same, err)
		}
		s := compile(t, rules.Config{CIDRFile: []string{"f"}, Listed: list, Use: "yes"}, always("no"))
		for _, p := range list {
			flow := tcp("192.0.2.1:80")
			flow.Dst = netip.AddrPortFrom(p.Addr(), 80)
			if v, _ := s.Match(&rules.Facts{Flow: flow}); v.Use != "yes" {
				t.Fatalf("%s is listed and not found", p)
			}
		}
	})
}
