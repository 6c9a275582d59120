package cgroupsel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"cgtun/doctor"
)

// Checks looks at what selection by cgroup needs, by trying it: at cgroup2, at
// the programs, which are attached for a moment and select nobody, and at what
// is selected. Without root it says what it could not try.
func Checks(selections ...Selection) []doctor.Named {
	return []doctor.Named{
		{Name: "cgroup2", Check: checkTree},
		{Name: "cgroup v1", Check: checkV1},
		{Name: "BPF", Check: checkPrograms},
		{Name: "selected cgroups", Check: func(context.Context) []doctor.Result { return checkCgroups(selections) }},
	}
}

// found makes a result; without a fix it is one that is well.
func found(name string, state doctor.State, what, fix string) []doctor.Result {
	return []doctor.Result{{Name: name, State: state, What: what, Fix: fix}}
}

func needsRoot(name string) []doctor.Result {
	return found(name, doctor.Warn, "not looked at: that needs root", "sudo cgtun doctor")
}

// usual are the places where systemd, docker and runc look for cgroup2.
var usual = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// checkTree looks for a mount where others find it, too: a container has a
// cgroup2 of its own only where its runtime sees the hierarchy.
func checkTree(context.Context) []doctor.Result {
	const name = "cgroup2"
	var places []string
	for _, pid := range []string{"self", "1"} { // `ip netns exec` hides it from us alone
		mounts, _ := cgroupMounts("/proc/" + pid + "/mountinfo")
		for _, m := range mounts {
			if !slices.Contains(places, m.dir) {
				places = append(places, m.dir)
			}
		}
	}
	root, err := openRoot()
	switch {
	case err != nil && os.Geteuid() != 0 && len(places) == 0:
		return needsRoot(name)
	case err != nil:
		return found(name, doctor.Error, err.Error()+": nothing can be selected by cgroup",
			"mount -t cgroup2 none /sys/fs/cgroup/unified (or start with systemd.unified_cgroup_hierarchy=1)")
	}
	defer root.Close()
	if !slices.ContainsFunc(places, func(p string) bool { return slices.Contains(usual, p) }) {
		return found(name, doctor.Warn, fmt.Sprintf("it is mounted at %s and not where systemd and container runtimes look (%s): what they start is in the root cgroup, and cannot be told apart",
			orNowhere(places), strings.Join(usual, ", ")), "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified")
	}
	what := "mounted at " + strings.Join(places, ", ")
	if id, err := inode(root); err == nil && id != rootID {
		what += "; cgtun is in a cgroup namespace: paths are from its root, and cgroups outside of it are out of reach"
	}
	return found(name, doctor.OK, what, "")
}

func orNowhere(places []string) string {
	if len(places) == 0 {
		return "no place that is visible here"
	}
	return strings.Join(places, ", ")
}

// checkV1 looks for net_cls and net_prio. Before 5.15 a socket had one place
// for their numbers and its cgroup2, and the first use of theirs switched the
// other off for all later sockets of the machine.
func checkV1(context.Context) []doctor.Result {
	const name = "cgroup v1"
	text, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		return nil // a kernel without v1
	}
	mounted := v1Controllers(string(text))
	var inTheWay []string
	for _, c := range []string{"net_cls", "net_prio"} {
		if slices.Contains(mounted, c) {
			inTheWay = append(inTheWay, c)
		}
	}
	switch {
	case len(inTheWay) > 0 && kernelBefore(5, 15):
		return found(name, doctor.Error, fmt.Sprintf("the controllers %s are in use, and this kernel then forgets which cgroup2 a socket is in: nothing is told apart by the firewall", strings.Join(inTheWay, " and ")),
			"boot with cgroup_no_v1=net_cls,net_prio, or a kernel since 5.15")
	case len(inTheWay) > 0:
		return found(name, doctor.OK, fmt.Sprintf("the controllers %s are in use; kernels since 5.15 keep them apart from cgroup2", strings.Join(inTheWay, " and ")), "")
	case len(mounted) > 0:
		return found(name, doctor.OK, "hybrid: "+strings.Join(mounted, " ")+" are on v1, none of which is in the way", "")
	}
	return found(name, doctor.OK, "no controller is on v1", "")
}

// v1Controllers reads /proc/cgroups: hierarchy 0 is that of cgroup2, or none.
func v1Controllers(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) >= 4 && !strings.HasPrefix(f[0], "#") && f[1] != "0" {
			names = append(names, f[0])
		}
	}
	return names
}

func kernelBefore(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var have [2]int
	release := unix.ByteSliceToString(u.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &have[0], &have[1]); err != nil {
		return false
	}
	return have[0] < major || have[0] == major && have[1] < minor
}

// checkPrograms does what a start does, for a cgroup of its own in which
// nobody is. The first way that works makes those behind it needless.
func checkPrograms(context.Context) []doctor.Result {
	const name = "BPF"
	if os.Geteuid() != 0 {
		return needsRoot(name)
	}
	pid := strconv.Itoa(os.Getpid())
	o := Options{Instance: "doctor-" + pid, MaxCgroups: 16, Selections: []Selection{{Cgroups: []string{"/.cgtun-doctor-" + pid}, Create: true}}}
	s, err := New(o)
	if isTaken(err) {
		// A live instance has selected all of our cgroup namespace from outside.
		o.Selections = nil
		s, err = New(o)
	}
	if err != nil {
		return found(name, doctor.Error, err.Error(), "make cgroup2 writable for root: in a container start it with --privileged and --cgroupns=host")
	}
	_ = s.Arm() // what it lacks is among the features
	features := s.Features()
	foreign := attachedAtRoot(s.tree.root)
	if err := s.Close(); err != nil {
		return found(name, doctor.Warn, "what was tried could not be taken away again: "+err.Error(), "cgtun cleanup")
	}
	var results []doctor.Result
	for _, f := range features {
		if f.Err == nil {
			results = append(results, found(f.Name, doctor.OK, "can be attached", "")...)
			continue
		}
		results = append(results, found(f.Name, doctor.Warn, f.Err.Error(), fixOf(f, foreign))...)
	}
	return results
}

// fixOf says what to do about a refused feature.
func fixOf(f Feature, foreign []string) string {
	switch {
	case errors.Is(f.Err, errOwnPIDs):
		return "start cgtun in the machine's pid namespace (a container: --pid=host)"
	case errors.Is(f.Err, unix.EPERM) && f.Name != FeatureMkdir && len(foreign) > 0:
		return fmt.Sprintf("stop what attached %s (see `bpftool cgroup tree`), or have it allow others (BPF_F_ALLOW_MULTI)", strings.Join(foreign, ", "))
	case errors.Is(f.Err, unix.EPERM):
		return "give cgtun CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (in a container --privileged); `cat /sys/kernel/security/lockdown` must not say confidentiality"
	case f.Name == FeatureProcess:
		return "run a kernel since " + f.Err.Kernel + ", and cgtun outside of a pid namespace (a container: --pid=host)"
	case f.Name == FeatureMkdir:
		return "run a kernel since " + f.Err.Kernel + " with CONFIG_DEBUG_INFO_BTF and CONFIG_BPF_EVENTS"
	}
	return "run a kernel since " + f.Err.Kernel + " with CONFIG_CGROUP_BPF"
}

// attachedAtRoot names the programs of others where ours go.
func attachedAtRoot(root *os.File) []string {
	var names []string
	for _, at := range []ebpf.AttachType{ebpf.AttachCGroupInetSockCreate, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect} {
		r, err := link.QueryPrograms(link.QueryOptions{Target: int(root.Fd()), Attach: at})
		if err != nil {
			continue
		}
		for _, p := range r.Programs {
			if name := programName(p.ID); name != "" && !strings.HasPrefix(name, ownPrefix) {
				names = append(names, fmt.Sprintf("program %d (%s, %s)", p.ID, name, at))
			}
		}
	}
	return names
}

// ownPrefix begins the name of each program of ours.
const ownPrefix = "cgtun_"

// programName is "" if we may not know it: then no program is what is in our
// way.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return cmp.Or(info.Name, "without a name")
}

// checkCgroups looks for the configured paths. Globs and units may match
// nothing yet.
func checkCgroups(selections []Selection) []doctor.Result {
	const name = "selected cgroups"
	t, err := openTree()
	if err != nil {
		return nil // checkTree has said it
	}
	defer t.close()
	var made, wanted []string
	for _, one := range selections {
		for _, c := range one.Cgroups {
			_, err := t.id(c)
			switch {
			case err == nil || IsGlob(c) || IsUnit(c):
			case one.Create:
				made = append(made, c)
			default:
				wanted = append(wanted, c)
			}
		}
	}
	if len(wanted) > 0 {
		return found(name, doctor.Warn, fmt.Sprintf("%s: not there, and [select] create is false: nothing is captured by it until somebody makes it", strings.Join(wanted, ", ")),
			"set create = true in [select]")
	}
	if len(made) > 0 {
		return found(name, doctor.OK, strings.Join(made, ", ")+": made at the start", "")
	}
	return found(name, doctor.OK, "those with plain paths are there", "")
}
