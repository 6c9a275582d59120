package cgroupsel_test

import (
	"fmt"
	"strings"
	"testing"

	"cgtun/cgroupsel"
)

func options(cgroups ...[]string) cgroupsel.Options {
	o := cgroupsel.Options{Instance: "t"}
	for i, c := range cgroups {
		o.Selections = append(o.Selections, cgroupsel.Selection{Cgroups: c, Mark: uint32(testMark + i), Mask: 0xff})
	}
	return o
}

// patterns are globs and units with paths that they select and paths that they
// do not. The globs mean in a [[rule]] what they mean here.
var patterns = []struct {
	pattern string
	yes, no []string
}{
	{"/docker/**", []string{"/docker/x", "/docker/x/y"}, []string{"/docker", "/dockerd/x", "/a/docker/x"}},
	{"/docker/*", []string{"/docker/x", "/docker/x/y"}, []string{"/docker", "/podman/x"}},
	{"/a/*/c", []string{"/a/b/c", "/a/bb/c/d"}, []string{"/a/c", "/a/b/b/c", "/a/b/cc"}},
	{"/a/**/c", []string{"/a/c", "/a/b/c", "/a/b/b/c", "/a/bc/c/d"}, []string{"/a/bc", "/ac", "/a/b/cc"}},
	{"/*.slice/x-*.scope", []string{"/s.slice/x-1.scope", "/.slice/x-.scope/in"}, []string{"/s.slice/x-1.service", "/s/t.slice/x-1.scope"}},
	{"/**/buildkit", []string{"/buildkit", "/docker/buildkit/id", "/a/b/buildkit"}, []string{"/docker/buildkits", "/xbuildkit"}},
	{"/a**z", []string{"/az", "/a/b/z", "/axz/y"}, []string{"/a/b", "/ba/z"}},
	{"/*a*b/c", []string{"/xaxxb/c", "/ab/c", "/aabb/c"}, []string{"/ba/c", "/a/b/c"}},
	{"/**/a/**/b", []string{"/a/b", "/x/a/y/b", "/a/a/b/c"}, []string{"/b/a", "/a/xb"}},
	{`/sys-x\x2dy.slice*`, []string{`/sys-x\x2dy.slice`}, []string{"/sys-x-y.slice"}},
	{"/ü*", []string{"/übung"}, []string{"/ubung"}},
	{"unit:ci.service", []string{"/system.slice/ci.service", "/ci.service", "/a.slice/a-b.slice/ci.service/in"},
		[]string{"/system.slice/ci.services", "/system.slice/xci.service", "/user.slice/user-0.slice/user@0.service/app.slice/ci.service", "/system.slice/ci.service.d"}},
	{"unit:a-b.slice", []string{"/a.slice/a-b.slice", "/a.slice/a-b.slice/x.service"}, []string{"/a.slice", "/a.slice/a-c.slice", "/x/a-b.slice"}},
	{"unit:memory.service", []string{"/system.slice/_memory.service"}, []string{"/system.slice/memory.service"}},
	{"unit:_x.scope", []string{"/s.slice/__x.scope"}, []string{"/s.slice/_x.scope"}},
	{`unit:dev-a\x2db.service`, []string{`/system.slice/dev-a\x2db.service`}, []string{"/system.slice/dev-a-b.service"}},
}

func TestGlobsAndUnitsSelectByPath(t *testing.T) {
	for _, tt := range patterns {
		t.Run(strings.ReplaceAll(tt.pattern, "/", "|"), func(t *testing.T) {
			o := options([]string{tt.pattern})
			for _, p := range tt.yes {
				if got, _, err := cgroupsel.Picked(o, p); got != 0 || err != nil {
					t.Errorf("%s is not selected (%v)", p, err)
				}
			}
			for _, p := range tt.no {
				if got, _, err := cgroupsel.Picked(o, p); got != -1 || err != nil {
					t.Errorf("%s is selected (%v)", p, err)
				}
			}
		})
	}
}

// overlaps are selections that meet, and who has a cgroup then.
var overlaps = []struct {
	name      string
	options   cgroupsel.Options
	path      string
	selection int
	top       string
}{
	{"a deeper plain path wins", options([]string{"/a/**"}, []string{"/a/b"}), "/a/b/c", 1, "/a/b"},
	{"beside it the glob", options([]string{"/a/**"}, []string{"/a/b"}), "/a/c/d", 0, "/a/c"},
	{"also against a deeper glob", options([]string{"/a/*/c"}, []string{"/a/b"}), "/a/b/c", 1, "/a/b"},
	{"but not against a deeper plain path", options([]string{"/a/b/c"}, []string{"/a"}, []string{"/**"}), "/a/b/c/d", 0, "/a/b/c"},
	{"of two globs the first route's", options([]string{"/a/*"}, []string{"/*/b"}), "/a/b", 0, "/a/b"},
	{"in whatever order they match", options([]string{"/a/*/c"}, []string{"/a/*"}), "/a/b/c/d", 0, "/a/b/c"},
	{"and above it the other's", options([]string{"/a/*/c"}, []string{"/a/*"}), "/a/b/d", 1, "/a/b"},
	{"a unit is a glob", options([]string{"unit:x.service"}, []string{"/s.slice/*"}), "/s.slice/x.service", 0, "/s.slice/x.service"},
}

func TestWhoHasACgroupThatSelectionsShare(t *testing.T) {
	for _, tt := range overlaps {
		t.Run(tt.name, func(t *testing.T) {
			selection, top, err := cgroupsel.Picked(tt.options, tt.path)
			if selection != tt.selection || top != tt.top || err != nil {
				t.Errorf("%s is of selection %d from %s (%v), want %d from %s", tt.path, selection, top, err, tt.selection, tt.top)
			}
		})
	}
}

func TestTooManyGlobsAreRefused(t *testing.T) {
	var globs []string
	for i := range 300 {
		globs = append(globs, fmt.Sprintf("/a*%d*b*%d", i, i*7))
	}
	if _, err := cgroupsel.New(options(globs)); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("300 globs with three stars: %v", err)
	}
}
