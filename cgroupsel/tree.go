package cgroupsel

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// xattr marks the directories that cgtun made; its value is the instance.
const xattr = "user.cgtun"

// tree is cgroup2 seen from one directory. All paths are absolute in it
// ("/a/b"), as /proc/PID/cgroup shows them, and are never looked up in the
// process's mount namespace. Safe for concurrent use.
type tree struct {
	root *os.File
	// name is what the kernel calls the root in /proc/self/fd: the mount
	// point, or "/" for a mount that is nowhere.
	name string

	mu   sync.Mutex
	held map[string]*os.File // cgroups that we made, by path; see hold
}

func openTree() (*tree, error) {
	root, err := openRoot()
	if err != nil {
		return nil, err
	}
	name, err := os.Readlink(fdPath(root))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("name root of cgroup2: %w", err), root.Close())
	}
	return &tree{root: root, name: name}, nil
}

// close lets go of what this tree holds, too.
func (t *tree) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	errs := []error{t.root.Close()}
	for _, d := range t.held {
		errs = append(errs, d.Close())
	}
	t.held = nil
	return errors.Join(errs...)
}

// fdPath is a name for an open file that works where its own path may not.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// open opens a cgroup, or a file of it. The caller closes it.
func (t *tree) open(name string, flags int) (*os.File, error) {
	rel := strings.TrimPrefix(name, "/")
	if rel == "" {
		rel = "."
	}
	fd, err := unix.Openat2(int(t.root.Fd()), rel, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open cgroup", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (t *tree) dir(name string) (*os.File, error) {
	return t.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
}

// id is the inode of the directory, which is what the kernel calls the
// cgroup's id.
func (t *tree) id(name string) (uint64, error) {
	f, err := t.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return inode(f)
}

func inode(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, &fs.PathError{Op: "stat cgroup", Path: f.Name(), Err: err}
	}
	return st.Ino, nil
}

// walk calls visit for a cgroup and all below it, parents first. What
// disappears meanwhile is passed over.
func (t *tree) walk(name string, visit func(name string, dir *os.File) error) error {
	dir, err := t.dir(name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := visit(name, dir); err != nil {
		return err
	}
	below, err := children(dir)
	if err != nil {
		return err
	}
	for _, c := range below {
		if err := t.walk(path.Join(name, c), visit); err != nil {
			return err
		}
	}
	return nil
}

// children lists the cgroups right below one by their names; one that has gone
// has none.
func children(dir *os.File) (names []string, err error) {
	entries, err := dir.ReadDir(-1)
	if err != nil && !gone(err) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// gone tells that a cgroup was removed: ENODEV is what its open files say.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV)
}

// make makes a cgroup and the parents it lacks, marked as ours, and returns
// those that it made or found to be ours, parents first.
func (t *tree) make(name, instance string) ([]string, error) {
	var ours []string
	for _, p := range lineage(name) {
		mine, err := t.makeOne(p, instance)
		for n := 0; gone(err) && n < makeTries; n++ {
			mine, err = t.makeOne(p, instance) // somebody has cleaned up
		}
		if err != nil {
			return ours, err
		}
		if mine {
			ours = append(ours, p)
		}
	}
	return ours, nil
}

// makeTries is how often a cgroup is made again that was removed meanwhile.
const makeTries = 10

func (t *tree) makeOne(name, instance string) (mine bool, err error) {
	parent, err := t.dir(path.Dir(name))
	if err != nil {
		return false, err
	}
	err = unix.Mkdirat(int(parent.Fd()), path.Base(name), 0o755)
	parent.Close()
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return false, &fs.PathError{Op: "make cgroup", Path: name, Err: err}
	}
	return t.claim(name, instance, err == nil)
}

// claim marks a cgroup that was just made, and tells of an older one whether
// an earlier run of this instance made it. From then on this process holds it.
func (t *tree) claim(name, instance string, fresh bool) (bool, error) {
	d, err := t.dir(name)
	if err != nil {
		return false, err
	}
	defer d.Close()
	if !fresh && owner(d) != instance {
		return false, nil
	}
	alive, err := t.hold(name)
	if err != nil || !alive || !fresh {
		return alive, err
	}
	if err := unix.Fsetxattr(int(d.Fd()), xattr, []byte(instance), 0); err != nil {
		err = fmt.Errorf("mark cgroup %s as ours: %w", name, err)
		return false, errors.Join(err, t.remove(name))
	}
	return true, nil
}

// hold locks a cgroup that is ours for as long as the tree is open: that is how
// others see that its maker lives, whatever namespaces they and it are in. It
// is false if another process holds it.
func (t *tree) hold(name string) (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d, err := t.dir(name)
	if err != nil {
		return false, err
	}
	if old := t.held[name]; old != nil {
		was, _ := inode(old)
		if now, err := inode(d); err == nil && now == was {
			return true, d.Close()
		}
		old.Close()
		delete(t.held, name)
	}
	// One who only looks holds it for a moment, too.
	for range 20 {
		if err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return false, d.Close()
	case err != nil:
		return false, errors.Join(&fs.PathError{Op: "lock cgroup", Path: name, Err: err}, d.Close())
	}
	// Who takes away what the dead left locks it, too: it can be gone by now.
	was, err := inode(d)
	if now, errNow := t.id(name); err != nil || errNow != nil || now != was {
		return false, errors.Join(&fs.PathError{Op: "lock cgroup", Path: name, Err: unix.ENOENT}, d.Close())
	}
	if t.held == nil {
		t.held = map[string]*os.File{}
	}
	t.held[name] = d
	return true, nil
}

// isHeld says whether some process holds a cgroup.
func isHeld(d *os.File) bool {
	if err := unix.Flock(int(d.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return errors.Is(err, unix.EWOULDBLOCK)
	}
	_ = unix.Flock(int(d.Fd()), unix.LOCK_UN) // its close does the same
	return false
}

// owner is the instance that made a cgroup, "" for none of ours.
func owner(d *os.File) string {
	buf := make([]byte, 64)
	n, err := unix.Fgetxattr(int(d.Fd()), xattr, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

// remove removes a cgroup; the kernel refuses one with processes or children.
func (t *tree) remove(name string) error {
	parent, err := t.dir(path.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := unix.Unlinkat(int(parent.Fd()), path.Base(name), unix.AT_REMOVEDIR); err != nil {
		return &fs.PathError{Op: "remove cgroup", Path: name, Err: err}
	}
	return nil
}

// removeOurs removes a cgroup if the instance made it and nobody uses it, and
// says whether it did. It is for who holds it.
func (t *tree) removeOurs(name, instance string) (bool, error) {
	return t.removeIf(name, func(d *os.File) bool { return owner(d) == instance })
}

// removeDead is removeOurs for a cgroup that nobody holds, and holds it meanwhile.
func (t *tree) removeDead(name, instance string) (bool, error) {
	return t.removeIf(name, func(d *os.File) bool {
		return owner(d) == instance && unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	})
}

func (t *tree) removeIf(name string, may func(*os.File) bool) (bool, error) {
	d, err := t.dir(name)
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer d.Close()
	if !may(d) {
		return false, nil
	}
	err = t.remove(name)
	if gone(err) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
		return false, nil
	}
	return err == nil, err
}

// move puts a process with all its threads into a cgroup. pid "0" is this
// process.
func (t *tree) move(name, pid string) error {
	f, err := t.open(path.Join(name, "cgroup.procs"), unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(pid)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("move process %s to cgroup %s: its controllers are on for its children, so it can hold no process itself; name a child: %w", pid, name, err)
	case err != nil:
		return fmt.Errorf("move process %s to cgroup %s: %w", pid, name, err)
	}
	return nil
}

// cgroupOf is the path of a process's cgroup, "self" being this process. It is
// relative to our cgroup namespace, and begins with "/.." outside of that.
func cgroupOf(pid string) (string, error) {
	text, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return "", fmt.Errorf("find cgroup of process: %w", err)
	}
	for line := range bytes.Lines(text) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\n"), "0::"); ok {
			return strings.TrimSuffix(p, " (deleted)"), nil
		}
	}
	return "", fmt.Errorf("find cgroup of process %s: this kernel has no cgroup2", pid)
}

// lineage lists a path and its parents, the root left out, parents first.
func lineage(name string) []string {
	if name == "/" {
		return nil
	}
	return append(lineage(path.Dir(name)), name)
}

// within tells whether a cgroup is at or below another: "/a/b" is within "/a",
// "/ab" is not.
func within(name, top string) bool {
	return top == "/" || name == top || strings.HasPrefix(name, top+"/")
}

// level is the depth below the root, as nft's `socket cgroupv2 level` counts.
func level(name string) int { return len(lineage(name)) }
