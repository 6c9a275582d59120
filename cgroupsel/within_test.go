package cgroupsel_test

import (
	"slices"
	"testing"

	"cgtun/cgroupsel"
)

func TestWhatIsBelowAnotherRoutesCgroupsIsTold(t *testing.T) {
	cgroup := func(path string, selection int) cgroupsel.Cgroup {
		return cgroupsel.Cgroup{Path: path, Selection: selection, Present: true}
	}
	s := cgroupsel.Snapshot{Cgroups: []cgroupsel.Cgroup{
		cgroup("/a", 0), cgroup("/a/b/c", 1), cgroup("/ab", 1), cgroup("/b", 1), {Path: "/a/gone", Selection: 1}, cgroup("/b/x", 0),
	}}
	for i, want := range []string{"/a/b/c", "/b/x", ""} {
		var got []string
		for _, c := range s.Within(i) {
			got = append(got, c.Path)
		}
		if want == "" && len(got) > 0 || want != "" && !slices.Equal(got, []string{want}) {
			t.Errorf("within those of %d: %q, want %q", i, got, want)
		}
	}
}
