package docker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"cgtun/cgroupsel"
	"cgtun/doctor"
)

// askTime is how long a check waits for a daemon's answer.
const askTime = time.Second

// Checks looks at the docker daemons of this machine, and at what else builds and
// keeps containers: what of them is captured, by mode or by the selections, and
// what is not.
func Checks(mode cgroupsel.Docker, selections ...cgroupsel.Selection) []doctor.Named {
	return []doctor.Named{{Name: "docker", Check: func(ctx context.Context) []doctor.Result { return check(ctx, mode, selections) }}}
}

func check(ctx context.Context, mode cgroupsel.Docker, selections []cgroupsel.Selection) []doctor.Result {
	const name = "docker"
	if os.Geteuid() != 0 {
		return []doctor.Result{{Name: name, State: doctor.Warn, What: "not looked at: that needs root", Fix: "sudo cgtun doctor"}}
	}
	var results []doctor.Result
	var daemons []Daemon
	foreign := make(map[int]*otherError)
	pids := processes()
	for _, pid := range pids {
		d, err := examine(pid)
		var other *otherError
		switch {
		case errors.As(err, &other):
			foreign[pid] = other
		case err == nil && mode != cgroupsel.DockerOff:
			results = append(results, about(ctx, &d, mode)...)
			daemons = append(daemons, d)
		}
	}
	c := &covered{selections: selections, followed: Follow(daemons, 0, mode)}
	for _, pid := range slices.Sorted(maps.Keys(foreign)) {
		results = append(results, aboutForeign(pid, foreign[pid], c))
	}
	switch {
	case mode == cgroupsel.DockerOff:
		results = append(results, doctor.Result{Name: name, State: doctor.OK, What: "select.docker is false: nothing of docker is captured by it"})
	case len(results) == 0:
		results = append(results, doctor.Result{Name: name, State: doctor.OK, What: "no docker daemon runs in this network namespace; one that starts is captured"})
	}
	return append(results, others(pids, c)...)
}

// aboutForeign says what of a daemon is captured that is not ours to select.
func aboutForeign(pid int, why *otherError, c *covered) doctor.Result {
	const name = "docker"
	if cgroup, err := cgroupsel.CgroupOf(pid); err == nil && c.has(cgroup) {
		return doctor.Result{Name: name, State: doctor.OK, What: fmt.Sprintf("dockerd (process %d) is in cgroup %q, which is captured, with all that it does below it", pid, cgroup)}
	}
	return doctor.Result{Name: name, State: doctor.Warn, What: why.what, Fix: why.fix}
}

// about says what of a daemon is captured.
func about(ctx context.Context, d *Daemon, mode cgroupsel.Docker) []doctor.Result {
	const name = "docker"
	limited, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	a, err := ask(limited, d.PID)
	if d.Silent = err != nil; !d.Silent {
		d.Version = a.Version
		d.API, _ = a.api()
	}
	if err := d.Uncovered(); err != nil {
		return []doctor.Result{{Name: name, State: doctor.Warn, What: err.Error(), Fix: "start dockerd as a service, or in a cgroup of its own: systemctl start docker"}}
	}
	who := fmt.Sprintf("dockerd (process %d) in cgroup %q", d.PID, d.Cgroup)
	if d.Version != "" {
		who = fmt.Sprintf("dockerd %.64q (process %d) in cgroup %q", d.Version, d.PID, d.Cgroup)
	}
	what := who + ": its pulls and all its containers are captured"
	if !d.All(mode) {
		what = who + ": its pulls and the steps of BuildKit are captured; the classic builder (DOCKER_BUILDKIT=0) cannot be told from any container, and is not: docker = true takes all"
	}
	return []doctor.Result{
		{Name: name, State: doctor.OK, What: what},
		{Name: "docker client", State: doctor.OK, What: "docker build asks registries for tokens itself, outside of what is captured: where that fails, cgtun run -- docker build …"},
	}
}
