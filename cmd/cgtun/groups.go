package main

import (
	"fmt"
	"log/slog"
	"maps"

	"cgtun/control"
	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
)

// setGroups makes the groups of the file, after their members, and puts them
// beside the outbounds. That they have no circles was checked with the file.
func (w *ways) setGroups(log *slog.Logger) error {
	configs := map[string]group.Config{}
	for _, c := range w.file.Groups {
		configs[c.Name] = c
	}
	for _, c := range w.file.Groups {
		o, err := w.setGroup(c, configs)
		if err != nil {
			return err
		}
		g := o.(*group.Group)
		if len(g.Outbounds()) == 1 {
			log.Warn("a group with one path has nothing to fail over to", "group", g.Name(), "outbound", g.Outbounds()[0])
		}
		w.groups = append(w.groups, g)
	}
	return nil
}

func (w *ways) setGroup(c group.Config, configs map[string]group.Config) (dialer.Outbound, error) {
	if o, ok := w.byName[c.Name]; ok {
		return o, nil
	}
	var members []dialer.Outbound
	for _, name := range c.Outbounds {
		o, ok := w.byName[name]
		if inner, nested := configs[name]; !ok && nested {
			var err error
			if o, err = w.setGroup(inner, configs); err != nil {
				return nil, err
			}
			ok = true
		}
		if !ok {
			return nil, fmt.Errorf("make group %q: there is no outbound %q", c.Name, name)
		}
		members = append(members, o)
	}
	g, err := group.New(c, members, w.scores)
	if err != nil {
		return nil, err
	}
	w.byName[c.Name] = g
	return g, nil
}

// stats are those of the scores; counts go on from those of before.
func (w *ways) stats() map[string]group.Stats {
	all := w.scores.Stats()
	addStats(all, w.before)
	return all
}

// dropped are the counts of paths that do not stay, now or earlier.
func (w *ways) dropped(stays func(name string) bool) map[string]group.Stats {
	all := w.scores.Stats()
	maps.DeleteFunc(all, func(name string, _ group.Stats) bool { return stays(name) })
	addStats(all, w.before)
	return all
}

func addStats(to, counts map[string]group.Stats) {
	for name, old := range counts {
		s, ok := to[name]
		if !ok {
			s.Score = old.Score
		}
		s.DialsTotal += old.DialsTotal
		s.FailuresTotal += old.FailuresTotal
		for i, n := range old.HiddenTotal {
			s.HiddenTotal[i] += n
		}
		to[name] = s
	}
}

// explainGroup says which member a group would give the flow to.
func (in *instance) explainGroup(e *control.Explain, f *flow.Flow) {
	for _, g := range in.now.Load().groups {
		if g.Name() != string(e.Use) {
			continue
		}
		o, why := g.Choose(dialer.Target{Flow: f, Addr: f.Dst})
		e.Choice, e.Path = control.Text(why), nil
		if o != nil {
			e.Path = dialer.PathOf(o)
		}
	}
}

func (in *instance) groupStatus() (list control.List[control.Group]) {
	for _, g := range in.now.Load().groups {
		c := g.Config()
		s := control.Group{Name: c.Name, Type: c.Type, Outbounds: control.List[string](c.Outbounds), Order: g.Order()}
		if len(g.Outbounds()) == 1 {
			s.Note = "one path only: there is nothing to fail over to"
		}
		list = append(list, s)
	}
	return list
}

// outboundStatus joins what the router counts of flows that use an outbound by
// its name, and what the groups count of attempts.
func (in *instance) outboundStatus() (list control.List[control.Outbound]) {
	now := in.now.Load()
	stats, paths, members := in.router.Outbounds(), now.stats(), now.scores.Stats()
	for _, o := range now.outbounds {
		n, p := stats[o.Name()], paths[o.Name()]
		s := control.Outbound{
			Name: o.Name(), Type: o.Type(), ConnectMS: n.ConnectMS,
			DialsTotal: n.DialsTotal + p.DialsTotal, FailuresTotal: n.FailuresTotal + p.FailuresTotal,
			HiddenTotal: hiddenSum(p.HiddenTotal[:]), UpBytes: n.UpBytes, DownBytes: n.DownBytes,
		}
		if _, member := members[o.Name()]; member {
			s.Score = &p.Score
		}
		s.State, s.Error = outboundState(o, p.Ejected)
		if p.Connect > 0 {
			ms := p.Connect.Seconds() * 1000
			s.ConnectMS = &ms
		}
		list = append(list, s)
	}
	return list
}

// outboundState says whether an outbound is up, and why it is not.
func outboundState(o dialer.Hop, ejected bool) (state string, why control.Text) {
	if ok, why := o.State(); !ok {
		return "down", control.Text(why)
	}
	if p, ok := o.(*dialer.Proxy); ok {
		if why := p.Refused(); why != "" {
			return "ejected", control.Text(why)
		}
	}
	if ejected {
		return "ejected", "" // the log says why
	}
	return "up", ""
}

func hiddenSum(kinds []uint64) (n uint64) {
	for _, k := range kinds {
		n += k
	}
	return n
}

// hiddenStatus sums up what the groups hid from clients, by kind.
func (in *instance) hiddenStatus() (h control.Hidden) {
	for _, p := range in.now.Load().stats() {
		h.Dial += p.HiddenTotal[dialer.HiddenDial]
		h.Reset += p.HiddenTotal[dialer.HiddenReset]
		h.Close += p.HiddenTotal[dialer.HiddenClose]
		h.Stall += p.HiddenTotal[dialer.HiddenStall]
	}
	h.DNS = in.resolver.Counters().Hidden
	return h
}
