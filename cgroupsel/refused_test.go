package cgroupsel_test

import (
	"errors"
	"os"
	"slices"
	"testing"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// Without the capabilities for BPF the picture is still told, and who is
// missed is said.
func TestWithoutCapabilitiesItSaysWhatIsLost(t *testing.T) {
	labtest.Need(t, labtest.Tool("setpriv"))
	lab, h, m := newLab(t)
	sel := lab.Cgroup("sel")
	opts := asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}, Instance: "caps"})
	p := startBehind(t, lab, h, nil, []string{"setpriv", "--bounding-set", "-sys_admin,-bpf,-perfmon"}, "select", opts)
	say := p.told()
	if want := (cgroupsel.Cgroup{Path: sel.Path, ID: sel.ID, Level: level(sel), Present: true}); say.Cgroups[0] != want {
		t.Errorf("it sees %+v, want %+v", say.Cgroups[0], want)
	}
	for _, name := range []string{cgroupsel.FeatureMkdir, cgroupsel.FeaturePerCgroup} {
		if !slices.Contains(say.Missing, name) {
			t.Errorf("it misses %q, want %q among them", say.Missing, name)
		}
	}
	send(t, lab, h, sel)
	m.want(1, false, "nothing marks")
	p.tell("end")
	p.wait()
}

// A foreign program that allows no second one below it keeps ours out.
func TestForeignProgramThatAllowsNoOtherIsNamed(t *testing.T) {
	lab, h, m := newLab(t)
	sel := lab.Cgroup("sel")
	attachForeign(t, sel)
	s := newSelector(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}, Instance: "foreign", Without: []string{cgroupsel.FeatureRoot}})
	features := s.Features()
	last := features[len(features)-1]
	if last.Name != cgroupsel.FeaturePerCgroup || last.Err == nil || !errors.Is(last.Err, os.ErrPermission) {
		t.Errorf("feature %s: %v, want a refusal", last.Name, last.Err)
	}
	send(t, lab, h, sel)
	m.want(1, false, "nothing marks")
}

// attachForeign attaches a program that allows everything to a cgroup, as one
// did before there were links: with no flags, so alone.
func attachForeign(t *testing.T, c *labtest.Cgroup) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.CGroupSock, AttachType: ebpf.AttachCGroupInetSockCreate,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}, License: "MIT",
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	dir, err := os.Open(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	// It goes with the cgroup.
	err = link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInetSockCreate})
	if err != nil {
		t.Fatal(err)
	}
}
