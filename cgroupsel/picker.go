package cgroupsel

import (
	gomaps "maps"
	"os"
	"path"
	"strings"
)

// picker says by its path who selects a cgroup. What is selected takes all
// below it with it, but for what others select there: the deepest plain path
// has a cgroup; where there is none, the first selection of those with a glob
// or unit that matches, here or above. It is immutable.
type picker struct {
	plain    map[string]int  // path → selection
	above    map[string]bool // what has a plain path below it
	globs    *automaton      // nil: none
	labels   int             // those of the automaton below it are selections
	followed [wayCount]int   // of those from there on, whose they are now; or none
}

// none is the selection of what is not selected.
const none = -1

// spot is what is known of a cgroup by its path.
type spot struct {
	path      string
	row       uint16 // of the automaton
	selection int    // none, or whose it is
	top       string // where that selection begins: here or above
	plain     bool   // it is a plain path
	// rival is another selection, which has a glob that matches here and lost;
	// none: there is none.
	rival int
}

// newPicker makes a picker of the entries of all selections.
func newPicker(o Options) (*picker, error) {
	p := &picker{plain: make(map[string]int), above: make(map[string]bool), labels: len(o.Selections), followed: nobody}
	p.add(o.plain())
	wishes := o.wishes()
	if len(wishes) == 0 {
		return p, nil
	}
	var err error
	p.globs, err = compile("", wishes)
	return p, err
}

// add takes plain paths in; who has one already keeps it.
func (p *picker) add(entries []entry) {
	for _, e := range entries {
		if _, ok := p.plain[e.path]; !ok {
			p.plain[e.path] = e.selection
		}
		for _, a := range lineage(e.path) {
			p.above[path.Dir(a)] = true
		}
	}
}

// with is a picker that has more.
func (p *picker) with(entries []entry, followed [wayCount]int) *picker {
	more := *p
	more.plain, more.above, more.followed = gomaps.Clone(p.plain), gomaps.Clone(p.above), followed
	more.add(entries)
	return &more
}

// owner is the selection of what the automaton matched, or none.
func (p *picker) owner(label int) int {
	if label < p.labels {
		return label
	}
	return p.followed[label-p.labels]
}

func (p *picker) root() spot {
	s := spot{path: "/", selection: none, rival: none}
	if p.globs != nil {
		s.row = p.globs.start
	}
	if selection, ok := p.plain["/"]; ok {
		s.selection, s.top, s.plain = selection, s.path, true
	}
	return s
}

// child goes down to a child.
func (p *picker) child(s spot, name string) spot {
	s.path, s.rival = path.Join(s.path, name), none
	label, glob := none, none
	if p.globs != nil {
		s.row = p.globs.run(s.row, "/"+name)
		label = p.globs.match(s.row)
		glob = p.owner(label)
	}
	if selection, ok := p.plain[s.path]; ok {
		s.selection, s.top, s.plain = selection, s.path, true
		return s
	}
	switch {
	case glob == none || glob == s.selection:
	case s.selection == none:
		s.selection, s.top = glob, s.path
	case label < s.selection && !s.plain:
		s.selection, s.top, s.rival = glob, s.path, s.selection
	default:
		s.rival = glob
	}
	return s
}

// mayBegin tells whether a selection can begin below.
func (p *picker) mayBegin(s spot) bool {
	return p.above[s.path] || s.row != 0 && p.globs.run(s.row, "/") != 0
}

// explorer walks the tree as explore says.
type explorer struct {
	tree  *tree
	pick  *picker
	all   bool
	visit func(spot, *os.File) error
}

// explore calls visit for cgroups, parents first: for those where a selection
// begins or may begin below, and with all for everything that is selected.
// What disappears meanwhile is passed over.
func (s *Selector) explore(all bool, visit func(spot, *os.File) error) error {
	e := explorer{tree: s.tree, pick: s.picker(), all: all, visit: visit}
	return e.child(e.pick.root())
}

func (e *explorer) child(at spot) error {
	dir, err := e.tree.dir(at.path)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := e.visit(at, dir); err != nil {
		return err
	}
	if !e.pick.mayBegin(at) && !(e.all && at.selection != none) {
		return nil
	}
	names, err := children(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		below := e.pick.child(at, name)
		if below.selection == none && !e.pick.mayBegin(below) {
			continue
		}
		if err := e.child(below); err != nil {
			return err
		}
	}
	return nil
}

// find goes down to a path.
func (p *picker) find(name string) spot {
	s := p.root()
	for c := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if c != "" {
			s = p.child(s, c)
		}
	}
	return s
}
