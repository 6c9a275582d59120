package docker_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/docker"
	"cgtun/internal/labtest"
)

// fakes are programs called dockerd that the tests run.
type fakes struct {
	t   *testing.T
	lab *labtest.Lab
	dir string
	// networks is what those answer that are started from now on.
	networks string
}

func newFakes(t *testing.T) *fakes {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("unshare"), labtest.Tool("setpriv"))
	f := &fakes{t: t, lab: labtest.New(t), dir: t.TempDir()}
	if err := os.Chmod(f.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(f.program(), text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fakes) program() string { return filepath.Join(f.dir, "dockerd") }

// start starts one in a cgroup, behind the words of before. answer is what it
// answers; "": it listens nowhere.
func (f *fakes) start(c *labtest.Cgroup, answer string, before ...string) *labtest.Proc {
	f.t.Helper()
	return f.startAs("dockerd", c, answer, before...)
}

// startAs starts another program, by its name.
func (f *fakes) startAs(name string, c *labtest.Cgroup, answer string, before ...string) *labtest.Proc {
	f.t.Helper()
	program := filepath.Join(f.dir, name)
	if name != "dockerd" {
		if err := os.Link(f.program(), program); err != nil {
			f.t.Fatal(err)
		}
	}
	words := slices.Concat(before, []string{program, "--cgroup-parent", "/par"})
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Env = append(os.Environ(), fakeEnv+"=1", "FAKE_ANSWER="+answer, "FAKE_NETWORKS="+f.networks)
	if answer != "" {
		cmd.Env = append(cmd.Env, "FAKE_SOCKET="+filepath.Join(f.t.TempDir(), "s.sock"))
	}
	p := f.lab.StartCommand(c.Command(cmd))
	p.WaitOutput("ready", 20*time.Second)
	return p
}

const (
	old20 = `{"Version":"20.10.24+dfsg1","ApiVersion":"1.41"}`
	new27 = `{"Version":"27.5.1","ApiVersion":"1.47"}`
)

// of finds a daemon in the picture by its process.
func of(all []docker.Daemon, p *labtest.Proc) *docker.Daemon {
	for i := range all {
		if all[i].PID == p.Pid {
			return &all[i]
		}
	}
	return nil
}

// inside are the words that start one in a cgroup namespace of its own, whose root
// is the cgroup that it is started in, and then in another cgroup.
func inside(c *labtest.Cgroup) []string {
	return []string{"unshare", "--cgroup", "sh", "-c", `echo $$ > "$0" && exec "$@"`, filepath.Join(c.Dir, "cgroup.procs")}
}

// kill ends one.
func kill(p *labtest.Proc) {
	p.Signal(syscall.SIGKILL)
	_ = p.Wait()
}

// run runs a Finder until the test ends.
func run(t *testing.T) *docker.Finder {
	t.Helper()
	f := docker.NewFinder(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx, func([]docker.Daemon) {}) }()
	t.Cleanup(func() { cancel(); <-done })
	return f
}

// A daemon is found when it starts and when it was there before, says what it
// is, and keeps what it had when it is killed, until the next one answers.
func TestDaemonIsFoundAndFoundAgain(t *testing.T) {
	f := newFakes(t)
	c := f.lab.Cgroup("service")
	first := f.start(c, old20)
	finder := docker.NewFinder(nil)
	all := finder.Scan(t.Context())
	if d := of(all, first); d == nil || d.Version != "20.10.24+dfsg1" || d.Cgroup != c.Path || d.Root != "/" || d.Parent != "/par" {
		t.Fatalf("a scan finds %+v", all)
	}
	finder = run(t)
	wait := func(what string, p *labtest.Proc, ok func(*docker.Daemon) bool) {
		t.Helper()
		labtest.Eventually(t, 20*time.Second, func() bool { return ok(of(finder.Daemons(), p)) }, what)
	}
	wait("it is there", first, func(d *docker.Daemon) bool { return d != nil && d.API == [2]int{1, 41} })
	first.Signal(syscall.SIGKILL)
	_ = first.Wait()
	wait("it has ended and is kept", first, func(d *docker.Daemon) bool { return d != nil && d.Ended })
	begin := time.Now()
	second := f.start(c, new27)
	wait("the next one is there, as the one before", second, func(d *docker.Daemon) bool { return d != nil })
	wait("it answers", second, func(d *docker.Daemon) bool { return d != nil && d.API == [2]int{1, 47} })
	t.Logf("a daemon was found and had answered %v after its start", time.Since(begin))
	wait("the first is forgotten", first, func(d *docker.Daemon) bool { return d == nil })
	// One that cannot start is nothing.
	failed := f.start(c, "")
	wait("it is seen", failed, func(d *docker.Daemon) bool { return d != nil })
	failed.Signal(syscall.SIGKILL)
	_ = failed.Wait()
	wait("it is not kept", failed, func(d *docker.Daemon) bool { return d == nil })
	wait("the other is", second, func(d *docker.Daemon) bool { return d != nil && !d.Ended })
}

// What only says that it is a daemon selects nothing.
func TestFakeDaemonsSelectNothing(t *testing.T) {
	f := newFakes(t)
	c := f.lab.Cgroup("fake")
	finder := run(t)
	for name, before := range map[string][]string{
		"of another user":              {"setpriv", "--reuid=65534", "--clear-groups"},
		"with another real user":       {"setpriv", "--ruid=65534"},
		"in another network namespace": {"unshare", "--net"},
	} {
		p := f.start(c, "", before...)
		real := f.start(f.lab.Cgroup("real"), new27)
		labtest.Eventually(t, 20*time.Second, func() bool { return of(finder.Daemons(), real) != nil })
		if d := of(finder.Daemons(), p); d != nil {
			t.Errorf("one %s is believed: %+v", name, d)
		}
		for _, p := range []*labtest.Proc{p, real} {
			p.Signal(syscall.SIGKILL)
			_ = p.Wait()
		}
	}
	// The name alone, by which the kernel tells of it.
	cmd := exec.Command("sh", "-c", `ln -s "$(command -v sleep)" "$0/x/dockerd" && exec "$0/x/dockerd" 60`, f.dir)
	if err := os.Mkdir(filepath.Join(f.dir, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := f.lab.StartCommand(c.Command(cmd))
	real := f.start(f.lab.Cgroup("real"), new27)
	labtest.Eventually(t, 20*time.Second, func() bool { return of(finder.Daemons(), real) != nil })
	if d := of(finder.Daemons(), p); d != nil {
		t.Errorf("another program of that name is believed: %+v", d)
	}
}

// Only what is below the root of its cgroup namespace is believed of a daemon.
func TestDaemonInACgroupNamespaceHasThatAlone(t *testing.T) {
	f := newFakes(t)
	root := f.lab.Cgroup("c")
	service := f.lab.Cgroup("c/service")
	p := f.start(root, new27, inside(service)...)
	all := docker.NewFinder(nil).Scan(t.Context())
	d := of(all, p)
	if d == nil || d.Root != root.Path || d.Cgroup != service.Path {
		t.Fatalf("a scan finds %+v, want root %s", d, root.Path)
	}
	got := docker.Follow([]docker.Daemon{*d}, 3, cgroupsel.DockerBuilds)
	want := []string{root.Path + "/docker/buildx", root.Path + "/par/buildkit", service.Path}
	if !slices.Equal(got.Cgroups, want) || got.Steps || got.Containers || got.Selection != 3 {
		t.Errorf("it selects %+v, want %v", got, want)
	}
	out := f.start(service, new27, inside(root)...)
	if d := of(docker.NewFinder(nil).Scan(t.Context()), out); d != nil {
		t.Errorf("one outside of its cgroup namespace is believed: %+v", d)
	}
}

// What is in a container takes nothing from the daemon that keeps it: neither its
// place while it is away, nor that of its successor.
func TestDaemonsInContainersTakeNothingFromTheirKeeper(t *testing.T) {
	f := newFakes(t)
	host, container := f.lab.Cgroup("service"), f.lab.Cgroup("container")
	real := f.start(host, new27)
	finder := run(t)
	labtest.Eventually(t, 20*time.Second, func() bool { d := of(finder.Daemons(), real); return d != nil && d.Version != "" })
	kill(real)
	labtest.Eventually(t, 20*time.Second, func() bool { d := of(finder.Daemons(), real); return d != nil && d.Ended })
	for i := range docker.MaxDaemons {
		p := f.start(container, old20, inside(f.lab.Cgroup(fmt.Sprintf("container/%d", i)))...)
		labtest.Eventually(t, 20*time.Second, func() bool {
			d := of(finder.Daemons(), p)
			return d != nil && d.Version != "" || len(finder.Daemons()) == docker.MaxDaemons
		}, "%d is seen", i)
	}
	if d := of(finder.Daemons(), real); d == nil || !d.Ended {
		t.Fatalf("the daemon that ended is not kept: %+v", finder.Daemons())
	}
	next := f.start(host, new27)
	labtest.Eventually(t, 20*time.Second, func() bool {
		all := finder.Daemons()
		return of(all, next) != nil && of(all, real) == nil
	}, "the next one takes its place")
}

func TestWhatIsSelectedOfADaemon(t *testing.T) {
	service := docker.Daemon{Cgroup: "/system.slice/docker.service", Root: "/"}
	v20, v27, silent := [2]int{1, 41}, [2]int{1, 47}, true
	for _, tt := range []struct {
		name   string
		mode   cgroupsel.Docker
		api    [2]int
		silent bool
		edit   func(*docker.Daemon)
		want   string // paths and ways
	}{
		{name: "off", mode: cgroupsel.DockerOff, api: v27, want: ""},
		{name: "builds", mode: cgroupsel.DockerBuilds, api: v20, want: "/docker/buildkit /docker/buildx /system.slice/docker.service steps"},
		{name: "all", mode: cgroupsel.DockerAll, api: v27, want: "/docker /system.slice/docker.service steps containers"},
		{name: "auto with an old one", mode: cgroupsel.DockerAuto, api: v20, want: "/docker /system.slice/docker.service steps containers"},
		{name: "auto with 23", mode: cgroupsel.DockerAuto, api: [2]int{1, 42}, want: "/docker/buildkit /docker/buildx /system.slice/docker.service steps"},
		{name: "auto before it answers", mode: cgroupsel.DockerAuto, want: "/docker/buildkit /docker/buildx /system.slice/docker.service steps"},
		{name: "auto when it does not answer", mode: cgroupsel.DockerAuto, silent: silent, want: "/docker /system.slice/docker.service steps containers"},
		{name: "a parent", mode: cgroupsel.DockerBuilds, api: v27, edit: func(d *docker.Daemon) { d.Parent = "/ci/x" }, want: "/ci/x/buildkit /docker/buildx /system.slice/docker.service steps"},
		{name: "a parent without a slash", mode: cgroupsel.DockerAll, edit: func(d *docker.Daemon) { d.Parent = "ci" }, want: "/ci /docker/buildx /system.slice/ci /system.slice/docker.service steps containers"},
		{name: "a parent that leads out", mode: cgroupsel.DockerAll, edit: func(d *docker.Daemon) { d.Parent, d.Root, d.Cgroup = "/../../x", "/c", "/c/d" }, want: "/c/d /c/docker/buildx /c/x"},
		{name: "the root as a parent", mode: cgroupsel.DockerAll, edit: func(d *docker.Daemon) { d.Parent = "/" }, want: "/docker/buildx /system.slice/docker.service steps containers"},
		{name: "a slice as a parent", mode: cgroupsel.DockerAll, edit: func(d *docker.Daemon) { d.Parent = "ci.slice" }, want: "/system.slice/docker.service steps containers"},
		{name: "in the root", mode: cgroupsel.DockerBuilds, edit: func(d *docker.Daemon) { d.Cgroup = "/" }, want: "/docker/buildkit /docker/buildx steps"},
		{name: "in the root of its namespace", mode: cgroupsel.DockerBuilds, edit: func(d *docker.Daemon) { d.Cgroup, d.Root = "/c", "/c" }, want: "/c/docker/buildkit /c/docker/buildx"},
	} {
		d := service
		d.API, d.Silent = tt.api, tt.silent
		if tt.edit != nil {
			tt.edit(&d)
		}
		f := docker.Follow([]docker.Daemon{d}, 0, tt.mode)
		got := f.Cgroups
		if f.Steps {
			got = append(got, "steps")
		}
		if f.Containers {
			got = append(got, "containers")
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, got, tt.want)
		}
	}
}

func TestSocketsAndFlagsAreRead(t *testing.T) {
	text := `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 24703 /run/docker.sock
0000000000000000: 00000003 00000000 00000000 0001 03    47 /run/docker.sock
0000000000000000: 00000002 00000000 00010000 0001 01    48 @abstract
0000000000000000: 00000002 00000000 00010000 0001 01    49
0000000000000000: 00000002 00000000 00010000 0001 01 50 /run/other.sock
short
`
	has := map[string]bool{"24703": true, "47": true, "48": true, "49": true}
	if got := docker.Listening([]byte(text), has); !slices.Equal(got, []string{"/run/docker.sock"}) {
		t.Errorf("listening: %q", got)
	}
	args := []string{"dockerd", "--cgroup-parent=/a", "--cgroup-parent", "/b", "--config-file"}
	if got := docker.FlagOf(args, "cgroup-parent"); got != "/b" {
		t.Errorf("the last flag is %q", got)
	}
	if got := docker.FlagOf(args, "config-file"); got != "" {
		t.Errorf("a flag without a value is %q", got)
	}
}
