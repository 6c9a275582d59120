package main_test

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// testCost: what cgtun adds to a step, from the begin of one to that of the next,
// against the same build without it. The two take turns. The difference has an error of
// more than a millisecond, so the bounds are wide: what is seen is in docs/docker.md.
func (d *dockers) testCost() {
	const rounds, steps = 36, 21
	text := "FROM " + registry + "/base\n" + strings.Repeat("RUN [\"/bin/first\"]\n", steps)
	begin := map[string]func() (end func()){
		"without": func() func() { return func() {} },
		"cgtun":   func() func() { return d.start(d.configDocker("true", second)).stop },
	}
	kinds := []string{"without", "cgtun"}
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
			}{{10, 0}, {25, 0}, {50, 10 * time.Millisecond}, {75, 0}, {90, 0}, {99, 30 * time.Millisecond}} {
				at := func(kind string) time.Duration {
					return took[kind][len(took[kind])*tt.percent/100].Round(100 * time.Microsecond)
				}
				d.t.Logf("%v, %d%% of %d steps: without %v, cgtun %v", by, tt.percent, len(took["cgtun"]), at("without"), at("cgtun"))
				if more := at("cgtun") - at("without"); tt.most > 0 && more > tt.most {
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
