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
		{"same mark", "ip rule add pref 20000 fwmark 0x5/0xf lookup 7", "ip rules", `"20000: from all fwmark 0x5/0xf lookup 7": a start is refused`, byTun, true},
		{"same priority", "ip -6 rule add pref 10101 lookup 7", "ip rules", "priority 10101 is taken by", byTun, true},
		{"table in use", "ip route add throw 192.0.2.0/24 table 101", "ip rules", "table 101 is taken by route 192.0.2.0/24", byTun, true},
		{"everything with a source before ours", "ip rule add pref 50 from 192.0.2.0/24 lookup 7", "ip rules", "nothing of others", byTun, false},
		{"input", "nft add table inet f; nft 'add chain inet f IN { type filter hook input priority 0; policy drop; }'", "firewall", "the answers that come out of tun0 are lost", byTun, true},
		{"input that knows answers", "nft add table inet f; nft 'add chain inet f IN { type filter hook input priority 0; policy drop; }'; nft add rule inet f IN ct state established,related accept", "firewall", "nothing of others", byTun, false},
		{"output for another device", "nft add table ip f; nft 'add chain ip f OUT { type filter hook output priority 0; policy drop; }'; nft add rule ip f OUT oifname tun9 accept", "firewall", "chain OUT of table ip f drops by default", byTun, true},
		{"output that ends in accept", "nft add table ip f; nft 'add chain ip f OUT { type filter hook output priority 0; policy drop; }'; nft add rule ip f OUT counter accept", "firewall", "nothing of others", byTun, false},
		{"marks", "nft add table ip f; nft 'add chain ip f M { type route hook output priority mangle; }'; nft add rule ip f M meta mark set meta mark or 0x4000", "firewall", "chain M of table ip f writes marks", byTun, false},
		{"marks beside ours", "nft add table ip f; nft 'add chain ip f M { type route hook output priority mangle; }'; nft add rule ip f M meta mark set meta mark or 0x4000", "firewall", "nothing of others", func(p *steer.Plan) { p.Mask = 0xff }, false},
		{"marks of packets that have another", "nft add table ip f; nft 'add chain ip f M { type filter hook postrouting priority mangle; }'; nft add rule ip f M meta mark 0xca6c ct mark set meta mark", "firewall", "nothing of others", byTun, false},
		{"docker's user drops", "nft add table ip f; nft add chain ip f DOCKER-USER; nft add rule ip f DOCKER-USER ip daddr 10.0.0.0/8 drop", "firewall", "chain DOCKER-USER of table ip f drops packets", byTun, false},
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
			if len(found) != 1 || !strings.Contains(found[0].What, tt.what) || (found[0].State == doctor.OK) != (tt.what == "nothing of others") {
				t.Fatalf("found %+v", found)
			}
			if !tt.mends {
				return
			}
			fix := found[0].Fix
			if i := strings.LastIndex(fix, ": ip"); i >= 0 {
				fix = fix[i+2:]
			}
			if out, err := h.Try("sh", "-c", fix); err != nil {
				t.Errorf("%s: %v\n%s", fix, err, out)
			}
			if again := checked(t, h, p, tt.check); again[0].State != doctor.OK {
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
