package docker_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"cgtun/docker"
	"cgtun/internal/labtest"
)

// internal asks a Finder for the network of a bridge.
func internal(finder *docker.Finder, bridge string) (bool, error) {
	finder.SetDevice(func(netip.Addr) string { return bridge })
	return finder.Internal(netip.MustParseAddr("198.51.100.1"))
}

// known are two networks, the second an internal one.
const known = `[{"Id":"0123456789abcdef","Internal":false},{"Id":"bbbbbbbbbbbbbbbb","Internal":true},
	{"Id":"ffff","Internal":true,"Options":{"com.docker.network.bridge.name":"named"}}]`

// Whose gateway is that of an internal network is said by the daemon, by the name
// of the bridge.
func TestInternalNetworksAreTold(t *testing.T) {
	f := newFakes(t)
	f.networks = known
	f.start(f.lab.Cgroup("service"), new27)
	finder := docker.NewFinder(nil)
	finder.Scan(t.Context())
	for device, want := range map[string]bool{"br-0123456789ab": false, "named": true, "br-bbbbbbbbbbbb": true, "docker0": false, "br-cccccccccccc": false, "": false} {
		if got, err := internal(finder, device); got != want || err != nil {
			t.Errorf("%s: %v, %v, want %v", device, got, err, want)
		}
	}
}

// While no daemon is there (restarted under live-restore), what was offline stays
// so, and what nobody knows is not taken for online.
func TestInternalNetworksStayOfflineWithoutADaemon(t *testing.T) {
	f := newFakes(t)
	f.networks = known
	c := f.lab.Cgroup("service")
	unknown := func(finder *docker.Finder, when string) {
		t.Helper()
		if got, err := internal(finder, "br-cccccccccccc"); err == nil {
			t.Errorf("%s, an unknown network of docker's is said to be internal: %v", when, got)
		}
		for _, other := range []string{"podman1", "br-lan", "br-cccccccccccc.7", "docker0"} {
			if got, err := internal(finder, other); got || err != nil {
				t.Errorf("%s, %s is %v, %v", when, other, got, err)
			}
		}
	}
	unknown(docker.NewFinder(nil), "without any daemon")
	p := f.start(c, new27)
	finder := run(t)
	ended := func(p *labtest.Proc) {
		t.Helper()
		kill(p)
		labtest.Eventually(t, 20*time.Second, func() bool { d := of(finder.Daemons(), p); return d == nil || d.Ended }, "its end is seen")
	}
	labtest.Eventually(t, 20*time.Second, func() bool { d := of(finder.Daemons(), p); return d != nil && d.Version != "" }, "it answers")
	if got, err := internal(finder, "br-bbbbbbbbbbbb"); !got || err != nil {
		t.Fatalf("with its daemon: %v, %v", got, err)
	}
	ended(p)
	for device, want := range map[string]bool{"br-0123456789ab": false, "named": true, "br-bbbbbbbbbbbb": true} {
		if got, err := internal(finder, device); got != want || err != nil {
			t.Errorf("ended, %s: %v, %v, want %v", device, got, err, want)
		}
	}
	unknown(finder, "ended")
	// The next one listens, and does not answer yet.
	next := f.start(c, mute)
	labtest.Eventually(t, 20*time.Second, func() bool { return of(finder.Daemons(), next) != nil }, "the next one is seen")
	if got, err := internal(finder, "br-bbbbbbbbbbbb"); !got || err != nil {
		t.Errorf("beginning: %v, %v", got, err)
	}
	if got, err := internal(finder, "br-cccccccccccc"); err == nil {
		t.Errorf("an unknown network is said to be internal: %v", got)
	}
}

// A daemon in a container speaks for networks of which its keeper knows nothing,
// and for no others, also while that one is away.
func TestDaemonsInContainersDoNotSpeakForOthers(t *testing.T) {
	f := newFakes(t)
	f.networks = known
	real := f.start(f.lab.Cgroup("service"), new27)
	f.networks = `[{"Id":"bbbbbbbbbbbbbbbb","Internal":false},{"Id":"0123456789abcdef","Internal":true},{"Id":"dddddddddddddddd","Internal":true}]`
	fake := f.start(f.lab.Cgroup("container"), new27, inside(f.lab.Cgroup("container/fake"))...)
	finder := run(t)
	labtest.Eventually(t, 20*time.Second, func() bool {
		all := finder.Daemons()
		a, b := of(all, real), of(all, fake)
		return a != nil && b != nil && a.Version != "" && b.Version != ""
	}, "both are found")
	check := func(when string) {
		t.Helper()
		for device, want := range map[string]bool{"br-0123456789ab": false, "br-bbbbbbbbbbbb": true} {
			if got, err := internal(finder, device); got != want || err != nil {
				t.Errorf("%s, %s: %v, %v, want %v", when, device, got, err, want)
			}
		}
	}
	check("both run")
	if got, err := internal(finder, "br-dddddddddddd"); !got || err != nil {
		t.Errorf("its own network: %v, %v", got, err)
	}
	kill(real)
	labtest.Eventually(t, 20*time.Second, func() bool { d := of(finder.Daemons(), real); return d != nil && d.Ended }, "its end is seen")
	check("its keeper is away")
	if got, err := internal(finder, "br-cccccccccccc"); err == nil {
		t.Errorf("an unknown network is said to be internal by what is in a container: %v", got)
	}
}

// Those that do not answer are waited for together, and those in containers not
// at all where their keeper knows.
func TestSilentDaemonsAreAskedTogether(t *testing.T) {
	const silent, all = 6, 6 * time.Second // one after the other
	f := newFakes(t)
	c := f.lab.Cgroup("service")
	var many []*labtest.Proc
	for i := range silent {
		many = append(many, f.start(f.lab.Cgroup("container"), mute, inside(f.lab.Cgroup(fmt.Sprintf("container/%d", i)))...))
	}
	f.networks = known
	real := f.start(c, new27)
	finder := run(t)
	labtest.Eventually(t, 20*time.Second, func() bool { return len(finder.Daemons()) > silent }, "all are found")
	begin := time.Now()
	got, err := internal(finder, "br-bbbbbbbbbbbb")
	if took := time.Since(begin); !got || err != nil || took >= all {
		t.Errorf("%v, %v after %v", got, err, took)
	}
	kill(real)
	for _, p := range many {
		kill(p)
	}
	f.networks = ""
	for range silent {
		f.start(c, mute)
	}
	labtest.Eventually(t, 20*time.Second, func() bool {
		n := 0
		for _, d := range finder.Daemons() {
			if !d.Ended {
				n++
			}
		}
		return n == silent
	}, "others are found")
	begin = time.Now()
	if got, err := internal(finder, "br-cccccccccccc"); err == nil || time.Since(begin) >= all {
		t.Errorf("%v, %v after %v", got, err, time.Since(begin))
	}
}
