package cgroupsel_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cgtun/cgroupsel"
	"cgtun/doctor"
	"cgtun/internal/labtest"
)

// helperChecks runs the checks, wanting the cgroups in its arguments, and says what
// they found, a line of JSON.
func helperChecks() error {
	results := doctor.Run(context.Background(), doctor.Options{}, cgroupsel.Checks(cgroupsel.Selection{Cgroups: os.Args[1:]})...)
	text, err := json.Marshal(results)
	fmt.Println(string(text))
	return err
}

func checks(t *testing.T, before []string, in *labtest.Cgroup, cgroups ...string) map[string]doctor.Result {
	t.Helper()
	lab, h, _ := newLab(t)
	p := startBehind(t, lab, h, in, before, "checks", cgroups...)
	var results []doctor.Result
	line := p.line()
	if err := json.Unmarshal([]byte(line), &results); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	p.wait()
	byName := map[string]doctor.Result{}
	for _, r := range results {
		byName[r.Name] = r
		if (r.State == doctor.OK) != (r.Fix == "") || r.What == "" {
			t.Errorf("a result that is well has no fix, and another one has: %+v", r)
		}
	}
	return byName
}

// On a machine on which selection works the checks say so, and leave nothing.
func TestChecksFindNothingWhereSelectionWorks(t *testing.T) {
	lab := labtest.New(t)
	sel := lab.Cgroup("sel")
	got := checks(t, nil, nil, sel.Path, "/a/*/glob", "unit:x.service")
	for _, name := range []string{"cgroup2", "cgroup v1", cgroupsel.FeatureMkdir, cgroupsel.FeatureRoot, cgroupsel.FeatureGate, "selected cgroups"} {
		if r, ok := got[name]; !ok || r.State != doctor.OK {
			t.Errorf("%s: %+v", name, r)
		}
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(sel.Dir)), ".cgtun-doctor-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestChecksNameMissingCgroups(t *testing.T) {
	lab := labtest.New(t)
	sel := lab.Cgroup("sel")
	got := checks(t, nil, nil, sel.Path, sel.Path+"/none")["selected cgroups"]
	if got.State != doctor.Warn || !strings.Contains(got.What, sel.Path+"/none: not there") || got.Fix != "set create = true in [select]" {
		t.Errorf("%+v", got)
	}
}

// In a pid namespace of its own cgtun selects at home, and no more.
func TestChecksNameThePIDNamespace(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	got := checks(t, []string{"unshare", "--pid", "--fork", "--mount-proc"}, nil)
	if r := got[cgroupsel.FeatureTasks]; r.State != doctor.Warn || !strings.Contains(r.What, "other network namespaces") || !strings.Contains(r.Fix, "--pid=host") {
		t.Errorf("%s: %+v", cgroupsel.FeatureTasks, r)
	}
	if r := got[cgroupsel.FeatureRoot]; r.State != doctor.OK {
		t.Errorf("%s: %+v", cgroupsel.FeatureRoot, r)
	}
}

// A program that allows no other beside it, at what is the root for cgtun.
func TestChecksNameTheForeignProgram(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	lab := labtest.New(t)
	outer := lab.Cgroup("outer")
	attachForeign(t, outer)
	got := checks(t, []string{"unshare", "--cgroup"}, outer)
	if r := got[cgroupsel.FeatureRoot]; r.State != doctor.Warn || !strings.Contains(r.What, "found by inotify") || !strings.Contains(r.Fix, "(foreign, ") {
		t.Errorf("%s: %+v", cgroupsel.FeatureRoot, r)
	}
	if r := got["cgroup2"]; !strings.Contains(r.What, "cgroup namespace") {
		t.Errorf("cgroup2: %+v", r)
	}
}

func TestChecksWithoutCapabilities(t *testing.T) {
	labtest.Need(t, labtest.Tool("setpriv"))
	got := checks(t, []string{"setpriv", "--bounding-set", "-sys_admin,-bpf,-perfmon"}, nil)
	for _, name := range []string{cgroupsel.FeatureMkdir, cgroupsel.FeaturePerCgroup} {
		if r := got[name]; r.State != doctor.Warn || !strings.Contains(r.Fix, "CAP_BPF") {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestChecksWithoutRootSayWhatTheyDidNotLookAt(t *testing.T) {
	labtest.Need(t, labtest.Tool("setpriv"))
	got := checks(t, []string{"setpriv", "--reuid", "65534", "--clear-groups"}, nil)["BPF"]
	if got.State != doctor.Warn || got.Fix != "sudo cgtun doctor" {
		t.Errorf("%+v", got)
	}
}
