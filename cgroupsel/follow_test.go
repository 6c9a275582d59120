package cgroupsel_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// What is followed is selected at once with all that is there and comes later,
// and unselected as a whole when it is followed no more.
func TestFollowedPathsComeAndGo(t *testing.T) {
	lab, h, m := newLab(t)
	was := lab.Cgroup("d/was")
	o := cgroupsel.Options{Selections: []cgroupsel.Selection{{Cgroups: []string{lab.Cgroup("plain").Path}}, {Mark: 0x66, Mask: 0xff}}, Follows: true}
	s := newSelector(t, o)
	fullySelected(t, s)
	send(t, lab, h, was)
	m.want(1, false, "before it is followed")
	follow := func(all ...cgroupsel.Followed) {
		t.Helper()
		if err := s.Follow(all); err != nil {
			t.Fatal(err)
		}
	}
	d := lab.Cgroup("d")
	follow(cgroupsel.Followed{Cgroups: []string{d.Path, d.Path + "/later/deep"}}, cgroupsel.Followed{Selection: 1, Cgroups: []string{d.Path}})
	send(t, lab, h, was)
	m.want(1, true, "what was there before")
	bornIn(t, h, d.Dir+"/born")
	m.want(1, true, "what is made in it")
	if !selected(s, d.Path+"/x") || selected(s, d.Path+"x") {
		t.Error("by path it is not what the kernel says")
	}
	follow(cgroupsel.Followed{Selection: 1, Cgroups: []string{d.Path + "/later"}})
	send(t, lab, h, was)
	m.want(1, false, "followed no more")
	// What was removed goes with the kernel's own end of it.
	alone := func() bool { return len(s.SelectedIDs()) == 1 }
	labtest.Eventually(t, 10*time.Second, alone, "the plain one alone is selected")
	if got, _ := s.SelectedBy(lab.Cgroup("d/later/x").ID); got != 1 {
		t.Errorf("another selection's is of selection %d", got)
	}
	follow()
	labtest.Eventually(t, 10*time.Second, alone, "the plain one alone is selected")
}

// The picture has what is followed and there, and Run tells of it.
func TestSnapshotShowsWhatIsFollowed(t *testing.T) {
	lab, _, _ := newLab(t)
	s := newSelector(t, cgroupsel.Options{Selections: one(lab.Cgroup("plain").Path), Follows: true})
	ctx, cancel := context.WithCancel(t.Context())
	pictures := make(chan cgroupsel.Snapshot, 100)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(now cgroupsel.Snapshot) { pictures <- now }) }()
	defer func() { cancel(); <-done }()
	d := lab.Cgroup("d")
	if err := s.Follow([]cgroupsel.Followed{{Cgroups: []string{d.Path, d.Path + "/missing"}}}); err != nil {
		t.Fatal(err)
	}
	waitFor := func(want string) {
		t.Helper()
		labtest.Eventually(t, 10*time.Second, func() bool {
			var got []string
			for _, c := range s.Snapshot().Cgroups {
				if c.Followed {
					got = append(got, strings.TrimPrefix(c.Path, d.Path))
				}
			}
			return strings.Join(got, " ") == want
		}, "the picture has %q", want)
	}
	waitFor("")
	missing := lab.Cgroup("d/missing")
	waitFor(" /missing")
	_ = os.Remove(missing.Dir)
	waitFor("")
}

// What another instance selects is left out, and said; so is what cgtun is in.
func TestFollowedPathsOfOthersAreLeftOut(t *testing.T) {
	lab, _, _ := newLab(t)
	a, b := lab.Cgroup("a"), lab.Cgroup("b")
	newSelector(t, cgroupsel.Options{Selections: one(a.Path), Instance: "first"})
	s := newSelector(t, cgroupsel.Options{Selections: one(lab.Cgroup("c").Path), Instance: "second", Follows: true})
	err := s.Follow([]cgroupsel.Followed{{Cgroups: []string{a.Path + "/in", b.Path, "/", "relative"}}})
	var taken *cgroupsel.TakenError
	if !errors.As(err, &taken) || taken.Instance != "first" {
		t.Errorf("follow: %v, want that the first instance has it", err)
	}
	if selected(s, a.Path+"/in") || !selected(s, b.Path) || selected(s, "/other") {
		t.Error("the rest is not selected, or too much is")
	}
}

// ids of a container and of a step of BuildKit.
var (
	containerID = strings.Repeat("0a", 32)
	stepID      = strings.Repeat("z1k", 8) + "q"
)

var scopes = []struct {
	path              string
	containers, steps bool
}{
	{"/system.slice/docker-" + containerID + ".scope", true, false},
	{"/system.slice/docker-" + containerID + ".scope/init", true, false},
	{"/a.slice/a-b.slice/docker-" + containerID + ".scope", true, false},
	{"/system.slice/docker-" + containerID[1:] + ".scope", false, false},
	{"/system.slice/docker-" + containerID + "0.scope", false, false},
	{"/system.slice/docker-" + containerID + ".service", false, false},
	{"/system.slice/docker-" + strings.Repeat("-", 64) + ".scope", false, false},
	{"/user/docker-" + containerID + ".scope", false, false},
	{"/system.slice/docker.service", false, false},
	{"/system.slice/xdocker-" + containerID + ".scope", false, false},
	{"/system.slice/system.slice:docker:" + stepID, false, true},
	{"/a-b.slice:docker:" + stepID, false, true},
	{"/system.slice/system.slice:docker:" + stepID + "0", false, false},
	{"/system.slice/system.slice:dockers:" + stepID, false, false},
	{"/system.slice/nginx.service", false, false},
}

// Of what the system manager makes, only docker's own is selected, by user space
// and kernel alike; and nothing before somebody follows it.
func TestScopesAreFollowedByTheirNames(t *testing.T) {
	labtest.Need(t, labtest.Tool("unshare"))
	for i, f := range []cgroupsel.Followed{{}, {Containers: true}, {Steps: true}, {Containers: true, Steps: true}} {
		o := options([]string{"/other"})
		o.Follows, o.Followed, o.Instance = true, []cgroupsel.Followed{f}, "t"+containerID[:i+1]
		lab, h, m := newLab(t)
		outer := lab.Cgroup("outer")
		p := startBehind(t, lab, h, outer, []string{"unshare", "--cgroup"}, "select", asJSON(t, o))
		if say := p.told(); say.Error != "" {
			t.Errorf("it says %+v", say)
		}
		for _, tt := range scopes {
			want := f.Containers && tt.containers || f.Steps && tt.steps
			if got, _, err := cgroupsel.PickedFollowing(o, tt.path); (got == 0) != want || err != nil {
				t.Errorf("%+v: %s: by path it is of selection %d (%v)", f, tt.path, got, err)
			}
			send(t, lab, h, lab.Cgroup("outer"+tt.path))
			m.want(1, want, tt.path)
		}
		p.tell("end")
		p.wait()
	}
}

// Execs tells of each process that executes a program of that name, and of no other.
func TestExecsAreTold(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("busybox"))
	ctx, cancel := context.WithCancel(t.Context())
	ready, seen, done := make(chan struct{}), make(chan int, 100), make(chan error, 1)
	go func() {
		done <- cgroupsel.Execs(ctx, "cgtun-told", func() { close(ready) }, func(pid int) { seen <- pid })
	}()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	dir := t.TempDir()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	var want []int
	for _, name := range []string{"cgtun-tol", "cgtun-told", "cgtun-tolds", "sleep", "cgtun-told"} {
		if err := os.WriteFile(dir+"/"+name, text, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(dir + "/" + name)
		cmd.Args[0] = "true"
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if name == "cgtun-told" {
			want = append(want, cmd.Process.Pid)
		}
	}
	for _, pid := range want {
		select {
		case got := <-seen:
			if got != pid {
				t.Errorf("told of process %d, want %d", got, pid)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of process %d", pid)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	if len(seen) > 0 {
		t.Error("told of others")
	}
}
