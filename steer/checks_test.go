package steer_test

import (
	"strings"
	"testing"

	"cgtun/doctor"
	"cgtun/internal/labtest"
	"cgtun/steer"
)

// What others have that is in the way of a plan, and the command that mends
// it: which is run, and then nothing is found any more.
func TestChecksNameWhatIsInTheWay(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"), labtest.Tool("ip"))
	byTun := func(p *steer.Plan) { p.Interfaces = []string{"lo"} }
	byDev := func(p *steer.Plan) { p.Device, p.Via = "", steer.Via{Dev: "lo"} }
	tests := []struct {
		name, setup, check, what string
		change                   func(*steer.Plan)
		mends                    bool
	}{
		{"nothing", "true", "firewall", "nothing of others", byTun, false},
		{"output", "nft add table ip f; nft 'add chain ip f OUT { type filter hook output priority 0; policy drop; }'", "firewall", "chain OUT of table ip f drops by default", byTun, true},
		{"forward", "nft add table inet f; nft 'add chain inet f FWD { type filter hook forward priority 0; policy drop; }'", "firewall", "what comes in through lo is lost", byTun, true},
		{"same mark", "ip rule add pref 20000 fwmark 0x5/0xf lookup 7", "ip rules", `"20000: from all fwmark 0x5/0xf lookup 7`, byTun, true},
		{"inverted mark before ours", "ip rule add pref 50 not fwmark 0xca6c lookup 7", "ip rules", "all but one mark", byTun, true},
		{"inverted mark behind ours", "ip rule add pref 20000 not fwmark 0xca6c lookup 7", "ip rules", "nothing of others", byTun, false},
		{"everything before ours", "ip -6 rule add pref 50 lookup 7", "ip rules", "ip -6 rule", byTun, true},
		{"strict filter", "sysctl -qw net.ipv4.conf.all.rp_filter=1", "rp_filter", "is strict on lo", byDev, true},
		{"no forwarding", "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=1", "forwarding", "what comes in through lo goes nowhere", byTun, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := labtest.New(t).Host("home")
			h.Run("sh", "-c", tt.setup)
			p := plan()
			tt.change(&p)
			found := checked(t, h, p, tt.check)
			if len(found) != 1 || !strings.Contains(found[0].What, tt.what) || (found[0].State != doctor.OK) != tt.mends {
				t.Fatalf("found %+v", found)
			}
			if !tt.mends {
				return
			}
			fix := found[0].Fix
			if i := strings.Index(fix, ": ip"); i >= 0 {
				fix = fix[i+2:]
			}
			if out, err := h.Try("sh", "-c", fix); err != nil {
				t.Errorf("%s: %v\n%s", fix, err, out)
			}
			// A rule that accepts is not seen to: of such a chain it stays said.
			if again := checked(t, h, p, tt.check); tt.check != "firewall" && again[0].State != doctor.OK {
				t.Errorf("after %q: %+v", fix, again)
			}
		})
	}
}

func checked(t *testing.T, h *labtest.Host, p steer.Plan, name string) (found []doctor.Result) {
	for _, r := range doctor.Run(t.Context(), doctor.Options{}, steer.Checks(refOf(t, h), p)...) {
		if r.Name == name {
			found = append(found, r)
		}
		if r.Name == "nft" && r.State != doctor.OK {
			t.Errorf("nft: %+v", r)
		}
	}
	return found
}
