package labtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Program builds cgtun, with more flags of go build, and returns its path, which is
// good as long as the calling process lives. Nothing is left of it then.
func Program(flags ...string) (string, error) {
	path := filepath.Join(os.TempDir(), fmt.Sprintf("cgtun-test-%d", os.Getpid()))
	args := append([]string{"build", "-o", path}, flags...)
	out, err := exec.Command("go", append(args, "cgtun/cmd/cgtun")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build cgtun: %w\n%s", err, out)
	}
	// A descriptor stands for its name: so nothing is left, however this ends.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err := errors.Join(err, os.Remove(path)); err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), nil
}

// Config is a configuration of cgtun that selects c, with numbers and a socket of its
// own, and more after it.
func Config(c *Cgroup, number int, socket, more string) string {
	return fmt.Sprintf(`
[select]
cgroups = [%q]

[route]
mark = %d
table = %[2]d

[tun]
name = "tun0"

[control]
socket = %[3]q

[log]
level = "debug"
%[4]s`, c.Path, number, socket, more)
}
