package cgroupsel

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// fsType is cgroup2 as mount(2) and mountinfo know it.
const fsType = "cgroup2"

// rootID is the inode, and so the cgroup id, of the real root of cgroup2. The
// root of a cgroup namespace has another one.
const rootID = 1

// openRoot returns a directory of cgroup2 to walk from, whose path is "/" in
// /proc/self/cgroup: a mount where there is one, and else one of our own that
// is nowhere in the tree (`ip netns exec` hides /sys/fs/cgroup).
func openRoot() (*os.File, error) {
	mounts, err := cgroupMounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m.root != "/" {
			continue
		}
		if f, err := openMount(m.dir); err == nil {
			return f, nil
		}
	}
	f, err := detachedMount()
	if err != nil {
		return nil, fmt.Errorf("reach cgroup2 (no mount of it is visible here; it needs CAP_SYS_ADMIN): %w", err)
	}
	return f, nil
}

// openMount opens a mount point, and refuses what was mounted over it since.
func openMount(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, errors.Join(fmt.Errorf("%s is hidden", dir), f.Close())
	}
	return f, nil
}

// detachedMount makes a mount that no mount table shows. It ends with its
// descriptor.
func detachedMount() (*os.File, error) {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fs)
	// A new mount gives its options to the one superblock that all share. So
	// those in force are repeated, or systemd's nsdelegate would go.
	for _, o := range optionsInForce() {
		if err := unix.FsconfigSetFlag(fs, o); err != nil {
			return nil, fmt.Errorf("fsconfig %s: %w", o, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("fsconfig: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	// What fsmount gives is an O_PATH descriptor: it cannot be read or bound to.
	defer unix.Close(fd)
	dir, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open mount: %w", err)
	}
	return os.NewFile(uintptr(dir), "cgroup2"), nil
}

// optionsInForce finds the options of cgroup2 in whatever mount table shows
// them: our own does not, or we would not ask.
func optionsInForce() []string {
	for _, pid := range []string{"self", "1", fmt.Sprint(os.Getppid())} {
		mounts, err := cgroupMounts("/proc/" + pid + "/mountinfo")
		if err != nil || len(mounts) == 0 {
			continue
		}
		var flags []string
		for o := range strings.SplitSeq(mounts[0].options, ",") {
			if o != "rw" && o != "ro" && !strings.Contains(o, "=") {
				flags = append(flags, o)
			}
		}
		return flags
	}
	return nil
}

// mount is one line of mountinfo that is of cgroup2.
type mount struct{ root, dir, options string }

func cgroupMounts(file string) ([]mount, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}

// parseMounts reads proc_pid_mountinfo(5):
//
//	41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup rw,nsdelegate
func parseMounts(r io.Reader) ([]mount, error) {
	var found []mount
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20) // an overlay's options can be long
	for sc.Scan() {
		place, super, ok := strings.Cut(sc.Text(), " - ")
		p, s := strings.Fields(place), strings.Fields(super)
		if !ok || len(p) < 6 || len(s) < 3 || s[0] != fsType {
			continue
		}
		found = append(found, mount{root: unescape(p[3]), dir: unescape(p[4]), options: s[2]})
	}
	return found, sc.Err()
}

// unescape undoes what mountinfo does to blanks.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
