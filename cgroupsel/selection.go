package cgroupsel

import (
	"fmt"
	"path"
	"strings"
)

// Selection is what one route captures.
type Selection struct {
	// Cgroups are plain paths from the root of cgroup2, "/a/b", globs, or
	// "unit:NAME.service", ".slice" and ".scope". All below is selected too.
	Cgroups    []string
	Netns      []string // names in /run/netns, or absolute paths
	Create     bool     // make those of Cgroups that are plain and missing
	Mark, Mask uint32   // fwmark of what is sent; Mask 0 is all bits
	Closed     bool     // the gate stays shut for it in namespaces that were not attached in time
}

// value is what the maps hold for the selection with this index.
func (o Options) value(selection int) value {
	one := o.Selections[selection]
	return value{Mark: one.Mark & one.Mask, Mask: one.Mask, Selection: uint32(selection)}
}

// now are the options with the newest Selections (Reselect).
func (s *Selector) now() *Options { return s.picked.Load().opts }

func (s *Selector) value(selection int) value { return s.now().value(selection) }

// byExit lists the selections without Closed, and those with it.
func (o Options) byExit() (open, closed []int32) {
	for i, one := range o.Selections {
		if one.Closed {
			closed = append(closed, int32(i))
		} else {
			open = append(open, int32(i))
		}
	}
	return open, closed
}

// entry is a plain path of Selection.Cgroups.
type entry struct {
	path      string
	selection int
}

// plain lists the plain paths of all selections.
func (o Options) plain() []entry {
	var all []entry
	for i, one := range o.Selections {
		for _, p := range one.Cgroups {
			if !IsUnit(p) && !IsGlob(p) {
				all = append(all, entry{path: p, selection: i})
			}
		}
	}
	return all
}

// wishes lists the globs and units of all selections.
func (o Options) wishes() []wish {
	var all []wish
	for i, one := range o.Selections {
		for _, p := range one.Cgroups {
			if unit, ok := strings.CutPrefix(p, unitPrefix); ok {
				all = append(all, wish{unitTokens(unit), i})
			} else if IsGlob(p) {
				all = append(all, wish{parseGlob(p), i})
			}
		}
	}
	if o.Follows {
		for i, w := range ways {
			all = append(all, wish{w, len(o.Selections) + i})
		}
	}
	return all
}

// check says what is wrong with the selections.
func (o Options) check() error {
	switch {
	case len(o.Selections) > maxSelections:
		return fmt.Errorf("select cgroups: %d selections, at most %d", len(o.Selections), maxSelections)
	case len(o.plain()) > maxPaths:
		return fmt.Errorf("select cgroups: %d paths, at most %d", len(o.plain()), maxPaths)
	}
	for _, one := range o.Selections {
		for _, p := range one.Cgroups {
			if IsUnit(p) {
				if what := badCgroup(p); what != "" {
					return fmt.Errorf("select cgroup %s", what)
				}
				continue
			}
			if !path.IsAbs(p) || path.Clean(p) != p || len(p) > maxPathLen || strings.ContainsRune(p, 0) {
				return fmt.Errorf("select cgroup %q: not a clean path from the root of cgroup2 of at most %d bytes", p, maxPathLen)
			}
		}
	}
	return nil
}

// Selects says whether any of these selections has a cgroup by its path.
func Selects(all []Selection, cgroup string) bool {
	pick, err := newPicker(Options{Selections: all})
	return err == nil && pick.find(cgroup).selection != none
}
