package cgroupsel_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"cgtun/internal/labtest"
)

// meter counts the packets of "send" in the output hook of one namespace, by
// kind and by whether they have the mark.
type meter struct {
	t *testing.T
	h *labtest.Host
}

func newMeter(t *testing.T, h *labtest.Host, mark, mask uint32) *meter {
	t.Helper()
	var counters, rules strings.Builder
	for i, k := range kinds {
		proto := "udp"
		if strings.HasPrefix(k.name, "tcp") {
			proto = "tcp"
		}
		fmt.Fprintf(&counters, "\tcounter %s_yes { }\n\tcounter %s_no { }\n", k.name, k.name)
		fmt.Fprintf(&rules, "\t\t%s dport %d meta mark & %#x == %#x counter name %s_yes accept\n", proto, 7001+i, mask, mark, k.name)
		fmt.Fprintf(&rules, "\t\t%s dport %d counter name %s_no\n", proto, 7001+i, k.name)
	}
	text := fmt.Sprintf("table inet meter%x {\n%s\tchain out {\n\t\ttype filter hook output priority 0; policy accept;\n%s\t}\n}\n", mark, counters.String(), rules.String())
	h.Run("nft", text)
	return &meter{t: t, h: h}
}

// read returns "kind_yes" and "kind_no" → packets and starts again from 0.
func (m *meter) read() map[string]int {
	m.t.Helper()
	var list struct {
		Nftables []struct {
			Counter *struct {
				Name    string
				Packets int
			}
		}
	}
	if err := json.Unmarshal([]byte(m.h.Run("nft", "-j", "reset", "counters")), &list); err != nil {
		m.t.Fatal(err)
	}
	counts := make(map[string]int)
	for _, one := range list.Nftables {
		if one.Counter != nil {
			counts[one.Counter.Name] += one.Counter.Packets
		}
	}
	return counts
}

// want compares the counts since the last read: n packets of each kind, all
// marked or all not.
func (m *meter) want(n int, marked bool, what string) {
	m.t.Helper()
	got := m.read()
	for _, k := range kinds {
		yes, no := n, 0
		if !marked {
			yes, no = 0, n
		}
		if got[k.name+"_yes"] != yes || got[k.name+"_no"] != no {
			m.t.Errorf("%s: %s: %d packets with the mark and %d without, want %d and %d", what, k.name, got[k.name+"_yes"], got[k.name+"_no"], yes, no)
		}
	}
}
