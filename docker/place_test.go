package docker_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
	"cgtun/docker"
	"cgtun/internal/labtest"
)

// Who is looked at names the file himself: one that would be waited for is not
// opened.
func TestOnlyRegularFilesAreRead(t *testing.T) {
	dir := t.TempDir()
	pipe, file := filepath.Join(dir, "pipe"), filepath.Join(dir, "file")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	held, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := os.WriteFile(file, []byte(`{"cgroup-parent": "/here"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("file", link); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{file: "/here", link: "/here", pipe: "", dir: "", "/dev/zero": "", "/dev/ptmx": "", filepath.Join(dir, "none"): ""} {
		got := make(chan string, 1)
		go func() { got <- docker.ParentOf(os.Getpid(), []string{"dockerd", "--config-file=" + name}) }()
		select {
		case parent := <-got:
			if parent != want {
				t.Errorf("%s: %q, want %q", name, parent, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s is waited for", name)
		}
	}
}

func TestDepthOfARoot(t *testing.T) {
	for _, tt := range []struct {
		own, there string
		want       int
	}{
		{"/a/b", "/a/b", 0}, {"/a/b", "/b", 1}, {"/a/b", "/", 2}, {"/a/b", "/../b", 2},
		{"/a/b", "/../../../a/b", 3}, {"/", "/../..", 2}, {"/", "/", 0},
	} {
		if got := docker.DepthOf(tt.own, tt.there); got != tt.want {
			t.Errorf("%s is %s: %d, want %d", tt.own, tt.there, got, tt.want)
		}
	}
}

// What is moved while it is looked at has the root that it has.
func TestRootOfAMovingDaemon(t *testing.T) {
	f := newFakes(t)
	root := f.lab.Cgroup("c")
	shallow, deep := f.lab.Cgroup("c/s"), f.lab.Cgroup("c/a/s")
	p := f.start(root, new27, inside(shallow)...)
	stop := labtest.Background(t, "mover", func(ctx context.Context) error {
		for at := false; ctx.Err() == nil; at = !at {
			if err := map[bool]*labtest.Cgroup{false: deep, true: shallow}[at].Add(p.Pid); err != nil {
				return err
			}
		}
		return nil
	})
	seen := map[string]int{}
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		cgroup, err := cgroupsel.CgroupOf(p.Pid)
		if err != nil {
			t.Fatal(err)
		}
		got, err := docker.RootOf(p.Pid, cgroup)
		if err != nil {
			t.Fatal(err)
		}
		seen[cgroup]++
		if got != root.Path {
			t.Errorf("in %s its root is %s", cgroup, got)
			break
		}
	}
	stop()
	if len(seen) != 2 {
		t.Errorf("it was seen in %v", seen)
	}
}
