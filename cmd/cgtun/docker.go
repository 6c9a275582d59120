package main

import (
	"cmp"
	"context"
	"slices"
	"time"

	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
	"cgtun/docker"
)

// dockerTime is how long a start waits for the docker daemons that are there.
const dockerTime = 2 * time.Second

// dockerMode is that of the first route which selects anything of docker.
func dockerMode(routes []config.Route) cgroupsel.Docker {
	for _, r := range routes {
		if r.Select.Docker != cgroupsel.DockerOff {
			return r.Select.Docker
		}
	}
	return cgroupsel.DockerOff
}

func (in *instance) scanDocker(ctx context.Context) []docker.Daemon {
	ctx, cancel := context.WithTimeout(ctx, dockerTime)
	defer cancel()
	return in.docker.Scan(ctx)
}

// followed is what the routes select of docker daemons. Where two name the same,
// the first one has it.
func (in *instance) followed(daemons []docker.Daemon) []cgroupsel.Followed {
	all := make([]cgroupsel.Followed, len(in.routes()))
	for i, r := range in.routes() {
		all[i] = docker.Follow(daemons, i, r.Select.Docker)
	}
	return all
}

// followDocker selects what there is of docker now.
func (in *instance) followDocker(daemons []docker.Daemon) {
	for i := range daemons {
		if err := daemons[i].Uncovered(); err != nil {
			in.log.Warn("a docker daemon is not captured as a whole", "err", err)
		}
	}
	if err := in.selector.Follow(in.followed(daemons)); err != nil {
		in.log.Warn("a docker daemon is not captured as a whole", "err", err)
	}
}

// dockerStatus shows the daemons as the first route has them that selects any of
// them.
func (in *instance) dockerStatus() (list control.List[control.DockerStatus]) {
	if in.docker == nil {
		return nil
	}
	mode := dockerMode(in.routes())
	for _, d := range in.docker.Daemons() {
		s := control.DockerStatus{
			PID: d.PID, Version: control.Text(d.Version), Cgroup: d.Cgroup, Running: !d.Ended,
			Selects: "builds", Cgroups: d.Cgroups(mode),
		}
		if d.All(mode) {
			s.Selects = "all"
		}
		if err := d.Uncovered(); err != nil && !d.Ended {
			s.Error = control.Text(err.Error())
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b control.DockerStatus) int { return cmp.Compare(a.PID, b.PID) })
	return list
}
