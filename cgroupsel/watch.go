package cgroupsel

import (
	"encoding/binary"
	"errors"
	"os"
	"path"
	"sync"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// watcher says "look again" when something is made or removed where it may
// change the picture. It says nothing of what: an overflow of a queue, or a
// watch that came too late, loses nothing that the next look does not see.
// The zero watcher watches nothing.
type watcher struct {
	events  chan struct{}
	names   chan struct{} // in the directories of names; nil: no inotify
	cgroups inotify
	netns   inotify
	mounts  mountTable
	news    *ringbuf.Reader // what the programs tell; nil: nothing
	readers sync.WaitGroup
}

// watch starts the watcher's readers. close waits for them.
func (s *Selector) watch() *watcher {
	w := &watcher{events: make(chan struct{}, 1)}
	err := s.allowed(FeatureInotify)
	if err == nil {
		err = w.cgroups.open()
	}
	if err == nil && len(s.names.all) > 0 {
		err = w.netns.open()
	}
	if s.note(FeatureInotify, err) {
		w.readers.Go(func() { w.cgroups.read(w.events) })
	}
	if w.netns.file != nil {
		w.names = make(chan struct{}, 1)
		w.readers.Go(func() { w.netns.read(w.names) })
		if err := w.mounts.open(); err != nil {
			s.log.Warn("names of network namespaces are followed late", "every", s.every, "err", err)
		}
		w.readers.Go(w.mounts.read)
	}
	if s.traces == nil {
		return w
	}
	if w.news, err = ringbuf.NewReader(s.maps.news); err != nil {
		s.log.Warn("news of selected cgroups come late", "every", s.every, "err", err)
		return w
	}
	w.readers.Go(w.readNews)
	return w
}

// inotify is one queue of inotify(7). The zero value watches nothing.
type inotify struct {
	fd   int // File.Fd would make it block
	file *os.File
}

func (i *inotify) open() error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		i.fd, i.file = fd, os.NewFile(uintptr(fd), "inotify")
	}
	return err
}

// read tells of events until the file is closed.
func (i *inotify) read(events chan<- struct{}) {
	if i.file == nil {
		return
	}
	buf := make([]byte, 16<<10)
	for {
		if _, err := i.file.Read(buf); err != nil {
			return
		}
		tell(events)
	}
}

// add watches a directory, and says whether it is there. A watch that is there
// already stays.
func (i *inotify) add(path string) bool {
	if i.file == nil {
		return false
	}
	_, err := unix.InotifyAddWatch(i.fd, path, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_ONLYDIR)
	return err == nil
}

func (m *mountTable) stop() {
	if m.events != nil {
		_, _ = unix.Write(m.end, binary.NativeEndian.AppendUint64(nil, 1))
	}
}

// close is for when read has returned.
func (m *mountTable) close() {
	if m.events != nil {
		_ = unix.Close(m.table)
		_ = unix.Close(m.end)
	}
}

func (i *inotify) close() {
	if i.file != nil {
		i.file.Close()
	}
}

// mountTable tells of mounts by poll(2), as proc_pid_mountinfo(5) has it. The
// zero value tells of nothing.
type mountTable struct {
	table, end int           // end is an eventfd
	events     chan struct{} // nil: not open
}

func (m *mountTable) open() (err error) {
	// Not by os.Open: the runtime would poll it, too, and whoever asks first
	// gets the event.
	if m.table, err = unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return os.NewSyscallError("open /proc/self/mountinfo", err)
	}
	if m.end, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return errors.Join(os.NewSyscallError("eventfd", err), unix.Close(m.table))
	}
	m.events = make(chan struct{}, 1)
	return nil
}

// read tells of events until stop.
func (m *mountTable) read() {
	if m.events == nil {
		return
	}
	fds := []unix.PollFd{{Fd: int32(m.table), Events: unix.POLLPRI}, {Fd: int32(m.end), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil || n == 0 || fds[1].Revents != 0:
			return
		default:
			tell(m.events)
		}
	}
}

func (w *watcher) readNews() {
	var r ringbuf.Record
	for {
		if err := w.news.ReadInto(&r); err != nil {
			return
		}
		tell(w.events)
	}
}

func tell(events chan<- struct{}) {
	select {
	case events <- struct{}{}:
	default: // one is waiting already
	}
}

// follow watches each existing parent of each path, the root first: a parent
// that is made after its own parent is watched makes an event. A watch that is
// there already stays; one of a removed cgroup ends with it.
func (w *watcher) follow(t *tree, plain []entry) {
	if w.cgroups.file == nil {
		return
	}
	seen := make(map[string]bool)
	for _, e := range plain {
		for _, dir := range append([]string{"/"}, lineage(path.Dir(e.path))...) {
			if !seen[dir] {
				seen[dir] = true
				w.open(t, dir)
			}
		}
	}
}

// open watches a cgroup. One that is not there needs no watch: its parent has
// one.
func (w *watcher) open(t *tree, name string) {
	dir, err := t.dir(name)
	if err != nil {
		return
	}
	defer dir.Close()
	w.add(dir)
}

// add needs a path, and makes one of a descriptor.
func (w *watcher) add(dir *os.File) { w.cgroups.add(fdPath(dir)) }

// followNames watches the directories of names, or what is above one that is
// not there yet.
func (w *watcher) followNames(dirs []string) {
	for _, dir := range dirs {
		for !w.netns.add(dir) && w.netns.file != nil && dir != "/" {
			dir = path.Dir(dir)
		}
	}
}

func (w *watcher) close() {
	w.cgroups.close()
	w.netns.close()
	if w.news != nil {
		w.news.Close()
	}
	w.mounts.stop()
	w.readers.Wait()
	w.mounts.close()
}
