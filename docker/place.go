package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
)

// rootOf is the root of a process's cgroup namespace, as we see it. cgroup is the
// process's, as we see it. How deep the root is says what our own cgroup, where we
// stay, is called there: the process can be moved meanwhile.
func rootOf(pid int, cgroup string) (string, error) {
	out := &otherError{
		fmt.Sprintf("dockerd (process %d) is in cgroup %q, which is outside of its cgroup namespace or of cgtun's: nothing is believed of it", pid, cgroup),
		"start dockerd in a cgroup of its own cgroup namespace",
	}
	if strings.HasPrefix(cgroup, "/..") {
		return "", out
	}
	file := fmt.Sprintf("/proc/%d/ns/cgroup", pid)
	theirs, err := os.Readlink(file)
	if err != nil {
		return "", errNone
	}
	if ours, err := os.Readlink(ownNamespace); err == nil && ours == theirs {
		return "/", nil
	}
	seen, own, there, err := seenFrom(file, pid)
	if err != nil {
		return "", err
	}
	parts := split(cgroup)
	depth := depthOf(own, there)
	if strings.HasPrefix(seen, "/..") || strings.HasPrefix(own, "/..") || depth < 0 || depth > len(parts) {
		return "", out
	}
	return path.Join("/", path.Join(parts[:depth]...)), nil
}

// depthOf is how many cgroups deep the root of a cgroup namespace is, where ours is
// called own here and there in it.
func depthOf(own, there string) int {
	parts := split(there)
	up := 0
	for up < len(parts) && parts[up] == ".." {
		up++
	}
	return up + len(split(own)) - len(parts[up:])
}

// split are the names in a path.
func split(cgroup string) []string {
	return strings.FieldsFunc(cgroup, func(r rune) bool { return r == '/' })
}

// ownNamespace is not that of /proc/self, which is the first thread's: one that
// could not come back from seenFrom.
const ownNamespace = "/proc/thread-self/ns/cgroup"

// seenFrom is what the cgroup of a process, and our own, are called in the cgroup
// namespace that a file leads to; own is what ours is called here.
func seenFrom(file string, pid int) (cgroup, own, ours string, err error) {
	there, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", "", "", errNone
	}
	defer unix.Close(there)
	runtime.LockOSThread()
	back, err := unix.Open(ownNamespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return "", "", "", fmt.Errorf("open own cgroup namespace: %w", err)
	}
	defer unix.Close(back)
	own, err = cgroupsel.CgroupOf(unix.Gettid())
	if err == nil {
		err = unix.Setns(there, unix.CLONE_NEWCGROUP)
	}
	if err == nil {
		var errOurs error
		cgroup, err = cgroupsel.CgroupOf(pid)
		ours, errOurs = cgroupsel.CgroupOf(unix.Gettid())
		err = errors.Join(err, errOurs)
		if errBack := unix.Setns(back, unix.CLONE_NEWCGROUP); errBack != nil {
			// Still locked: the thread ends with its goroutine.
			return "", "", "", errors.Join(err, fmt.Errorf("come back from cgroup namespace of process %d: %w", pid, errBack))
		}
	}
	runtime.UnlockOSThread()
	if err != nil {
		return "", "", "", fmt.Errorf("look into cgroup namespace of process %d: %w", pid, err)
	}
	return cgroup, own, ours, nil
}

// usualConfig is where dockerd looks without --config-file.
const usualConfig = "/etc/docker/daemon.json"

// parentOf is what the daemon was told to put its containers under, by its
// command line or its file.
func parentOf(pid int, args []string) string {
	if p := flagOf(args, "cgroup-parent"); p != "" {
		return p
	}
	name := flagOf(args, "config-file")
	if name == "" {
		name = usualConfig
	}
	f, err := openRegular(pid, name)
	if err != nil {
		return ""
	}
	defer f.Close()
	text, err := readAtMost(f)
	var file struct {
		Parent string `json:"cgroup-parent"`
	}
	if err != nil || json.Unmarshal(text, &file) != nil {
		return "" // dockerd does not start with it either
	}
	return file.Parent
}

// flagOf is the value of a flag, the last one.
func flagOf(args []string, name string) (value string) {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--"+name+"="); ok {
			value = v
		} else if a == "--"+name && i+1 < len(args) {
			value = args[i+1]
		}
	}
	return value
}

// openIn opens a file as a process would, and never one outside of its root.
func openIn(pid int, name string, flags int) (*os.File, error) {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, strings.TrimLeft(name, "/"), &unix.OpenHow{
		Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openRegular opens a file for reading that is one: to open a pipe or a device of
// somebody else's choice could wait for ever, or do something.
func openRegular(pid int, name string) (*os.File, error) {
	at, err := openIn(pid, name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	is, err := at.Stat()
	if err != nil {
		return nil, err
	}
	if !is.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", name)
	}
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", at.Fd()), os.O_RDONLY|unix.O_NOCTTY, 0)
}

func readAtMost(r io.Reader) ([]byte, error) { return io.ReadAll(io.LimitReader(r, maxRead)) }
