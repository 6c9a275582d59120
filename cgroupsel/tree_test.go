package cgroupsel_test

import (
	"fmt"
	"strings"
	"testing"

	"cgtun/cgroupsel"
)

func TestMountsAreRead(t *testing.T) {
	const text = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup rw,nsdelegate
42 31 0:38 /../.. /mnt/a\040b rw - cgroup2 none rw,nsdelegate,memory_recursiveprot
43 31 0:39 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
torn
`
	mounts, err := cgroupsel.ParseMounts(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := "[/ /sys/fs/cgroup/unified rw,nsdelegate /../.. /mnt/a b rw,nsdelegate,memory_recursiveprot]"
	if got := fmt.Sprint(mounts); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWithinComparesComponents(t *testing.T) {
	for _, tt := range []struct {
		name, top string
		want      bool
	}{
		{"/a", "/a", true},
		{"/a/b", "/a", true},
		{"/ab", "/a", false},
		{"/a", "/a/b", false},
		{"/a", "/", true},
		{"/", "/", true},
		{"/../a", "/a", false},
	} {
		if got := cgroupsel.Within(tt.name, tt.top); got != tt.want {
			t.Errorf("Within(%s, %s) = %v", tt.name, tt.top, got)
		}
	}
}
