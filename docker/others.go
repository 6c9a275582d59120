package docker

import (
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"cgtun/cgroupsel"
	"cgtun/doctor"
)

// engine is a program that builds or keeps containers without dockerd.
type engine struct {
	what string // that is in the cgroup that counts
	fix  string
	// keeper: what counts are its children, which are in cgroups of their own.
	keeper bool
}

const (
	fixBuild  = "cgtun run -- podman build … (or buildah), with what their steps are in among [select] cgroups: \"/buildah-*\", with systemd \"/system.slice/*-buildah-*.scope\""
	fixKeeper = "name that among [select] cgroups, with a glob where the name changes"
)

// engines are those that are looked for.
var engines = map[string]engine{
	"podman":                  {what: "what it fetches itself", fix: fixBuild},
	"buildah":                 {what: "what it fetches itself", fix: fixBuild},
	"buildkitd":               {what: "it, with its steps,", fix: fixKeeper},
	"conmon":                  {what: "the container that it keeps", fix: fixKeeper, keeper: true},
	"containerd-shim-runc-v2": {what: "the container that it keeps", fix: fixKeeper, keeper: true},
}

// maxShown bounds how many of one engine are shown.
const maxShown = 3

// dockerScope is what the system manager calls the cgroup of a container of docker.
var dockerScope = regexp.MustCompile(`^docker-[0-9a-f]{64}\.scope$`)

// covered says whether a cgroup is selected, by a path or for the sake of a daemon.
type covered struct {
	selections []cgroupsel.Selection
	followed   cgroupsel.Followed
}

func (c *covered) has(cgroup string) bool {
	if slices.ContainsFunc(c.followed.Cgroups, func(p string) bool { return within(cgroup, p) }) {
		return true
	}
	for name := range strings.SplitSeq(cgroup, "/") {
		if c.followed.Containers && dockerScope.MatchString(name) {
			return true
		}
	}
	return cgroupsel.Selects(c.selections, cgroup)
}

// others looks at the engines among some processes.
func others(pids []int, c *covered) (results []doctor.Result) {
	shown := make(map[string]int)
	for _, pid := range pids {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			continue
		}
		name := path.Base(strings.TrimSuffix(exe, " (deleted)"))
		e, ok := engines[name]
		if !ok || shown[name] >= maxShown || ofDocker(pid) {
			continue
		}
		for _, cgroup := range e.cgroups(pid) {
			r := doctor.Result{Name: name, State: doctor.OK, What: fmt.Sprintf("%s (process %d): %s is in cgroup %q, which is captured", name, pid, e.what, cgroup)}
			if !c.has(cgroup) {
				r.State, r.Fix = doctor.Warn, e.fix
				r.What = fmt.Sprintf("%s (process %d) is none of docker's: %s is in cgroup %q, which is not captured", name, pid, e.what, cgroup)
			}
			results = append(results, r)
			shown[name]++
		}
	}
	return results
}

// cgroups are those that count of a process.
func (e *engine) cgroups(pid int) (all []string) {
	pids := []int{pid}
	if e.keeper {
		text, _ := readSome(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
		pids = nil
		for child := range strings.FieldsSeq(string(text)) {
			if n, err := strconv.Atoi(child); err == nil {
				pids = append(pids, n)
			}
		}
	}
	for _, p := range pids {
		if cgroup, err := cgroupsel.CgroupOf(p); err == nil && !slices.Contains(all, cgroup) {
			all = append(all, cgroup)
		}
	}
	return all
}

// ofDocker says whether a process is a containerd-shim of dockerd's, or of what
// BuildKit in it runs.
func ofDocker(pid int) bool {
	line, err := readSome(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	args := splitArgs(line)
	i := slices.Index(args, "-namespace")
	return i >= 0 && i+1 < len(args) && args[i+1] == "moby"
}
