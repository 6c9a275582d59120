package docker

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
)

const (
	// maxDaemons bounds those that are known at one time.
	maxDaemons = 16
	// settled is how long a daemon has lived that stays in the picture when it
	// has ended without an answer: one that could not start has no containers.
	settled = 5 * time.Second
	// scanEvery is for kernels that tell of no exec.
	scanEvery = time.Second
)

// Finder finds daemons.
type Finder struct {
	log   *slog.Logger
	execs func(ctx context.Context, name string, ready func(), seen func(pid int)) error
	// device is deviceOf.
	device func(netip.Addr) string

	mu   sync.Mutex
	now  []known
	said map[string]bool // of each bridge, whether its network is an internal one
}

type known struct {
	Daemon
	since time.Time
	watch bool // its end is waited for
	said  bool // it has answered itself
}

// NewFinder returns a Finder that has not looked yet. log may be nil.
func NewFinder(log *slog.Logger) *Finder {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Finder{log: log, execs: cgroupsel.Execs, device: deviceOf}
}

// Daemons are the newest picture.
func (f *Finder) Daemons() []Daemon {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]Daemon, 0, len(f.now))
	for _, k := range f.now {
		all = append(all, k.Daemon)
	}
	return all
}

// Scan looks at all processes, and waits for the answers of the daemons among
// them for as long as ctx lets it.
func (f *Finder) Scan(ctx context.Context) []Daemon {
	for _, pid := range processes() {
		if k, ok := f.take(pid); ok {
			if a, err := ask(ctx, k.PID); err == nil {
				f.answered(k.PID, a)
			}
		}
	}
	return f.Daemons()
}

// processes are the numbers of all.
func processes() (pids []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Run keeps the picture until ctx ends, and calls changed when it is another
// one, from one goroutine at a time.
func (f *Finder) Run(ctx context.Context, changed func([]Daemon)) error {
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	news := make(chan struct{}, 1)
	wake := func() {
		select {
		case news <- struct{}{}:
		default:
		}
	}
	look := func(pid int) {
		f.take(pid)
		f.begin(ctx, &work, wake)
	}
	scan := func() {
		for _, pid := range processes() {
			f.take(pid)
		}
		f.begin(ctx, &work, wake)
	}
	work.Go(func() {
		err := f.execs(ctx, program, scan, look)
		if ctx.Err() != nil {
			return
		}
		f.log.Warn("docker daemons are looked for each second instead of at once", "err", err)
		for ctx.Err() == nil {
			scan()
			select {
			case <-ctx.Done():
			case <-time.After(scanEvery):
			}
		}
	})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-news:
			changed(f.Daemons())
		}
	}
}

// take brings a process into the picture if it is a daemon and new.
func (f *Finder) take(pid int) (known, bool) {
	d, err := examine(pid)
	var other *otherError
	switch {
	case errors.As(err, &other):
		f.log.Debug(other.what)
		return known{}, false
	case errors.Is(err, errNone):
		return known{}, false
	case err != nil:
		f.log.Warn("a process cannot be looked at", "pid", pid, "err", err)
		return known{}, false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.ContainsFunc(f.now, func(k known) bool { return k.PID == pid && !k.Ended }) {
		return known{}, false
	}
	k := known{Daemon: d, since: time.Now()}
	for _, old := range f.now {
		if old.Ended && old.Root == d.Root && old.Cgroup == d.Cgroup {
			// Until it says something else: nothing is selected and unselected
			// in between.
			k.Version, k.API = old.Version, old.API
		}
	}
	if len(f.now) >= maxDaemons {
		// What has ended is kept for who comes after it, not for nobody's sake; and
		// what runs in containers keeps out nobody who is not in one.
		if i := slices.IndexFunc(f.now, func(k known) bool {
			return k.Ended && k.Version == "" || k.Root != d.Root && within(k.Root, d.Root)
		}); i >= 0 {
			f.now = slices.Delete(f.now, i, i+1)
		}
	}
	if len(f.now) >= maxDaemons {
		f.log.Warn("too many docker daemons", "limit", maxDaemons, "pid", pid)
		return known{}, false
	}
	f.now = append(f.now, k)
	f.log.Info("docker daemon found", "pid", pid, "cgroup", d.Cgroup)
	return k, true
}

// begin watches those that are new, and asks them.
func (f *Finder) begin(ctx context.Context, work *sync.WaitGroup, wake func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.now {
		k := &f.now[i]
		if k.watch || k.Ended {
			continue
		}
		k.watch = true
		pid := k.PID
		ctx, cancel := context.WithCancel(ctx)
		work.Go(func() {
			defer cancel()
			if await(ctx, pid) {
				f.ended(pid)
				wake()
			}
		})
		work.Go(func() {
			a, err := askUntil(ctx, pid)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				f.silent(pid, err)
			default:
				f.answered(pid, a)
			}
			wake()
		})
	}
	wake()
}

// await returns when a process ends, and says whether that is why.
func await(ctx context.Context, pid int) bool {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return true
	}
	p := os.NewFile(uintptr(fd), "pidfd")
	defer p.Close()
	// The number can be another process's by now.
	if _, err := examine(pid); err != nil {
		return true
	}
	raw, err := p.SyscallConn()
	if err != nil {
		return true
	}
	defer context.AfterFunc(ctx, func() { p.Close() })()
	err = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
	return err == nil && ctx.Err() == nil
}

// answered takes what a daemon said of itself. By now it is where it stays.
func (f *Finder) answered(pid int, a answer) {
	now, err := examine(pid)
	if err != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.now {
		if k := &f.now[i]; k.PID == pid && !k.Ended {
			k.Cgroup, k.Root, k.Parent = now.Cgroup, now.Root, now.Parent
			k.Version, k.Silent, k.said = a.Version, false, true
			k.API, _ = a.api()
			f.log.Info("docker daemon answers", "pid", pid, "version", k.Version)
			f.dropEnded(k.Root)
			return
		}
	}
}

// silent notes that a daemon does not answer.
func (f *Finder) silent(pid int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.now {
		if k := &f.now[i]; k.PID == pid && !k.Ended {
			f.log.Warn("docker daemon does not say its version: it counts as one before 23", "pid", pid, "err", err)
			k.Silent, k.Version, k.API = true, "", [2]int{}
			f.dropEnded(k.Root)
			return
		}
	}
}

// dropEnded forgets those that ended when another one is there, in the same cgroup
// namespace or around theirs. It wants f.mu.
func (f *Finder) dropEnded(root string) {
	f.now = slices.DeleteFunc(f.now, func(k known) bool { return k.Ended && within(k.Root, root) })
}

// ended keeps what a daemon had, if it ever was one.
func (f *Finder) ended(pid int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = slices.DeleteFunc(f.now, func(k known) bool {
		return k.PID == pid && !k.Ended && !k.said && time.Since(k.since) < settled
	})
	for i := range f.now {
		if k := &f.now[i]; k.PID == pid && !k.Ended {
			k.Ended = true
			f.log.Info("docker daemon has ended: what it had stays selected", "pid", pid, "cgroup", k.Cgroup)
		}
	}
}
