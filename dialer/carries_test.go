package dialer_test

import (
	"fmt"
	"net/netip"
	"testing"

	"cgtun/dialer"
)

// Whether there is a way is known without sending anything.
func TestCarries(t *testing.T) {
	u := newUplinks(t)
	a4, a6 := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:f::1")
	carries := func(c dialer.Config) (all string) {
		d := u.direct(t, c)
		err := u.client.Do(func() error {
			all = fmt.Sprint(dialer.Carries(d, a4), dialer.Carries(d, a6), dialer.Carries(d, netip.MustParseAddr("fd01::2")))
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		return all
	}
	for _, tt := range []struct {
		ip   string
		c    dialer.Config
		want string
	}{
		{"", dialer.Config{}, "true true true"},
		{"", dialer.Config{Source: netip.MustParseAddr("10.1.0.1")}, "true false false"},
		{"-6 route del default", dialer.Config{}, "true false true"},
		{"", dialer.Config{Interface: "IF1"}, "true false true"},
		{"route del default", dialer.Config{}, "false false true"},
	} {
		if tt.ip != "" {
			u.ip(tt.ip)
		}
		if got := carries(tt.c); got != tt.want {
			t.Errorf("after %q, %+v: %s, want %s", tt.ip, tt.c, got, tt.want)
		}
	}
}
