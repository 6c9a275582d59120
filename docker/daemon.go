package docker

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
)

// program is what a daemon executes, and is called by the kernel.
const program = "dockerd"

// Daemon is what is known of one daemon.
type Daemon struct {
	PID    int
	Cgroup string // its own, as we see it
	Root   string // of its cgroup namespace, as we see it
	// Parent is its --cgroup-parent, "" for the default.
	Parent string
	// Version is what it says of itself, API the version of its interface, as
	// {1, 41}; empty and zero: it has not answered.
	Version string
	API     [2]int
	// Silent: it is not going to answer.
	Silent bool
	Ended  bool
}

// errNone says that a process is no daemon at all.
var errNone = errors.New("no docker daemon")

// otherError says why a daemon is not ours to select.
type otherError struct {
	what, fix string
}

func (e *otherError) Error() string { return e.what }

// examine looks at a process. Each look can be of another process than the one
// before, if that has ended: so the caller holds a pidfd, and asks it last.
func examine(pid int) (Daemon, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	exe, err := os.Readlink(dir + "/exe")
	if err != nil || path.Base(strings.TrimSuffix(exe, " (deleted)")) != program {
		return Daemon{}, errNone
	}
	line, err := readSome(dir + "/cmdline")
	if err != nil {
		return Daemon{}, errNone
	}
	args := splitArgs(line)
	if asksOnly(args) {
		return Daemon{}, errNone
	}
	if uid := userOf(dir); uid != 0 {
		return Daemon{}, &otherError{
			fmt.Sprintf("dockerd (process %d) is of user %d and no root process: its builds are not captured", pid, uid),
			"name the cgroup of its user in [select] cgroups, such as \"/user.slice/user-1000.slice/**\"",
		}
	}
	if err := atHome(pid); err != nil {
		return Daemon{}, err
	}
	d := Daemon{PID: pid}
	if d.Cgroup, err = cgroupsel.CgroupOf(pid); err != nil {
		return Daemon{}, errNone
	}
	if d.Root, err = rootOf(pid, d.Cgroup); err != nil {
		return Daemon{}, err
	}
	d.Parent = parentOf(pid, args)
	return d, nil
}

// userOf is the one user that a process is of, -1 where it is of several.
func userOf(dir string) int {
	text, err := readSome(dir + "/status")
	if err != nil {
		return -1
	}
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) != 5 || f[0] != "Uid:" {
			continue
		}
		uid, err := strconv.Atoi(f[1])
		if err != nil || f[2] != f[1] || f[3] != f[1] {
			return -1
		}
		return uid
	}
	return -1
}

// atHome says why a process is not in home's network namespace.
func atHome(pid int) error {
	home, err := netns.Home()
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st); err != nil {
		return errNone
	}
	if st.Ino != home.Inode() {
		return &otherError{
			fmt.Sprintf("dockerd (process %d) is in another network namespace: its builds are not captured by select.docker", pid),
			"start a cgtun in that namespace, or select the container that it runs in by [select] cgroups",
		}
	}
	return nil
}

// asksOnly says whether a command line is none of a daemon.
func asksOnly(args []string) bool {
	for _, a := range args[min(1, len(args)):] {
		switch a {
		case "-v", "--version", "-h", "--help", "help", "--validate":
			return true
		}
	}
	return false
}

// splitArgs reads /proc/PID/cmdline.
func splitArgs(line []byte) []string {
	return strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
}

// maxRead bounds what is read of a file that others wrote.
const maxRead = 1 << 20

// readSome reads the begin of a file.
func readSome(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAtMost(f)
}
