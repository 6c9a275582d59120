package main

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"cgtun/attach"
	"cgtun/config"
	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
	"cgtun/policy"
	"cgtun/rules"
)

// ways are what one reading of the file makes of it that a reload replaces as a
// whole: rules, outbounds, groups, and who guards them. A flow keeps those that
// it began with.
type ways struct {
	file      *config.File
	set       *rules.Set
	outbounds []dialer.Hop
	groups    []*group.Group
	scores    *group.Scores
	byName    map[string]dialer.Outbound // outbounds and groups
	judge     *policy.Judge
	before    map[string]group.Stats // what scores of earlier ones have counted
}

// newWays makes ways of a file, and puts nothing in force. Outbounds and groups
// that are as before stay, with all that is known of them.
func (in *instance) newWays(file *config.File, before *ways) (*ways, error) {
	w := &ways{file: file, byName: map[string]dialer.Outbound{}}
	var err error
	if w.set, err = rules.Compile(file.Rules); err != nil {
		return nil, err
	}
	for i := range file.Rules { // millions of lines
		file.Rules[i].Listed, file.Rules[i].ListedNames = nil, rules.Names{}
	}
	if err := in.setOutbounds(w, before); err != nil {
		return nil, err
	}
	w.judge, err = in.newJudge(file)
	return w, err
}

// setOutbounds makes the outbounds and groups that do not stay.
func (in *instance) setOutbounds(w, before *ways) (err error) {
	var capture []dialer.Mark
	for _, r := range w.file.Routes() {
		capture = append(capture, dialer.Mark{Value: r.Mark, Mask: r.Mask})
	}
	kept := map[string]dialer.Hop{}
	w.scores = group.NewScores(in.log, in.metrics)
	if before != nil {
		stays := sameWays(w.file, before.file)
		w.scores = before.scores.Next(stays)
		w.before = before.dropped(stays)
		for _, o := range before.outbounds {
			if stays(o.Name()) {
				kept[o.Name()] = o
			}
		}
		for _, g := range before.groups {
			if stays(g.Name()) {
				w.byName[g.Name()] = g
			}
		}
	}
	configs := append([]dialer.Config{{Name: rules.UseDirect, Type: dialer.TypeDirect}}, w.file.Outbounds...)
	if w.outbounds, err = dialer.New(configs, dialer.Options{Kept: kept, Logger: in.log, Capture: capture, Judge: in.guard.others}); err != nil {
		return err
	}
	for _, o := range w.outbounds {
		w.byName[o.Name()] = o
	}
	if err := w.setGroups(in.log); err != nil {
		return err
	}
	return dialer.Link(w.outbounds, w.byName)
}

// sameWays tells which outbounds and groups of a file are those of another one:
// as are all that they lead through.
func sameWays(file, before *config.File) (same func(name string) bool) {
	known := map[string]bool{rules.UseDirect: true}
	outbounds, groups := map[string]*dialer.Config{}, map[string]*group.Config{}
	for i := range before.Outbounds {
		outbounds[before.Outbounds[i].Name] = &before.Outbounds[i]
	}
	for i := range before.Groups {
		groups[before.Groups[i].Name] = &before.Groups[i]
	}
	is := map[string]func() bool{} // of the file; it has no circles
	for i := range file.Outbounds {
		o := &file.Outbounds[i]
		is[o.Name] = func() bool {
			old := outbounds[o.Name]
			return old != nil && old.Equal(o) && (o.Via == "" || same(o.Via))
		}
	}
	for i := range file.Groups {
		g := &file.Groups[i]
		is[g.Name] = func() bool {
			old := groups[g.Name]
			return old != nil && reflect.DeepEqual(old, g) && !slices.ContainsFunc(g.Outbounds, func(name string) bool { return !same(name) })
		}
	}
	same = func(name string) bool {
		if _, ok := known[name]; !ok {
			known[name] = is[name] != nil && is[name]()
		}
		return known[name]
	}
	return same
}

// newJudge makes the judge of destinations. It is asked when the manager is
// there, but for its first look at home.
func (in *instance) newJudge(file *config.File) (*policy.Judge, error) {
	o := policy.Options{Allow: file.Policy.Allow, Home: attach.Home, Logger: in.log}
	for _, c := range file.Outbounds {
		if c.Interface != "" {
			o.Interfaces = append(o.Interfaces, c.Interface)
		}
	}
	o.Attached = func() map[int]bool { return in.manager.Numbers() }
	o.Devices = func() (all []netip.Addr) {
		if in.manager == nil {
			return nil
		}
		for _, a := range in.manager.States() {
			for _, p := range a.Addresses {
				all = append(all, p.Addr())
			}
		}
		return all
	}
	return policy.New(o)
}

// use puts ways in force, all at once for each flow that begins from now on.
func (in *instance) use(w *ways) {
	if in.now.Load() == nil {
		w.scores.SetRoom(in.router)
	}
	w.scores.Use(w.groups)
	in.now.Store(w)
	in.guard.set(w.judge)
	in.guard.LookAgain() // what has changed since it was made, only the one before was told
	in.resolver.Reload(w.file.DNS, w.byName)
	in.router.Reload(w.set, w.byName)
	in.hand(w)
}

// hand gives ways to runWays, and does not wait: older ones that it has not begun
// with, or never will, are left out.
func (in *instance) hand(w *ways) {
	select {
	case <-in.fresh:
	default:
	}
	in.fresh <- w
}

// runWays runs what has goroutines of the ways in force, until ctx ends. Those
// before go when their successors run.
func (in *instance) runWays(ctx context.Context) error {
	work, ctx := errgroup.WithContext(ctx)
	stop := func() {}
	for {
		select {
		case <-ctx.Done():
			stop()
			return work.Wait()
		case w := <-in.fresh:
			each, cancel := context.WithCancel(ctx)
			w.run(each, work)
			stop()
			stop = cancel
		}
	}
}

func (w *ways) run(ctx context.Context, work *errgroup.Group) {
	work.Go(func() error { return w.judge.Run(ctx) })
	for _, o := range w.outbounds {
		if p, ok := o.(*dialer.Proxy); ok {
			work.Go(func() error { return p.Run(ctx) })
		}
	}
	if len(w.groups) > 0 {
		work.Go(func() error { return w.scores.Run(ctx) })
		work.Go(func() error { return dialer.FollowChanges(ctx, w.scores.Recheck) })
	}
}

// guard is the router.Guard: the judge that is in force.
type guard struct {
	judge atomic.Pointer[policy.Judge]
	sets  atomic.Uint64
}

// generation keeps the versions of two judges apart.
const generation = 1 << 32

func (g *guard) set(j *policy.Judge) {
	g.judge.Store(j)
	g.sets.Add(generation)
}

func (g *guard) Judge(f *flow.Flow, leaves []dialer.Leave) error {
	return g.judge.Load().Judge(f, leaves)
}

// others is Judge for whoever is not of home.
func (g *guard) others(a netip.AddrPort, leaves []dialer.Leave) error {
	return g.Judge(&flow.Flow{Dst: a}, leaves)
}

func (g *guard) Has(a netip.Addr) bool { return g.judge.Load().Has(a) }

func (g *guard) Version() uint64 { return g.sets.Load() + g.judge.Load().Version() }

// LookAgain says that home may have changed.
func (g *guard) LookAgain() { g.judge.Load().LookAgain() }
