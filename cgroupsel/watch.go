package cgroupsel

import (
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// watcher says "look again" when something is made or removed beside a
// selected cgroup or above it. It says nothing of what: an overflow of the
// queue, or a watch that came too late, loses nothing that the next look does
// not see.
type watcher struct {
	events <-chan struct{} // never ready if there is no inotify
	fd     int             // file's: File.Fd would make it block
	file   *os.File
	done   chan struct{}
}

// watch starts the watcher's reader. close waits for it.
func (s *Selector) watch() *watcher {
	err := s.allowed(FeatureInotify)
	var fd int
	if err == nil {
		fd, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	}
	if !s.note(FeatureInotify, err) {
		return &watcher{}
	}
	events := make(chan struct{}, 1)
	w := &watcher{events: events, fd: fd, file: os.NewFile(uintptr(fd), "inotify"), done: make(chan struct{})}
	go w.read(events)
	return w
}

func (w *watcher) read(events chan<- struct{}) {
	defer close(w.done)
	buf := make([]byte, 16<<10)
	for {
		if _, err := w.file.Read(buf); err != nil {
			return
		}
		select {
		case events <- struct{}{}:
		default: // one is waiting already
		}
	}
}

// follow watches each existing parent of each path, the root first: a parent
// that is made after its own parent is watched makes an event. A watch that is
// there already stays; one of a removed cgroup ends with it.
func (w *watcher) follow(t *tree, plain []entry) {
	if w.file == nil {
		return
	}
	w.add(t, "/")
	seen := make(map[string]bool)
	for _, e := range plain {
		for _, dir := range lineage(path.Dir(e.path)) {
			if !seen[dir] {
				seen[dir] = true
				w.add(t, dir)
			}
		}
	}
}

// add needs a path, and makes one of a descriptor. A cgroup that is not there
// needs no watch: its parent has one.
func (w *watcher) add(t *tree, name string) {
	dir, err := t.dir(name)
	if err != nil {
		return
	}
	defer dir.Close()
	_, _ = unix.InotifyAddWatch(w.fd, fdPath(dir), unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR)
}

func (w *watcher) close() {
	if w.file == nil {
		return
	}
	w.file.Close()
	<-w.done
}
