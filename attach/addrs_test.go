package attach

import (
	"fmt"
	"net/netip"
	"testing"
)

// What is left alone is cut out of the networks of the machine.
func TestNetworksWithoutWhatIsLeftAlone(t *testing.T) {
	prefix := netip.MustParsePrefix
	s := surroundings{connected: []netip.Prefix{
		prefix("10.0.0.0/24"), prefix("10.1.0.0/24"), prefix("127.0.0.0/8"), prefix("172.16.0.0/30"), prefix("fd00::/64"), prefix("fe80::/64"),
	}}
	alone := []netip.Prefix{prefix("10.1.0.0/16"), prefix("172.16.0.1/32"), prefix("2001:db8::/32")}
	want := "[10.0.0.0/24 172.16.0.0/32 172.16.0.2/31 fd00::/64]"
	if got := fmt.Sprint(s.onLink(alone)); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
