package cgroupsel

import (
	"os"
	"path"
	"strings"
)

// picker says by its path who selects a cgroup. What is selected takes all
// below it with it, but for what others select there: the deepest plain path
// has a cgroup; where there is none, the first selection of those with a glob
// or unit that matches, here or above. It is immutable.
type picker struct {
	plain map[string]int  // path → selection
	above map[string]bool // what has a plain path below it
	globs *automaton      // nil: none
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
	p := &picker{plain: make(map[string]int), above: make(map[string]bool)}
	for _, e := range o.plain() {
		if _, ok := p.plain[e.path]; !ok {
			p.plain[e.path] = e.selection
		}
		for _, a := range lineage(e.path) {
			p.above[path.Dir(a)] = true
		}
	}
	wishes := o.wishes()
	if len(wishes) == 0 {
		return p, nil
	}
	var err error
	p.globs, err = compile("", wishes)
	return p, err
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
	glob := none
	if p.globs != nil {
		s.row = p.globs.run(s.row, "/"+name)
		glob = p.globs.match(s.row)
	}
	if selection, ok := p.plain[s.path]; ok {
		s.selection, s.top, s.plain = selection, s.path, true
		return s
	}
	switch {
	case glob == none || glob == s.selection:
	case s.selection == none:
		s.selection, s.top = glob, s.path
	case glob < s.selection && !s.plain:
		s.selection, s.top, s.rival = glob, s.path, s.selection
	default:
		s.rival = glob
	}
	return s
}

// mayBegin tells whether a selection can begin below.
func (p *picker) mayBegin(s spot) bool { return s.row != 0 || p.above[s.path] }

// explore calls visit for cgroups, parents first: for those where a selection
// begins or may begin below, and with all for everything that is selected.
// What disappears meanwhile is passed over.
func (s *Selector) explore(all bool, visit func(spot, *os.File) error) error {
	root := s.pick.root()
	dir, err := s.tree.dir(root.path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return s.exploreAt(root, dir, all, visit)
}

func (s *Selector) exploreAt(at spot, dir *os.File, all bool, visit func(spot, *os.File) error) error {
	if err := visit(at, dir); err != nil {
		return err
	}
	if !s.pick.mayBegin(at) && !(all && at.selection != none) {
		return nil
	}
	names, err := children(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		below := s.pick.child(at, name)
		if below.selection == none && !s.pick.mayBegin(below) {
			continue
		}
		if err := s.exploreChild(below, all, visit); err != nil {
			return err
		}
	}
	return nil
}

func (s *Selector) exploreChild(at spot, all bool, visit func(spot, *os.File) error) error {
	dir, err := s.tree.dir(at.path)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	return s.exploreAt(at, dir, all, visit)
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
