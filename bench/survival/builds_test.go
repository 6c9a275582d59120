package survival_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
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

// TestBuilds has builds run one after the other, four at a time, while paths fail.
func TestBuilds(t *testing.T) {
	seeds := 0
	if labtest.Soak() {
		seeds = 5
	}
	for _, s := range settings[:3] {
		var all total
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s %d", s.name, seed), func(t *testing.T) { all.add(builds(t, s, uint64(seed))) })
		}
		if seeds > 0 {
			t.Logf("%s: builds: %v", s.name, &all)
		}
	}
}

// builds counts a build as a download.
func builds(t *testing.T, s setting, seed uint64) (r result) {
	labtest.Need(t, labtest.Tool("curl"), labtest.Tool("wget"), labtest.Tool("git"))
	l := newLab(t)
	l.serveBuilds()
	if !s.off {
		l.start(s, directly)
	}
	over := make(chan struct{})
	var workers sync.WaitGroup
	var mu sync.Mutex
	for worker := range 4 {
		workers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-over:
					return
				default:
				}
				dir := filepath.Join(l.dir, fmt.Sprintf("build%d.%d", worker, n))
				d := download{Begin: time.Now()}
				cmd := l.sel.In(context.Background(), l.machine, "sh", "-c", strings.NewReplacer("$D", dir, "$H", far+":8000").Replace(buildScript))
				if out, err := cmd.CombinedOutput(); err != nil {
					d.Err = fmt.Sprintf("%v: %s", err, out)
				}
				d.End = time.Now()
				_ = os.RemoveAll(dir)
				mu.Lock()
				r.downloads = append(r.downloads, d)
				mu.Unlock()
			}
		})
	}
	r.seed, r.faults = seed, l.inflict(plan(seed, lasts, false))
	close(over)
	workers.Wait()
	for _, d := range r.lost() {
		t.Logf("%s: a build failed after %v: %s: %s", s.name, d.End.Sub(d.Begin).Round(time.Millisecond), strings.TrimSpace(d.Err), r.during(d))
	}
	return r
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
