package main_test

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cgtun/internal/netns"
	"cgtun/tun"
)

// testCost: what cgtun adds to a step, from the begin of one to that of the next,
// against the same build without it, and against one where nothing is done but that a
// tun is moved into each step's namespace. The three take turns. The bounds are wide:
// what is seen is in docs/docker.md.
func (d *dockers) testCost() {
	const rounds, steps = 12, 21
	text := "FROM " + registry + "/base\n" + strings.Repeat("RUN [\"/bin/first\"]\n", steps)
	begin := map[string]func() (end func()){
		"nothing": func() func() { return func() {} },
		"a move":  d.moveIn,
		"cgtun":   func() func() { return d.start(d.configDocker("true", second)).stop },
	}
	kinds := []string{"nothing", "a move", "cgtun"}
	for _, by := range []builder{classic, buildKit} {
		d.testParts([]part{{by.String(), func() {
			took := map[string][]time.Duration{}
			for i := range rounds * len(kinds) {
				kind := kinds[(i+i/len(kinds))%len(kinds)] // not always after the same one
				end := begin[kind]()
				out, err := d.build(by, text, "-t", "cost")
				end()
				if err != nil {
					d.t.Fatal(err)
				}
				took[kind] = append(took[kind], betweenSteps(out)...)
			}
			for _, kind := range kinds {
				slices.Sort(took[kind])
			}
			for _, tt := range []struct {
				percent int
				most    time.Duration
			}{{10, 0}, {25, 0}, {50, 20 * time.Millisecond}, {75, 0}, {90, 0}, {99, 50 * time.Millisecond}} {
				at := func(kind string) time.Duration {
					return took[kind][len(took[kind])*tt.percent/100].Round(100 * time.Microsecond)
				}
				d.t.Logf("%v, %d%% of %d steps: nothing %v, a move %v, cgtun %v", by, tt.percent, len(took["cgtun"]), at("nothing"), at("a move"), at("cgtun"))
				if more := at("cgtun") - at("nothing"); tt.most > 0 && more > tt.most {
					d.t.Errorf("%d%%: %v more, not %v", tt.percent, more, tt.most)
				}
			}
		}}})
	}
}

// betweenSteps finds the times between the begins of the steps of a build.
func betweenSteps(out string) (took []time.Duration) {
	var last int64
	for _, m := range stepBegan.FindAllStringSubmatch(out, -1) {
		at, _ := strconv.ParseInt(m[1], 10, 64)
		if last != 0 {
			took = append(took, time.Duration(at-last))
		}
		last = at
	}
	return took
}

var stepBegan = regexp.MustCompile(`began (\d+)`)

// moveIn moves a tun into each network namespace that the daemon has from now on, as
// soon as it sees it, and does nothing else. The device goes with its namespace.
func (d *dockers) moveIn() (end func()) {
	d.t.Helper()
	from, stage, err := netns.Private()
	if err != nil {
		d.t.Fatal(err)
	}
	dir := fmt.Sprintf("/proc/%d/root%s/exec/netns", d.daemon.Pid, d.state)
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	moves := 0
	work.Go(func() {
		defer stage.Close()
		moved := map[string]*tun.Device{}
		for ctx.Err() == nil {
			found, _ := filepath.Glob(dir + "/*")
			for _, file := range found {
				if moved[file] != nil {
					continue
				}
				if ns, err := netns.Named(file); err == nil {
					if moved[file], err = tun.Open(ns, tun.Options{Table: 77, From: from, Yield: true}); err == nil {
						moves++
					}
				}
			}
			for file, dev := range moved {
				if dev != nil && !slices.Contains(found, file) {
					_ = dev.Close()
					delete(moved, file)
				}
			}
			time.Sleep(2 * time.Millisecond) // the kernel tells of no namespace
		}
		for _, dev := range moved {
			if dev != nil {
				_ = dev.Close()
			}
		}
	})
	return func() {
		cancel()
		work.Wait()
		if moves == 0 {
			d.t.Error("no device was moved")
		}
	}
}
