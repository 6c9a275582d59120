// Package report sums flows up: for each cgroup the hosts, bytes, paths and
// failures. It owns no more than the sums; it is given the flows, and knows
// neither where they come from nor how they are shown. cmd makes a Sum for each
// report.
package report

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"cgtun/flow"
)

// Bounds of one report. What is above them is added up under Others.
const (
	maxUnits = 1024
	maxHosts = 1024 // of a unit
	maxKinds = 128  // of the failures of a unit
)

// Others stands for hosts and cgroups beyond the bounds.
const Others = "(others)"

// Report is what came of the flows between two times.
type Report struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	Units []Unit    `json:"units"` // in the order of their first flows
}

// Unit is what the processes of one cgroup did.
type Unit struct {
	Cgroup     *string   `json:"cgroup"` // nil: not known
	Start      time.Time `json:"start"`  // of the first flow
	End        time.Time `json:"end"`    // of the last one, or Until while one lives
	FlowsTotal int       `json:"flows_total"`
	UpBytes    int64     `json:"up_bytes"`
	DownBytes  int64     `json:"down_bytes"`
	Hosts      []Host    `json:"hosts"`    // those with the most bytes first
	Failures   []Failure `json:"failures"` // the most frequent first
}

// Host is one destination: a name where one is known, else the address.
type Host struct {
	Host       string         `json:"host"`
	FlowsTotal int            `json:"flows_total"`
	UpBytes    int64          `json:"up_bytes"`
	DownBytes  int64          `json:"down_bytes"`
	Paths      map[string]int `json:"paths"` // outbound → flows
}

// Failure is what flows of a kind ended by, or what was hidden of them.
type Failure struct {
	Kind     string  `json:"kind"`
	Outbound *string `json:"outbound"` // nil: none was chosen
	Hidden   bool    `json:"hidden"`
	Count    int     `json:"count"`
}

// Sum adds flows up. It is not safe for concurrent use. The zero Sum is empty.
type Sum struct {
	units map[string]*unit
	flows map[uint64]bool // those that are in
}

type unit struct {
	Unit
	hosts    map[string]*Host
	failures map[kind]int
}

type kind struct {
	kind, outbound string
	hidden         bool
}

// Add adds a flow as it is now, or was at its end: once.
func (s *Sum) Add(f *flow.Info) {
	if s.flows[f.ID] {
		return
	}
	if s.units == nil {
		s.units, s.flows = map[string]*unit{}, map[uint64]bool{}
	}
	s.flows[f.ID] = true
	u := s.unit(f)
	end := f.Start.Add(time.Duration(f.AgeMS) * time.Millisecond)
	if u.FlowsTotal == 0 || f.Start.Before(u.Start) {
		u.Start = f.Start
	}
	if end.After(u.End) {
		u.End = end
	}
	u.FlowsTotal++
	u.UpBytes += f.UpBytes
	u.DownBytes += f.DownBytes
	outbound := ""
	if len(f.Path) > 0 {
		outbound = f.Path[len(f.Path)-1] // the nearest hop is the first
	}
	h := u.host(f)
	h.FlowsTotal++
	h.UpBytes += f.UpBytes
	h.DownBytes += f.DownBytes
	if outbound != "" {
		h.Paths[outbound]++
	}
	if f.Reason != nil && *f.Reason != flow.Closed.String() {
		u.fail(kind{*f.Reason, outbound, false}, 1)
	}
	if f.Replays > 0 {
		u.fail(kind{"replay", outbound, true}, f.Replays)
	}
}

func (s *Sum) unit(f *flow.Info) *unit {
	name := ""
	if f.Cgroup != nil {
		name = *f.Cgroup
	}
	if s.units[name] == nil && len(s.units) >= maxUnits {
		name = Others
	}
	u := s.units[name]
	if u == nil {
		u = &unit{hosts: map[string]*Host{}, failures: map[kind]int{}}
		if name != "" {
			u.Cgroup = &name
		}
		s.units[name] = u
	}
	return u
}

func (u *unit) host(f *flow.Info) *Host {
	name := f.Dst.Addr().String()
	if f.Name != nil {
		name = *f.Name
	}
	if u.hosts[name] == nil && len(u.hosts) >= maxHosts {
		name = Others
	}
	h := u.hosts[name]
	if h == nil {
		h = &Host{Host: name, Paths: map[string]int{}}
		u.hosts[name] = h
	}
	return h
}

func (u *unit) fail(k kind, n int) {
	if _, ok := u.failures[k]; ok || len(u.failures) < maxKinds {
		u.failures[k] += n
	}
}

// Report returns the sums.
func (s *Sum) Report(since, until time.Time) *Report {
	r := &Report{Since: since.UTC(), Until: until.UTC(), Units: []Unit{}}
	for _, u := range s.units {
		one := u.Unit
		one.Start, one.End = one.Start.UTC(), one.End.UTC()
		one.Hosts, one.Failures = []Host{}, []Failure{}
		for _, h := range u.hosts {
			one.Hosts = append(one.Hosts, *h)
		}
		slices.SortFunc(one.Hosts, func(a, b Host) int {
			return cmp.Or(cmp.Compare(b.UpBytes+b.DownBytes, a.UpBytes+a.DownBytes), cmp.Compare(a.Host, b.Host))
		})
		for _, k := range slices.Collect(maps.Keys(u.failures)) {
			f := Failure{Kind: k.kind, Hidden: k.hidden, Count: u.failures[k]}
			if k.outbound != "" {
				f.Outbound = &k.outbound
			}
			one.Failures = append(one.Failures, f)
		}
		slices.SortFunc(one.Failures, func(a, b Failure) int {
			return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Kind, b.Kind))
		})
		r.Units = append(r.Units, one)
	}
	slices.SortFunc(r.Units, func(a, b Unit) int { return a.Start.Compare(b.Start) })
	return r
}
