package main

import (
	"slices"

	"cgtun/control"
	"cgtun/dialer"
	"cgtun/group"
	"cgtun/metrics"
)

// measure gathers what the parts count for metrics. Not before the daemon is
// wired: until then there is nothing.
func (in *instance) measure() (s metrics.Snapshot) {
	if in.state.Load() == control.Starting {
		return s
	}
	counters := in.router.Counters()
	s = metrics.Snapshot{
		FlowsLive: counters.FlowsLive, DeniedTotal: in.router.Denials(),
		GateDropsTotal: in.selector.Counters().GateDrops, Attachments: map[string]int{},
	}
	paths := in.now.Load().stats()
	for _, o := range in.outboundStatus() {
		one := metrics.Outbound{
			Name: string(o.Name), Up: o.State == "up", UpBytesTotal: o.UpBytes, DownBytesTotal: o.DownBytes, HiddenTotal: map[string]uint64{},
		}
		for kind, n := range paths[string(o.Name)].HiddenTotal {
			one.HiddenTotal[dialer.Hidden(kind).String()] = n
		}
		s.Outbounds = append(s.Outbounds, one)
	}
	for _, a := range in.manager.States() {
		s.Attachments[a.State]++
	}
	s.ReloadsTotal = map[string]uint64{"ok": in.reloads.ok.Load(), "bad": in.reloads.bad.Load(), "refused": in.reloads.refused.Load()}
	q := in.resolver.Counters()
	s.QueriesTotal = map[string]uint64{
		"cached": q.Cached, "stale": q.Stale, "answered": q.Answered, "failed": q.Failed,
		"refused": q.Refused, "dropped": q.Dropped, "passed": q.Passed,
	}
	return s
}

func (in *instance) isGroup(name string) bool {
	return slices.ContainsFunc(in.now.Load().groups, func(g *group.Group) bool { return g.Name() == name })
}
