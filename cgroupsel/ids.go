package cgroupsel

import (
	"encoding/binary"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// kernfsHandle is FILEID_KERNFS of linux/exportfs.h: a handle that is
	// nothing but the id.
	kernfsHandle = 0xfe
	// maxIDs bounds the cache of PathByID: some 100 bytes each.
	maxIDs = 4096
)

// idCache remembers the paths of cgroups by id. An id is used once, and a
// cgroup of v2 cannot be renamed: so an entry never turns wrong, and still
// names a cgroup that has been removed.
type idCache struct {
	tree *tree

	mu    sync.Mutex
	paths map[uint64]string
}

func newIDCache(t *tree) *idCache { return &idCache{tree: t, paths: make(map[uint64]string)} }

// PathByID finds the path of a cgroup, such as that of a socket
// (INET_DIAG_CGROUP_ID). It is false for one that was removed before it was
// first asked for. Some microseconds when asked again, some tens the first
// time.
func (s *Selector) PathByID(id uint64) (string, bool) {
	c := s.ids
	c.mu.Lock()
	name, ok := c.paths[id]
	c.mu.Unlock()
	if ok {
		return name, true
	}
	if name, ok = c.tree.pathByID(id); !ok {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.paths) >= maxIDs {
		clear(c.paths)
	}
	c.paths[id] = name
	return name, true
}

// IDByPath is the id of a cgroup as it is now.
func (s *Selector) IDByPath(name string) (uint64, bool) {
	id, err := s.tree.id(name)
	return id, err == nil
}

// CgroupOf finds the path of a process's cgroup, "/../…" if that is outside of
// our cgroup namespace.
func CgroupOf(pid int) (string, error) { return cgroupOf(strconv.Itoa(pid)) }

// pathByID opens the cgroup by its id and asks what the open file is called.
func (t *tree) pathByID(id uint64) (string, bool) {
	handle := binary.NativeEndian.AppendUint64(nil, id)
	fd, err := unix.OpenByHandleAt(int(t.root.Fd()), unix.NewFileHandle(kernfsHandle, handle), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", false
	}
	f := os.NewFile(uintptr(fd), "cgroup")
	defer f.Close()
	name, err := os.Readlink(fdPath(f))
	if err != nil {
		return "", false
	}
	name = "/" + strings.TrimPrefix(strings.TrimPrefix(name, t.name), "/")
	// The name says nothing of removal ("… (deleted)") and of places outside
	// of our root: only a path that leads back to the id is one.
	now, err := t.id(name)
	return name, err == nil && now == id
}
