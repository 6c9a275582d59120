package cgroupsel_test

import (
	"encoding/json"
	"os"
	"path"
	"path/filepath"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

func asJSON(t *testing.T, o cgroupsel.Options) string {
	t.Helper()
	for i := range o.Selections {
		if o.Selections[i].Mark == 0 {
			o.Selections[i].Mark, o.Selections[i].Mask = testMark, 0xff
		}
	}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// cgtun is started in the cgroup that it is to select.
func TestOwnSocketsAreNeverMarked(t *testing.T) {
	for _, tt := range []struct {
		name    string
		start   string // below the selected one
		without []string
	}{
		{"in the selected cgroup", "", nil},
		{"in a child of it", "/child", nil},
		{"with programs on each cgroup", "", []string{cgroupsel.FeatureRoot}},
		{"without BPF", "", []string{cgroupsel.FeatureMkdir, cgroupsel.FeaturePerCgroup}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab, h, m := newLab(t)
			sel := lab.Cgroup("sel")
			start := lab.Cgroup("sel" + tt.start)
			opts := asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{sel.Path}}}, Instance: "own", Without: tt.without})
			p := startHelper(t, lab, h, start, "select", opts)
			say := p.told()
			own := start.Path + "/.cgtun-own"
			if !say.IsSelf || say.Self.Path != own {
				t.Fatalf("own cgroup: %+v, want %s", say.Self, own)
			}
			if got, _ := cgroupsel.CgroupOf(p.proc.Pid); got != own {
				t.Errorf("it is in %s, want %s", got, own)
			}
			p.tell("send")
			if got := p.line(); got != "sent" {
				t.Fatal(got)
			}
			m.want(1, false, "own sockets")
			send(t, lab, h, start)
			m.want(1, tt.without == nil || len(tt.without) == 1, "its neighbour")

			p.tell("end")
			p.wait()
			if _, err := os.Stat(filepath.Join(start.Dir, ".cgtun-own")); !os.IsNotExist(err) {
				t.Errorf("own cgroup is still there: %v", err)
			}
			send(t, lab, h, start)
			m.want(1, false, "after the end")
		})
	}
}

func TestSelfTellsOnlyWhatMaybeExempt(t *testing.T) {
	lab, h, _ := newLab(t)
	away := lab.Cgroup("away")
	lab.Cgroup("away/sel")
	other := lab.Cgroup("other")
	for _, tt := range []struct {
		name   string
		start  *labtest.Cgroup
		isSelf bool
	}{
		{"beside the selected cgroup", other, true},
		{"above it: an exemption would hold for it too", away, false},
		{"at the root", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startHelper(t, lab, h, tt.start, "select", asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{away.Path + "/sel"}}}, Instance: "self"}))
			say := p.told()
			if say.IsSelf != tt.isSelf || (tt.isSelf && say.Self.ID != tt.start.ID) {
				t.Errorf("self: %v %+v", say.IsSelf, say.Self)
			}
			p.tell("end")
			p.wait()
		})
	}
}

// A killed instance leaves its own cgroup and those that it made; nothing
// selects any more. The next start takes them over, cleanup removes them.
func TestAfterKillNothingSelects(t *testing.T) {
	lab, h, m := newLab(t)
	top := lab.Cgroup("top")
	name := top.Path + "/made/sel"
	opts := asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{name}, Create: true}}, Instance: "killed"})
	p := startHelper(t, lab, h, nil, "select", opts)
	p.told()
	sel := lab.Cgroup("top/made/sel")
	send(t, lab, h, sel)
	m.want(1, true, "while it lives")
	p.kill()
	// The kernel lets go of a dead process's links in the background.
	labtest.Eventually(t, 5*time.Second, func() bool {
		send(t, lab, h, sel)
		return m.read()["udp4_no"] == 1
	}, "still marked after the kill")
	send(t, lab, h, sel)
	m.want(1, false, "after the kill")

	again := startHelper(t, lab, h, nil, "select", opts)
	again.told()
	again.kill()
	wantFound(t, "killed", path.Dir(name), name)
	removed, err := cgroupsel.Remove("killed")
	if err != nil || len(removed) != 2 {
		t.Errorf("removed %q, %v, want both", removed, err)
	}
	wantFound(t, "killed")
}

func wantFound(t *testing.T, instance string, want ...string) {
	t.Helper()
	found, err := cgroupsel.Find(instance)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range found {
		got = append(got, l.Path)
	}
	if len(got) != len(want) {
		t.Fatalf("found %q, want %q", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("found %q, want %q", got, want)
		}
	}
}

// `ip netns exec` shows a fresh /sys, with no cgroup2 in it.
func TestStartedThroughIPNetnsExec(t *testing.T) {
	lab, h, m := newLab(t)
	top := lab.Cgroup("top")
	name := top.Path + "/sel"
	opts := asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{name}, Create: true}}, Instance: "exec"})
	before := cgroupMounts(t)
	p := startBehind(t, lab, h, nil, []string{"ip", "netns", "exec", h.Name}, "select", opts)
	say := p.told()
	if say.Error != "" || say.Path != name {
		t.Errorf("it says %+v", say)
	}
	sel := lab.Cgroup("top/sel")
	send(t, lab, h, sel)
	m.want(1, true, "selected")
	p.tell("end")
	p.wait()
	if after := cgroupMounts(t); after != before {
		t.Errorf("cgroup2 mounts were\n%s and are\n%s", before, after)
	}
	if _, err := os.Stat(sel.Dir); !os.IsNotExist(err) {
		t.Errorf("what it made is still there: %v", err)
	}
}

// In a cgroup namespace the same path is another cgroup.
func TestStartedInCgroupNamespace(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	lab, h, m := newLab(t)
	outer := lab.Cgroup("outer")
	opts := asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/sel"}, Create: true}}, Instance: "ns"})
	p := startBehind(t, lab, h, outer, []string{"unshare", "--cgroup"}, "select", opts)
	say := p.told()
	if say.Error != "" || say.Path != "/sel" || say.Cgroups[0].Level != 1 {
		t.Errorf("it says %+v", say)
	}
	again := filepath.Join(outer.Dir, "sel")
	removeDir(t, again)
	sel := lab.Cgroup("outer/sel")
	send(t, lab, h, sel)
	m.want(1, true, "made again inside")
	send(t, lab, h, outer)
	m.want(1, false, "its parent")
	p.tell("end")
	p.wait()
}

// All of a cgroup namespace can be selected, cgtun in it.
func TestRootOfCgroupNamespaceIsSelected(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	lab, h, m := newLab(t)
	outer := lab.Cgroup("outer")
	older := lab.Cgroup("outer/older")
	p := startBehind(t, lab, h, outer, []string{"unshare", "--cgroup"}, "select", asJSON(t, cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{"/"}}}, Instance: "all"}))
	say := p.told()
	if say.Error != "" || say.Self.Path != "/.cgtun-all" || say.Cgroups[0].Level != 0 {
		t.Errorf("it says %+v", say)
	}
	send(t, lab, h, outer)
	m.want(1, true, "in the root")
	send(t, lab, h, older)
	m.want(1, true, "in an older child")
	send(t, lab, h, lab.Cgroup("outer/younger"))
	m.want(1, true, "in a younger child")
	p.tell("send")
	p.line()
	m.want(1, false, "own sockets")
	p.tell("end")
	p.wait()
}

func cgroupMounts(t *testing.T) string {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mounts, err := cgroupsel.ParseMounts(f)
	if err != nil {
		t.Fatal(err)
	}
	var text string
	for _, m := range mounts {
		text += m.String() + "\n"
	}
	return text
}
