package attach

import (
	"errors"
	"reflect"
	"slices"

	"cgtun/internal/netns"
	"cgtun/steer"
)

// A namespace without a way out is left as it is, and can get one at any time. While
// cgtun runs it is attached then, before anybody sends. For the time when it does not,
// closed routes put a fence there: a plan without a device, by which what is selected
// takes no default route (steer.Plan). While the namespace is attached its steering is
// in the place of that, and has the fence of a family without a way out.

// fence is what one route has put into a namespace.
type fence struct {
	steering *steer.Steering
	plan     steer.Plan // in force
}

// fenceIn puts fences where there are none yet, and back where somebody took one away.
func (s *site) fenceIn(around *surroundings) error {
	err := s.fenceAll(around)
	if errors.Is(err, netns.ErrGone) {
		// Perhaps it was the way in that has gone: there can be another one by now.
		s.fences = map[*Route]fence{}
		err = s.fenceAll(around)
	}
	return err
}

func (s *site) fenceAll(around *surroundings) error {
	for i := range s.m.opts.Routes {
		r := &s.m.opts.Routes[i]
		var err error
		switch {
		case r.Kernel: // its way is in home alone, and the gate is shut elsewhere
		case r.Plan.Closed:
			err = s.fenceOne(i, around)
		default:
			err = s.unblock(r)
		}
		if err != nil {
			return err
		}
	}
	s.unblocked = true
	return nil
}

func (s *site) fenceOne(selection int, around *surroundings) error {
	r := &s.m.opts.Routes[selection]
	f, there := s.fences[r]
	plan := s.wanted(&Attachment{route: r, selection: selection}, (*s.m.plans.Load())[selection], around)
	if there && reflect.DeepEqual(plan, f.plan) {
		what, err := f.steering.Repair()
		if what != "" {
			s.repaired(what, err)
		}
		return err
	}
	if !there {
		var err error
		if f.steering, err = steer.Open(s.ref(), r.Instance); err != nil {
			return err
		}
	}
	if err := f.steering.Apply(plan); err != nil {
		return err
	}
	f.plan = plan
	s.fences[r] = f
	return nil
}

// unblock takes away, once, what an earlier run left of a route that was closed then.
func (s *site) unblock(r *Route) error {
	if s.unblocked {
		return nil
	}
	home, err := netns.Home()
	if err != nil {
		return err
	}
	objects, err := steer.Find(s.ref())
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(objects, func(o steer.Object) bool {
		return o.Closed && o.Instance == r.Instance && o.Home == home.Cookie()
	}) {
		return nil
	}
	return steer.Remove(s.ref(), r.Instance)
}

// unfence takes the fences away where the namespace is left because nobody selected
// is in it, not because cgtun stops. Where no process leads in any more, its name does.
func (s *site) unfence() {
	if s.stops() {
		return
	}
	ref := s.ref()
	if name := ref.Name(); name != "" {
		if named, err := netns.Named(name); err == nil && named.Cookie() == ref.Cookie() {
			ref = named
		}
	}
	for r := range s.fences {
		if err := steer.Remove(ref, r.Instance); err != nil && !errors.Is(err, netns.ErrGone) {
			s.m.opts.Logger.Warn("something is left in a namespace that has no selected process any more", "attachment", s.id, "err", err)
		}
	}
}
