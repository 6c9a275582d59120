package labtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup2 directory of the lab's own.
type Cgroup struct {
	Path string // from the root of cgroup2: "/lab…/sel"
	Dir  string // where that is mounted
	ID   uint64 // the kernel's id: the inode of Dir

	dir *os.File
}

// cgroupTree is the lab's directory under the root of cgroup2.
type cgroupTree struct {
	root, base string
	made       []*Cgroup
}

// cgroupRoot returns where cgroup2 is mounted.
func cgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); len(w) > 2 && w[2] == "cgroup2" {
			return w[1], nil
		}
	}
	return "", errors.New("no cgroup2 is mounted")
}

// Cgroup makes a cgroup: name may have slashes. The lab removes it and all
// below it.
func (l *Lab) Cgroup(name string) *Cgroup {
	l.t.Helper()
	root, err := cgroupRoot()
	if err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cgroups == nil {
		l.cgroups = &cgroupTree{root: root, base: filepath.Join(root, l.prefix)}
	}
	c := &Cgroup{Dir: filepath.Join(l.cgroups.base, name)}
	c.Path = strings.TrimPrefix(c.Dir, root)
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		l.t.Fatalf("make cgroup: %v", err)
	}
	if c.dir, err = os.Open(c.Dir); err != nil {
		l.t.Fatalf("open cgroup: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(c.dir.Fd()), &st); err != nil {
		l.t.Fatalf("stat cgroup %s: %v", c.Dir, err)
	}
	c.ID = st.Ino
	l.cgroups.made = append(l.cgroups.made, c)
	return c
}

// Command makes cmd start in the cgroup, from its first instruction on, and
// returns it:
//
//	sel.Command(client.Command(ctx, "curl", "http://10.9.0.2/"))
//
// It holds as long as the lab: the cgroup must not be removed before. What enters
// a namespace on its way is selected outside of it, too: see In.
func (c *Cgroup) Command(cmd *exec.Cmd) *exec.Cmd {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD = true
	cmd.SysProcAttr.CgroupFD = int(c.dir.Fd())
	return cmd
}

// In returns a command that enters the namespace of h first and then the cgroup,
// so that nothing of the cgroup is ever in another namespace.
func (c *Cgroup) In(ctx context.Context, h *Host, name string, args ...string) *exec.Cmd {
	enter := []string{"-c", `echo 0 > "$0" && exec "$@"`, filepath.Join(c.Dir, "cgroup.procs"), name}
	return h.Command(ctx, "sh", append(enter, args...)...)
}

// Add moves a process into the cgroup.
func (c *Cgroup) Add(pid int) error {
	err := os.WriteFile(filepath.Join(c.Dir, "cgroup.procs"), fmt.Appendf(nil, "%d", pid), 0)
	if err != nil {
		return fmt.Errorf("move process %d: %w", pid, err)
	}
	return nil
}

// remove takes the lab's cgroups away and returns what should not have been
// there: processes, and cgroups that a cgtun made.
func (t *cgroupTree) remove() (left []string) {
	for _, c := range t.made {
		c.dir.Close()
	}
	dirs := t.dirs()
	for i := len(dirs) - 1; i >= 0; i-- {
		left = append(left, t.removeOne(dirs[i])...)
	}
	return left
}

// dirs lists the lab's cgroups, each before those below it.
func (t *cgroupTree) dirs() (dirs []string) {
	_ = filepath.WalkDir(t.base, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}

// empty tells whether no process is in any of them.
func (t *cgroupTree) empty() bool {
	return !slices.ContainsFunc(t.dirs(), func(dir string) bool {
		procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		return len(procs) > 0
	})
}

func (t *cgroupTree) removeOne(dir string) (left []string) {
	path := strings.TrimPrefix(dir, t.root)
	if n, err := unix.Lgetxattr(dir, "user.cgtun", nil); err == nil && n >= 0 {
		left = append(left, "cgroup "+path+", made by cgtun")
	}
	procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for _, pid := range strings.Fields(string(procs)) {
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		left = append(left, fmt.Sprintf("process %s (%s) in cgroup %s", pid, strings.TrimSpace(string(comm)), path))
		var n int
		if _, err := fmt.Sscan(pid, &n); err == nil && n != os.Getpid() {
			_ = unix.Kill(n, unix.SIGKILL)
		}
	}
	// The last process leaves its cgroup a little after its parent knows
	// that it has ended.
	var err error
	gone := eventually(5*time.Second, func() bool {
		err = os.Remove(dir)
		return err == nil || errors.Is(err, fs.ErrNotExist)
	})
	if !gone {
		left = append(left, fmt.Sprintf("cgroup %s: %v", path, err))
	}
	return left
}
