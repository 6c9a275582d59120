package attach

import (
	"testing"

	"cgtun/internal/netns"
)

func TestContainersAndStepsAreNamed(t *testing.T) {
	const container, step = "433d03b83c50aa8d0000000000000000000000000000000000000000000000ff", "ywal5fhdwhtlmolghepdjz9un"
	for _, tt := range []struct {
		cgroup, digits string
		step           bool
	}{
		{"/docker/" + container, "433d03b83c50", false},
		{"/system.slice/docker-" + container + ".scope", "433d03b83c50", false},
		{"/docker/buildkit/" + step, "ywal5fhdwhtl", true},
		{"/system.slice/system.slice:docker:" + step, "ywal5fhdwhtl", true},
		{"/ci/" + step, "", false},
		{"/docker/buildkit/" + step[1:], "", false},
		{"", "", false},
	} {
		if digits, step := containerOf(tt.cgroup); digits != tt.digits || step != tt.step {
			t.Errorf("%s: %q, step %v", tt.cgroup, digits, step)
		}
	}
}

// podman gives the namespaces of its containers names, too.
func TestNamedNamespaceHasItsContainer(t *testing.T) {
	s := &site{id: "netns-1f2e", container: "433d03b83c50", state: StateOffline}
	got := s.states(map[uint64]string{netns.Ref{}.Inode(): "netns-1f2e"})
	if len(got) != 1 || got[0].Netns != "netns-1f2e" || got[0].Container != "433d03b83c50" {
		t.Errorf("%+v", got)
	}
}
