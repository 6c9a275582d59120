package attach

import "testing"

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
