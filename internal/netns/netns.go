// Package netns is the way into network namespaces. A Ref names one and knows
// how to get in; it holds nothing open, so it keeps no namespace alive.
//
// It owns the threads that are inside of one for the time of a call, and
// nothing else; it finds no namespace, and makes none but by Private. tun,
// steer, cgroupsel, attach and tproxy call it. See setns(2),
// network_namespaces(7) and SO_NETNS_COOKIE in socket(7).
//
// Sockets made inside Do belong to that namespace for as long as they live,
// and keep it alive; who makes one in another namespace than home closes it
// before Do returns.
package netns

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrGone says that the namespace of a Ref has ended, or that its name now
// stands for another one.
var ErrGone = errors.New("network namespace is gone")

const (
	namesDir = "/run/netns"
	selfPath = "/proc/thread-self/ns/net"
)

// Ref names one network namespace for all of its life. The zero Ref names
// none. It may be copied, and is safe for concurrent use. Two Refs of one
// namespace can lead in by different ways: Cookie compares them.
type Ref struct {
	cookie uint64
	inode  uint64
	path   string // a file that leads in; "" for home
	way    *way   // leads in in place of path, if not nil
}

// way opens a descriptor of the namespace.
type way struct{ open func() (int, error) }

// home is read once: threads come and go, and one that is away in another
// namespace must not be asked.
var home = sync.OnceValues(func() (Ref, error) {
	r, err := current()
	if err != nil {
		return Ref{}, fmt.Errorf("identify the home network namespace: %w", err)
	}
	return r, nil
})

// Home returns the namespace that the process was started in. The first call
// must come from outside of every Do.
func Home() (Ref, error) { return home() }

// Named returns the namespace behind a name of ip-netns(8), or behind a path
// such as /proc/PID/ns/net, which has a slash in it.
func Named(nameOrPath string) (Ref, error) {
	if _, err := home(); err != nil {
		return Ref{}, err
	}
	path := nameOrPath
	if !strings.Contains(path, "/") {
		if path == "" || path == "." || path == ".." {
			return Ref{}, fmt.Errorf("find network namespace %q: not a name", nameOrPath)
		}
		path = filepath.Join(namesDir, nameOrPath)
	}
	r := Ref{path: path}
	fd, err := r.open()
	if err != nil {
		return Ref{}, fmt.Errorf("find network namespace %q: %w", nameOrPath, err)
	}
	defer unix.Close(fd)
	err = inside(fd, func() error {
		now, err := current()
		r.cookie, r.inode = now.cookie, now.inode
		return err
	})
	if err != nil {
		return Ref{}, fmt.Errorf("find network namespace %q: %w", nameOrPath, err)
	}
	return r, nil
}

// Names returns the names of ip-netns(8) that there are now, by the inode of what
// they lead to; of several the first.
func Names() map[uint64]string {
	entries, _ := os.ReadDir(namesDir) // without it there are none
	names := make(map[uint64]string, len(entries))
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(namesDir, e.Name()), &st) == nil && names[st.Ino] == "" {
			names[st.Ino] = e.Name()
		}
	}
	return names
}

// Name returns the name of ip-netns(8) that the namespace has now, "" for none.
func (r Ref) Name() string { return Names()[r.inode] }

// Inode returns the inode number by which ip-netns(8), lsns(8) and
// /proc/PID/ns/net show the namespace. A later namespace may get it again.
func (r Ref) Inode() uint64 { return r.inode }

// Cookie returns the kernel's number of the namespace, which is never used
// again until the machine restarts.
func (r Ref) Cookie() uint64 { return r.cookie }

// IsHome says whether this is the namespace that the process was started in,
// whatever way the Ref leads in.
func (r Ref) IsHome() bool {
	h, err := home()
	return err == nil && r.cookie != 0 && r.cookie == h.cookie
}

// Through returns a Ref of the same namespace that is entered by the descriptor
// which open returns. It is called for each Do, and the descriptor closed after
// it; an error means that the namespace has ended.
func (r Ref) Through(open func() (int, error)) Ref {
	r.way = &way{open}
	return r
}

// Private makes a namespace that nobody else knows. It ends when it is closed
// and nothing in it is used any more, with the process at the latest.
func Private() (Ref, io.Closer, error) {
	if _, err := home(); err != nil {
		return Ref{}, nil, err
	}
	var r Ref
	var f *os.File
	unshare := func() error { return os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET)) }
	err := away(unshare, func() (err error) {
		if r, err = current(); err == nil {
			f, err = os.Open(selfPath)
		}
		return err
	})
	if err != nil {
		return Ref{}, nil, fmt.Errorf("make a private network namespace: %w", err)
	}
	return r.Through(func() (int, error) { return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) }), f, nil
}

// String returns "home", the name in /run/netns, or "netns-INODE".
func (r Ref) String() string {
	if r.IsHome() {
		return "home"
	}
	if dir, name := filepath.Split(r.path); filepath.Clean(dir) == namesDir {
		return name
	}
	return fmt.Sprintf("netns-%d", r.inode)
}

// Do runs f with its thread in the namespace and returns what f returns.
// Goroutines that f starts are in home again. A caller who is there already
// runs f itself. The error wraps ErrGone if the namespace has ended.
//
// f runs on a thread of its own, locked to it. If the thread cannot go back
// it dies, so that no other goroutine ever runs in the wrong namespace.
func (r Ref) Do(f func() error) error {
	if r.cookie == 0 {
		return fmt.Errorf("enter a network namespace: none named: %w", ErrGone)
	}
	here, err := current()
	if err != nil {
		return fmt.Errorf("enter network namespace %s: %w", r, err)
	}
	if here.cookie == r.cookie {
		return f()
	}
	if r.IsHome() {
		// Only locked threads ever leave home: any other one is there.
		return onThread(func() (bool, error) { return true, f() })
	}
	fd, err := r.open()
	if err != nil {
		return fmt.Errorf("enter network namespace %s: %w", r, err)
	}
	defer unix.Close(fd)
	return inside(fd, func() error {
		now, err := current()
		if err != nil {
			return fmt.Errorf("enter network namespace %s: %w", r, err)
		}
		if now.cookie != r.cookie {
			return fmt.Errorf("enter network namespace %s: %s leads to another one: %w", r, r.path, ErrGone)
		}
		return f()
	})
}

// File calls f, outside of the namespace, with a descriptor of it that is closed
// after it: for what takes one as an argument, such as the move of a device. The
// error wraps ErrGone if the namespace has ended.
func (r Ref) File(f func(fd int) error) error {
	fd := -1
	err := r.Do(func() (err error) {
		if fd, err = unix.Open(selfPath, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return &fs.PathError{Op: "open", Path: selfPath, Err: err}
		}
		return nil
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fd)
}

// open returns a descriptor of the namespace's file. What is left of a name
// after its namespace was unmounted is an ordinary file or nothing.
func (r Ref) open() (int, error) {
	if r.way != nil {
		fd, err := r.way.open()
		if err != nil {
			return -1, fmt.Errorf("%w (%v)", ErrGone, err)
		}
		return fd, nil
	}
	fd, err := unix.Open(r.path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return -1, fmt.Errorf("%w (%s: %v)", ErrGone, r.path, err)
	}
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: r.path, Err: err}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, fmt.Errorf("%w (%s is not a namespace)", ErrGone, r.path)
	}
	return fd, nil
}

// inside runs f on a thread that has entered the namespace of fd.
func inside(fd int, f func() error) error {
	return away(func() error { return os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWNET)) }, f)
}

// away runs f on a thread that leave has taken to another namespace.
func away(leave, f func() error) error {
	return onThread(func() (back bool, err error) {
		was, err := unix.Open(selfPath, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return true, &fs.PathError{Op: "open", Path: selfPath, Err: err}
		}
		defer unix.Close(was)
		if err := leave(); err != nil {
			return true, err
		}
		err = f()
		return unix.Setns(was, unix.CLONE_NEWNET) == nil, err
	})
}

// onThread runs f on a locked thread and waits. The thread is given back to
// the scheduler only if f says that it may be; a goroutine that ends while
// still locked ends its thread. That is also what happens when f never
// returns because of runtime.Goexit.
func onThread(f func() (reuse bool, err error)) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := errors.New("function ended its goroutine")
		defer func() { done <- err }()
		var reuse bool
		if reuse, err = f(); reuse {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}

// current identifies the namespace of the calling thread.
func current() (Ref, error) {
	// One goroutine may change threads between two system calls; all threads
	// that it can change to are in the same namespace.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Ref{}, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return Ref{}, fmt.Errorf("read SO_NETNS_COOKIE (Linux 5.14): %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(selfPath, &st); err != nil {
		return Ref{}, &fs.PathError{Op: "stat", Path: selfPath, Err: err}
	}
	return Ref{cookie: cookie, inode: st.Ino}, nil
}
