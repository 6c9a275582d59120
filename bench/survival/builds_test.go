package survival_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// buildScript is what a build does with the network: six programs, one after the
// other, none told to try again.
const buildScript = `set -e; mkdir -p $D/apt/lists/partial $D/apt/cache/archives/partial; cd $D
curl -sSf -m 60 http://$H/file >file
wget -t 1 -T 60 -qO- http://$H/file | cmp - file
git clone -q http://$H/repo.git clone
echo "deb [trusted=yes] http://$H/apt ./" >apt/list
apt-get -qq -o Dir::Etc::SourceList=$D/apt/list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$D/apt/lists -o Dir::Cache=$D/apt/cache -o Acquire::http::Proxy=DIRECT -o APT::Sandbox::User=root update
curl -sSf -m 60 http://$H/file | cmp - file
git -C clone fetch -q`

// jobs are what a build host does again and again, each by workers of its own. A job
// fails as a whole.
var jobs = []struct {
	name    string
	workers int
	do      func(l *lab, d *labtest.Docker, dir string) error
}{
	{"builds by programs", 4, (*lab).runPrograms},
	{"docker pull", 1, (*lab).pull},
	{"docker build", 1, (*lab).build},
}

// TestBuilds has builds run one after the other while paths fail, some side by side:
// of programs, and of docker, whose daemon is selected with its steps.
func TestBuilds(t *testing.T) {
	seeds := 0
	if labtest.Soak() {
		seeds = 5
	}
	if n, err := strconv.Atoi(os.Getenv("CGTUN_SURVIVAL_BUILDS")); err == nil {
		seeds = n
	}
	for _, s := range settings[:3] {
		all := make([]total, len(jobs))
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s %d", s.name, seed), func(t *testing.T) {
				for i, r := range builds(t, s, uint64(seed)) {
					all[i].add(r)
				}
			})
		}
		for i := range all {
			if all[i].runs > 0 {
				t.Logf("%s: %s: %v", s.name, jobs[i].name, &all[i])
			}
		}
	}
}

// builds counts a job as a download.
func builds(t *testing.T, s setting, seed uint64) []result {
	labtest.Need(t, labtest.Tool("curl"), labtest.Tool("wget"), labtest.Tool("git"))
	l := newLab(t)
	l.serveBuilds()
	docker := l.startDocker()
	defer docker.End()
	if !s.off {
		l.start(s, directly)
	}
	rs := make([]result, len(jobs))
	over := make(chan struct{})
	var workers sync.WaitGroup
	var mu sync.Mutex
	for i, job := range jobs {
		rs[i].seed = seed
		for worker := range job.workers {
			workers.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-over:
						return
					default:
					}
					dir := filepath.Join(l.dir, fmt.Sprintf("job%d.%d.%d", i, worker, n))
					d := download{Begin: time.Now()}
					if err := job.do(l, docker, dir); err != nil {
						d.Err = err.Error()
					}
					d.End = time.Now()
					_ = os.RemoveAll(dir)
					mu.Lock()
					rs[i].downloads = append(rs[i].downloads, d)
					mu.Unlock()
				}
			})
		}
	}
	faults := l.inflict(plan(seed, lasts, false))
	close(over)
	workers.Wait()
	for i := range rs {
		rs[i].faults = faults
		for _, d := range rs[i].lost() {
			t.Logf("%s: %s failed after %v: %s: %s", s.name, jobs[i].name, d.End.Sub(d.Begin).Round(time.Millisecond), strings.TrimSpace(d.Err), rs[i].during(d))
		}
	}
	return rs
}

// run has a command end in time.
func run(cmd func(context.Context) *exec.Cmd) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := cmd(ctx).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func (l *lab) runPrograms(_ *labtest.Docker, dir string) error {
	return run(func(ctx context.Context) *exec.Cmd {
		return l.sel.In(ctx, l.machine, "sh", "-c", strings.NewReplacer("$D", dir, "$H", far+":8000").Replace(buildScript))
	})
}

const registry = far + ":5000"

// startDocker starts a daemon in the selected cgroup, and fills the registry by it.
func (l *lab) startDocker() *labtest.Docker {
	l.t.Helper()
	labtest.Need(l.t, labtest.Tool("dockerd"), labtest.Tool("docker-registry"), labtest.Tool("busybox"), labtest.Tool("iptables"), labtest.Tool("runc"), labtest.Tool("ldd"))
	dir, err := os.MkdirTemp("", "lab")
	if err == nil {
		l.t.Cleanup(func() { _ = os.RemoveAll(dir) })
		err = os.WriteFile(filepath.Join(dir, "resolv.conf"), nil, 0o644)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.server.ServeRegistry(registry, dir)
	l.in.Cgroup("sel/dockerd.service")
	l.sel = l.in.Cgroup("sel/programs") // the root of the daemon's cgroup namespace stays empty
	d := l.in.StartDocker(l.machine, l.selected, dir, "--insecure-registry", registry)
	tree := filepath.Join(dir, "tree")
	l.in.MakeImage(tree, "curl")
	script := `set -e; cd $0; tar -C tree -cf tree.tar .
mkdir app; head -c 4000000 /dev/urandom >app/one; head -c 2000000 /dev/urandom >app/two
printf 'FROM plain\nCOPY one /one\nCOPY two /two\n' >app/Dockerfile`
	l.machine.Run("sh", "-c", script, dir)
	for _, args := range [][]string{
		{"import", filepath.Join(dir, "tree.tar"), "plain"}, {"build", "-q", "-t", image, filepath.Join(dir, "app")}, {"push", "-q", image},
	} {
		if _, err := d.Try(args...); err != nil {
			l.t.Fatal(err)
		}
	}
	return d
}

const image = registry + "/app"

// pull pulls two layers that are not there any more.
func (l *lab) pull(d *labtest.Docker, _ string) error {
	for _, args := range [][]string{{"rmi", "-f", image}, {"pull", "-q", image}} {
		if err := run(func(ctx context.Context) *exec.Cmd { return d.In(ctx, d.Docker(args...)...) }); err != nil {
			return err
		}
	}
	return nil
}

// build builds an image with two steps that fetch a file each.
func (l *lab) build(d *labtest.Docker, dir string) error {
	const text = "FROM plain\nRUN curl -sSf -m 60 http://" + far + ":8000/file >file\nRUN curl -sSf -m 60 http://" + far + ":8000/file | cmp - file\n"
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)); err != nil {
		return err
	}
	return run(func(ctx context.Context) *exec.Cmd {
		return d.In(ctx, d.Docker("build", "-q", "--no-cache", "--force-rm", dir)...)
	})
}

// serveBuilds serves a file, a repository of git and one of Debian packages.
func (l *lab) serveBuilds() {
	l.t.Helper()
	dir := filepath.Join(l.dir, "www")
	l.server.Run("sh", "-c", "set -e; mkdir -p "+dir+"/apt; cd "+dir+`; head -c 3000000 /dev/urandom >file; printf 'Package: lab\nVersion: 1\nArchitecture: all\nFilename: lab.deb\nSize: 1\n' >apt/Packages
git init -q work; cp file work; git -C work add file; git -C work -c user.name=n -c user.email=e commit -q -m first
git clone -q --bare work repo.git; git -C repo.git update-server-info`)
	server := http.Server{Handler: http.FileServer(http.Dir(dir))}
	ln := l.server.Listen("tcp", far+":8000")
	labtest.Background(l.t, "serve builds", func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { _ = server.Close() })
		defer stop()
		if err := server.Serve(ln); err != http.ErrServerClosed {
			return err
		}
		return nil
	})
}
