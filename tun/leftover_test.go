package tun_test

import (
	"slices"
	"strings"
	"testing"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/tun"
)

// One namespace with what a killed start left, what a running one has, and
// devices of others whose names are like ours.
func TestLeftoversOfKilledStartsAreRemoved(t *testing.T) {
	labtest.Need(t, labtest.Root)
	host := labtest.New(t).Host("host")
	for _, name := range []string{"cgt77", "cgt78x", "tun5"} {
		host.Run("ip", "tuntap", "add", "dev", name, "mode", "tun")
	}
	host.Run("ip", "link", "add", "cgt79", "type", "veth", "peer", "name", "other")
	ns, err := netns.Named(host.Path)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := tun.Open(ns, tun.Options{Name: "cgt80", Table: 80})
	if err != nil {
		t.Fatal(err)
	}
	removed, err := tun.RemoveLeftovers(ns)
	if err != nil || !slices.Equal(removed, []string{"cgt77"}) {
		t.Errorf("removed %v, %v; want cgt77 alone", removed, err)
	}
	links := host.Run("ip", "-br", "link")
	if strings.Contains(links, "cgt77") {
		t.Error("cgt77 is still there")
	}
	for _, stays := range []string{"cgt78x", "tun5", "cgt79", "cgt80"} {
		if !strings.Contains(links, stays) {
			t.Errorf("%s has gone", stays)
		}
	}
	if removed, err := tun.RemoveLeftovers(ns); err != nil || len(removed) != 0 {
		t.Errorf("the second time: %v, %v", removed, err)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"cgt78x", "tun5"} {
		host.Run("ip", "link", "del", name)
	}
}
