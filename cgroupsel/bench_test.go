package cgroupsel_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// What selection costs those who are not selected, and those who are: a socket
// made and closed, and connected, by this process, whose cgroup is the lab's.
func BenchmarkSocket(b *testing.B) {
	labtest.Need(b, labtest.Root, labtest.CgroupV2)
	lab := labtest.New(b)
	free := lab.Cgroup("free")
	for _, bb := range []struct {
		name string
		o    *cgroupsel.Options
	}{
		{"without cgtun", nil},
		{"not selected", &cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{free.Path + "/x", free.Path + "/*/y"}, Mark: 1}}}},
		{"not selected, beside namespaces", &cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{free.Path + "/x"}, Netns: []string{"no-such-namespace"}, Mark: 1}}}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			if bb.o != nil {
				bb.o.Instance = "bench"
				s, err := cgroupsel.New(*bb.o)
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
			}
			for b.Loop() {
				benchSocket(b)
			}
		})
	}
}

func benchSocket(b *testing.B) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		b.Fatal(err)
	}
	unix.Close(fd)
}

// What a cgroup costs that is made and removed.
func BenchmarkMkdir(b *testing.B) {
	labtest.Need(b, labtest.Root, labtest.CgroupV2)
	lab := labtest.New(b)
	free := lab.Cgroup("free")
	for _, bb := range []struct {
		name    string
		cgroups []string
	}{
		{"without cgtun", nil},
		{"plain path elsewhere", []string{free.Path + "/x/y"}},
		{"glob that ends here", []string{free.Path + "/*/y"}},
		{"glob to the end of each path", []string{"/**/no-such-name-in-any-tree"}},
		{"selected by a glob", []string{free.Path + "/ben*"}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			if bb.cgroups != nil {
				s, err := cgroupsel.New(cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: bb.cgroups, Mark: 1}}, Instance: "bench"})
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
			}
			for b.Loop() {
				dir := filepath.Join(free.Dir, "bench")
				if err := os.Mkdir(dir, 0o755); err != nil {
					b.Fatal(err)
				}
				if err := os.Remove(dir); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
