package docker_test

import (
	"net/netip"
	"testing"
)

// Whose gateway is that of an internal network is said by the daemon, by the name
// of the bridge.
func TestInternalNetworksAreTold(t *testing.T) {
	f := newFakes(t)
	p := f.start(f.lab.Cgroup("service"), `[{"Id":"0123456789abcdef","Internal":false},
		{"Id":"ffff","Internal":true,"Options":{"com.docker.network.bridge.name":"named"}},{"Id":"bbbbbbbbbbbbbbbb","Internal":true}]`)
	finder := run(t)
	if d := of(finder.Scan(t.Context()), p); d == nil {
		t.Fatal("it is not found")
	}
	for device, want := range map[string]bool{"br-0123456789ab": false, "named": true, "br-bbbbbbbbbbbb": true, "docker0": false, "br-cccccccccccc": false, "": false} {
		finder.SetDevice(func(netip.Addr) string { return device })
		if got, err := finder.Internal(netip.MustParseAddr("198.51.100.1")); got != want || err != nil {
			t.Errorf("%s: %v, %v, want %v", device, got, err, want)
		}
	}
}
