package docker_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cgtun/cgroupsel"
	"cgtun/docker"
	"cgtun/doctor"
	"cgtun/internal/labtest"
)

// What builds and is none of docker's is told, with what captures it; and so is
// what is captured by a name.
func TestOtherEnginesAreTold(t *testing.T) {
	f := newFakes(t)
	user, container, build := f.lab.Cgroup("user"), f.lab.Cgroup("container"), f.lab.Cgroup("build")
	podman := f.startAs("podman", user, "")
	t.Setenv("FAKE_CHILD", filepath.Join(container.Dir, "cgroup.procs"))
	conmon := f.startAs("conmon", build, "")
	t.Setenv("FAKE_CHILD", "")
	dockerd := f.start(container, "", "unshare", "--net")
	said := func(p *labtest.Proc, selected ...string) doctor.Result {
		t.Helper()
		checks := docker.Checks(cgroupsel.DockerAuto, cgroupsel.Selection{Cgroups: selected})
		results := checks[0].Check(t.Context())
		i := slices.IndexFunc(results, func(r doctor.Result) bool { return strings.Contains(r.What, fmt.Sprintf("(process %d)", p.Pid)) })
		if i < 0 {
			t.Fatalf("nothing is said of process %d: %+v", p.Pid, results)
		}
		return results[i]
	}
	for _, tt := range []struct {
		name, fix string
		p         *labtest.Proc
		in        *labtest.Cgroup
	}{
		{"podman", "cgtun run -- podman build", podman, user},
		{"conmon", "[select] cgroups", conmon, container},
		{"docker", "[select] cgroups", dockerd, container},
	} {
		if r := said(tt.p); r.Name != tt.name || r.State != doctor.Warn || !strings.Contains(r.Fix, tt.fix) {
			t.Errorf("%s: %+v", tt.name, r)
		}
		if r := said(tt.p, filepath.Dir(tt.in.Path)+"/*"); r.State != doctor.OK || !strings.Contains(r.What, tt.in.Path) {
			t.Errorf("%s, selected: %+v", tt.name, r)
		}
	}
}
