package cgroupsel

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	systemBPF = "/sys/fs/bpf"    // where distributions mount a bpffs
	ownBPF    = "/run/cgtun/bpf" // where we do, if they did not
)

// place is a directory of a bpffs. A bpffs lives as long as a mount of it, and
// a mount as long as its mount namespace: that of `ip netns exec` ends with
// cgtun. So pins go to where a longer life is.
type place struct {
	pid     int    // a process in whose mount namespace dir is; 0: ours
	dir     string // of the bpffs
	lasting bool   // it outlives us, as far as can be seen
}

// bestPlace says where to pin. It mounts nothing.
func bestPlace() (place, error) {
	own, err := bpfMounts("self")
	if err != nil {
		return place{}, err
	}
	outer, same := outerProcess()
	if same || outer == 0 {
		return place{dir: pick(own), lasting: same}, nil
	}
	theirs, err := bpfMounts(fmt.Sprint(outer))
	if err != nil {
		return place{}, err
	}
	// A service of systemd has a mount namespace of its own, in which the
	// machine's bpffs is mounted, too.
	if dev := own[systemBPF]; dev != "" && dev == theirs[systemBPF] {
		return place{dir: systemBPF, lasting: true}, nil
	}
	p := place{pid: outer, dir: pick(theirs), lasting: true}
	if err := p.in(func() error { return nil }); err != nil {
		return place{dir: pick(own)}, nil
	}
	return p, nil
}

// pick chooses among the mounts of bpffs.
func pick(mounts map[string]string) string {
	if mounts[systemBPF] != "" {
		return systemBPF
	}
	return ownBPF
}

// outerProcess finds a process whose mount namespace outlives ours: the first
// of the machine, or, where that is not to be seen, the farthest ancestor. It
// says whether ours is the same; 0 is none.
func outerProcess() (pid int, same bool) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return 0, false
	}
	for p := os.Getpid(); p > 0; p = parentOf(p) {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", p))
		if err == nil {
			pid, same = p, ns == own
		}
	}
	// With nobody to be seen but ourselves nothing says that it lasts.
	return pid, same && pid != os.Getpid()
}

// parentOf reads proc_pid_stat(5); 0 is none.
func parentOf(pid int) (parent int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	var state string
	end := strings.LastIndexByte(string(text), ')')
	if _, err := fmt.Sscan(string(text[end+1:]), &state, &parent); err != nil {
		return 0
	}
	return parent
}

// bpfMounts lists the directories with a bpffs, and its device.
func bpfMounts(pid string) (map[string]string, error) {
	f, err := os.Open("/proc/" + pid + "/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("look for bpffs: %w", err)
	}
	defer f.Close()
	mounts := make(map[string]string)
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		mount, super, _ := strings.Cut(sc.Text(), " - ")
		if fields := strings.Fields(mount); len(fields) > 4 && strings.HasPrefix(super, "bpf ") {
			mounts[unescape(fields[4])] = fields[2]
		}
	}
	return mounts, sc.Err()
}

// in calls f in the mount namespace of the place. What f opens stays open; a
// goroutine that it starts is in ours again.
func (p place) in(f func() error) error {
	if p.pid == 0 {
		return f()
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", p.pid))
	if err != nil {
		return fmt.Errorf("open mount namespace of process %d: %w", p.pid, err)
	}
	defer ns.Close()
	return onLastThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter mount namespace of process %d: %w", p.pid, err)
		}
		return f()
	})
}

// onLastThread calls f on a thread that dies after it: one that shares neither
// directory nor mounts with the others cannot be given back. It is never the
// first thread, which cannot die, and which /proc/self speaks of.
func onLastThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("function ended its goroutine")
		defer func() { done <- err }()
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err = onLastThread(f)
			runtime.UnlockOSThread()
			return
		}
		err = f()
	}()
	return <-done
}

// prepare mounts a bpffs if there is none. It is for in.
func (p place) prepare() error {
	if isBPF(p.dir) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(p.dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(p.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Mount("bpf", p.dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs on %s: %w", p.dir, err)
	}
	return nil
}

func isBPF(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// eachPlace calls f for every bpffs in which pins can be, within its mount
// namespace.
func eachPlace(f func(dir string) error) error {
	outer, same := outerProcess()
	places := []place{{dir: systemBPF}, {dir: ownBPF}}
	if outer != 0 && !same {
		places = append(places, place{pid: outer, dir: systemBPF}, place{pid: outer, dir: ownBPF})
	}
	for _, p := range places {
		err := p.in(func() error {
			if !isBPF(p.dir) {
				return nil
			}
			return f(p.dir)
		})
		// A mount namespace that we may not enter has no pins of ours.
		if err != nil && !(p.pid != 0 && errors.Is(err, fs.ErrPermission)) {
			return err
		}
	}
	return nil
}

// leavePlaces unmounts our own bpffs where nothing is pinned in it any more.
func leavePlaces() error {
	return eachPlace(func(dir string) error {
		entries, err := os.ReadDir(dir)
		if dir != ownBPF || err != nil {
			return err
		}
		// The kernel puts two files there by itself: maps.debug, progs.debug.
		if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.IsDir() }) {
			return nil
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return os.Remove(dir)
	})
}
