package docker_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/docker"
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
