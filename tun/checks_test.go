package tun_test

import (
	"net/netip"
	"strings"
	"testing"

	"cgtun/doctor"
	"cgtun/internal/netns"
	"cgtun/tun"
)

func check(t *testing.T, ref netns.Ref, o tun.Options) map[string]doctor.Result {
	t.Helper()
	byName := map[string]doctor.Result{}
	for _, r := range doctor.Run(t.Context(), doctor.Options{}, tun.Checks(ref, o)...) {
		byName[r.Name] = r
	}
	return byName
}

// One namespace; what is in the way there is named with its holder.
func TestChecksNameWhoIsInTheWay(t *testing.T) {
	h, ref := host(t)
	o := tun.Options{Name: "tun0", Table: 4711}
	got := check(t, ref, o)
	for _, name := range []string{"tun", "device tun0"} {
		if r := got[name]; r.State != doctor.OK || r.Fix != "" {
			t.Errorf("%s where nothing is wrong: %+v", name, r)
		}
	}
	before := h.Run("ip", "-o", "link")

	own := open(t, ref, o)
	if r := check(t, ref, o)["device tun0"]; r.State != doctor.OK || !strings.Contains(r.What, "own") {
		t.Errorf("while it runs: %+v", r)
	}
	own.Close()

	h.Run("ip", "link", "add", "tun0", "type", "veth", "peer", "name", "other")
	if r := check(t, ref, o)["device tun0"]; r.State != doctor.Error || !strings.Contains(r.What, "device tun0 is taken by another veth device") || r.Fix == "" {
		t.Errorf("a foreign device: %+v", r)
	}
	h.Run("ip", "link", "del", "tun0")
	o.Addresses = []netip.Prefix{netip.MustParsePrefix("10.9.0.77/24")}
	if r := check(t, ref, o)["device tun0"]; r.State != doctor.Error || !strings.Contains(r.What, "eth0") {
		t.Errorf("a foreign address: %+v", r)
	}
	if after := h.Run("ip", "-o", "link"); after != before {
		t.Errorf("devices before:\n%s\nafter:\n%s", before, after)
	}
}
