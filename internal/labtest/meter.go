package labtest

import (
	"fmt"
	"strings"
)

// Meter counts packets that arrive in a namespace: put behind the machine
// under test, it says what left that machine, whatever the machine says.
type Meter struct {
	h     *Host
	table string
}

// Meter counts the packets that come into the namespace by any device but lo,
// from a source in src to a destination in dst: prefixes of either family; none
// stands for all.
func (h *Host) Meter(src, dst []string) *Meter {
	h.lab.t.Helper()
	var matches []string
	for _, family := range []string{"ip", "ip6"} {
		s, sOK := elements(family, "saddr", src)
		d, dOK := elements(family, "daddr", dst)
		if sOK && dOK {
			proto := map[string]string{"ip": "ipv4", "ip6": "ipv6"}[family]
			matches = append(matches, strings.Join(strings.Fields("meta nfproto "+proto+" "+s+" "+d), " "))
		}
	}
	return h.MeterMatch(matches...)
}

// elements writes an nft match of the prefixes of one family. It is not ok if
// there are prefixes, but none of this family.
func elements(family, field string, prefixes []string) (match string, ok bool) {
	var own []string
	for _, p := range prefixes {
		if strings.Contains(p, ":") == (family == "ip6") {
			own = append(own, p)
		}
	}
	if len(own) == 0 {
		return "", len(prefixes) == 0
	}
	return fmt.Sprintf("%s %s { %s }", family, field, strings.Join(own, ", ")), true
}

// MeterMatch counts the packets that come into the namespace by any device but
// lo and match one of the nft expressions: "ip daddr 203.0.113.1 tcp dport 80".
func (h *Host) MeterMatch(matches ...string) *Meter {
	h.lab.t.Helper()
	h.meters++
	m := &Meter{h: h, table: fmt.Sprintf("labmeter%d", h.meters)}
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n\tcounter seen { }\n\tchain in {\n\t\ttype filter hook prerouting priority -400; policy accept;\n", m.table)
	for _, match := range matches {
		// One packet is counted once, though it match twice.
		fmt.Fprintf(&b, "\t\tiifname != \"lo\" %s counter name seen accept\n", match)
	}
	b.WriteString("\t}\n}\n")
	h.feed(b.String(), "nft", "-f", "-")
	return m
}

// Packets returns the count so far.
func (m *Meter) Packets() uint64 {
	m.h.lab.t.Helper()
	out := m.h.Run("nft", "list", "counter", "inet", m.table, "seen")
	var n uint64
	_, after, ok := strings.Cut(out, "packets ")
	if _, err := fmt.Sscan(after, &n); !ok || err != nil {
		m.h.lab.t.Fatalf("read meter of %s: %q", m.h.Name, out)
	}
	return n
}

// Reset sets the count to 0.
func (m *Meter) Reset() {
	m.h.lab.t.Helper()
	m.h.Run("nft", "reset", "counter", "inet", m.table, "seen")
}
