package cgroupsel

import (
	"cmp"
	"errors"
	"os"
	"slices"
)

// resolve looks at cgroups and names again and tells whether the picture
// changed.
func (s *Selector) resolve(w *watcher, afresh bool) bool {
	w.followNames(s.names.dirs())
	s.names.resolve(afresh)
	var tops []Cgroup
	if s.held && s.each == nil {
		w.follow(s.tree, slices.Concat(s.plain, s.picked.Load().entries))
		tops = s.listed()
	} else {
		tops = s.walked(w)
	}
	next := Snapshot{Cgroups: s.withPlain(tops), Namespaces: s.namespaces()}
	if err := s.fillNamed(next.Namespaces); err != nil {
		s.note(FeatureNetns, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := !slices.Equal(s.snapshot.Cgroups, next.Cgroups) || !slices.Equal(s.snapshot.Namespaces, next.Namespaces)
	s.snapshot = next
	return changed
}

// Within lists the cgroups below those of one selection that belong to others.
func (s Snapshot) Within(selection int) []Cgroup {
	mine := make(map[string]bool)
	for _, c := range s.Cgroups {
		if c.Present && c.Selection == selection {
			mine[c.Path] = true
		}
	}
	var others []Cgroup
	for _, c := range s.Cgroups {
		below := func(above string) bool { return mine[above] }
		if c.Present && c.Selection != selection && (mine["/"] || slices.ContainsFunc(lineage(c.Path), below)) {
			others = append(others, c)
		}
	}
	return others
}

// withPlain puts the plain paths in front, whether they are there or not. The
// others are sorted.
func (s *Selector) withPlain(tops []Cgroup) []Cgroup {
	all := make([]Cgroup, 0, len(s.plain)+len(tops))
	for _, e := range s.plain {
		c, _ := s.newest(e.path, e.selection)
		all = append(all, c)
	}
	pick := s.picked.Load()
	tops = slices.DeleteFunc(tops, func(c Cgroup) bool { _, plain := pick.plain[c.Path]; return plain })
	for _, e := range pick.entries {
		if c, err := s.newest(e.path, e.selection); err == nil {
			c.Followed = true
			tops = append(tops, c)
		}
	}
	slices.SortFunc(tops, func(a, b Cgroup) int { return cmp.Compare(a.Path, b.Path) })
	return append(all, tops...)
}

// newest is a cgroup as it is now.
func (s *Selector) newest(name string, selection int) (Cgroup, error) {
	id, err := s.tree.id(name)
	return Cgroup{Path: name, ID: id, Level: level(name), Selection: selection, Present: err == nil, Held: s.isHeld()}, err
}

// listed reads from the map where selections by globs and units begin. The
// entry of a cgroup that was removed stays as long as a socket of it.
func (s *Selector) listed() []Cgroup {
	if s.picker().globs == nil {
		return nil
	}
	var tops []Cgroup
	var id uint64
	var v value
	for it := s.maps.sel.Iterate(); it.Next(&id, &v); {
		if v.Flags&(flagTop|flagRival) == 0 {
			continue
		}
		name, ok := s.PathByID(id)
		if !ok {
			continue
		}
		at := s.picker().find(name)
		s.warnOfRival(at)
		if v.Flags&flagTop == 0 {
			continue
		}
		if c, err := s.newest(name, int(v.Selection)); err == nil && c.ID == id {
			tops = append(tops, c)
		}
	}
	return tops
}

// walked looks for where selections begin, and arms and watches what it finds.
func (s *Selector) walked(w *watcher) []Cgroup {
	var tops []Cgroup
	there := make(map[string]bool)
	err := s.explore(false, func(at spot, dir *os.File) error {
		if s.picker().mayBegin(at) {
			w.add(dir)
		}
		s.warnOfRival(at)
		if at.selection == none || at.top != at.path {
			return nil
		}
		there[at.path] = true
		if c, err := s.newest(at.path, at.selection); err == nil {
			tops = append(tops, c)
		}
		return s.each.arm(at, dir)
	})
	if err = errors.Join(err, s.each.dropOthers(there)); err != nil {
		s.note(FeaturePerCgroup, err)
	}
	return tops
}

// warnOfRival says once of each two routes that both have a glob for a cgroup.
func (s *Selector) warnOfRival(at spot) {
	if at.rival == none {
		return
	}
	rivals := [2]int{min(at.selection, at.rival), max(at.selection, at.rival)}
	if !s.rivals[rivals] {
		s.rivals[rivals] = true
		s.log.Warn("globs of two routes meet in a cgroup: the first route has it", "cgroup", at.path, "route", at.selection+1, "other", at.rival+1)
	}
}
