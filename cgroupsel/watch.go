package cgroupsel

import (
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
	fd      int             // inotify's: File.Fd would make it block
	file    *os.File        // nil: no inotify
	news    *ringbuf.Reader // what the programs tell; nil: nothing
	readers sync.WaitGroup
}

// watch starts the watcher's readers. close waits for them.
func (s *Selector) watch() *watcher {
	w := &watcher{events: make(chan struct{}, 1)}
	err := s.allowed(FeatureInotify)
	if err == nil {
		w.fd, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	}
	if s.note(FeatureInotify, err) {
		w.file = os.NewFile(uintptr(w.fd), "inotify")
		w.readers.Go(w.readInotify)
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

func (w *watcher) readInotify() {
	buf := make([]byte, 16<<10)
	for {
		if _, err := w.file.Read(buf); err != nil {
			return
		}
		w.tell()
	}
}

func (w *watcher) readNews() {
	var r ringbuf.Record
	for {
		if err := w.news.ReadInto(&r); err != nil {
			return
		}
		w.tell()
	}
}

func (w *watcher) tell() {
	select {
	case w.events <- struct{}{}:
	default: // one is waiting already
	}
}

// follow watches each existing parent of each path, the root first: a parent
// that is made after its own parent is watched makes an event. A watch that is
// there already stays; one of a removed cgroup ends with it.
func (w *watcher) follow(t *tree, plain []entry) {
	if w.file == nil {
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
func (w *watcher) add(dir *os.File) {
	if w.file != nil {
		_, _ = unix.InotifyAddWatch(w.fd, fdPath(dir), unix.IN_CREATE|unix.IN_DELETE|unix.IN_ONLYDIR)
	}
}

func (w *watcher) close() {
	if w.file != nil {
		w.file.Close()
	}
	if w.news != nil {
		w.news.Close()
	}
	w.readers.Wait()
}
