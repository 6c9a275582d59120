package docker

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"cgtun/cgroupsel"
)

// buildKitAPI is that of 23.0, whose default builder is BuildKit.
var buildKitAPI = [2]int{1, 42}

// buildx is where the docker-container driver of buildx has its builders, whatever
// the daemon's parent is: BuildKit in a container, with its steps below it.
const buildx = "/docker/buildx"

// classic says whether the default builder of a daemon looks like any container.
// One that does not say what it is counts as old: that selects more, not less.
func (d *Daemon) classic() bool {
	if d.API == [2]int{} {
		return d.Silent
	}
	return slices.Compare(d.API[:], buildKitAPI[:]) < 0
}

// Follow says what one selection selects of daemons.
func Follow(daemons []Daemon, selection int, mode cgroupsel.Docker) cgroupsel.Followed {
	f := cgroupsel.Followed{Selection: selection}
	if mode == cgroupsel.DockerOff {
		return f
	}
	for i := range daemons {
		d := &daemons[i]
		f.Cgroups = append(f.Cgroups, d.Cgroups(mode)...)
		// The system manager's are told by their names: those of a daemon in a
		// cgroup namespace of its own are not among them.
		if d.Root == "/" {
			f.Steps = true
			f.Containers = f.Containers || d.All(mode)
		}
	}
	slices.Sort(f.Cgroups)
	f.Cgroups = slices.Compact(f.Cgroups)
	return f
}

// Cgroups are what is selected of a daemon by path, whether they are there yet
// or not.
func (d *Daemon) Cgroups(mode cgroupsel.Docker) (paths []string) {
	if d.Uncovered() == nil {
		paths = append(paths, d.Cgroup)
	}
	for _, parent := range d.parents() {
		if !d.All(mode) {
			parent = path.Join(parent, "buildkit")
		}
		paths = append(paths, parent)
	}
	if at := path.Join(d.Root, buildx); !strings.HasSuffix(d.Parent, ".slice") && !slices.ContainsFunc(paths, func(p string) bool { return within(at, p) }) {
		paths = append(paths, at)
	}
	return paths
}

// All says whether all containers of a daemon are selected, and not its builds
// alone.
func (d *Daemon) All(mode cgroupsel.Docker) bool {
	return mode == cgroupsel.DockerAll || mode == cgroupsel.DockerAuto && d.classic()
}

// Uncovered says why what the daemon does itself cannot be told from others.
func (d *Daemon) Uncovered() error {
	if d.Cgroup != "/" && d.Cgroup != d.Root {
		return nil
	}
	return fmt.Errorf("dockerd (process %d) is in cgroup %q, which is the root of all that it sees: its pulls are not captured, and steps are only where they have cgroups of their own; start dockerd in a cgroup below that", d.PID, d.Cgroup)
}

// parents are where the containers of a daemon can be, with the cgroupfs driver.
// A path without a slash is below the daemon's own parent for some versions of
// runc, and below the root for others.
func (d *Daemon) parents() []string {
	parent := d.Parent
	switch {
	case strings.HasSuffix(parent, ".slice"):
		return nil // of the systemd driver
	case parent == "":
		parent = "/docker"
	}
	// Cleaned as an absolute path, it does not leave the root.
	all := []string{path.Join(d.Root, path.Clean("/"+parent))}
	if !strings.HasPrefix(parent, "/") {
		all = append(all, path.Join(path.Dir(d.Cgroup), path.Clean("/"+parent)))
	}
	return slices.DeleteFunc(all, func(p string) bool { return p == "/" || p == d.Root })
}
