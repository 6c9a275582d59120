package cgroupsel

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"github.com/cilium/ebpf"
)

// # Theory of operation: follow
//
// What a program like dockerd makes, and where, is known when it runs. So paths
// can be selected beside those of Options while the programs are attached: the
// trie takes them at any time. What the system manager makes for such a program
// has its place where everything is, and is told by its name alone: those two
// patterns are in the automaton from the start, and select for nobody until a
// value says for whom. Nothing else that is made there is ever touched.
//
// First the kernel is told, then the tree is walked; a path that is not followed
// any more goes the same way. Both write the same values, so nothing is missed
// between.

// The ways that are in the automaton, behind the selections.
const (
	wayContainers = iota
	waySteps
	wayCount
)

// nobody follows any of them.
var nobody = [wayCount]int{none, none}

// The digits of a container's id, and of a step's of BuildKit.
const (
	containerDigits = 64
	stepDigits      = 25
)

// ways are the patterns: docker-ID.scope, in slices alone; and what BuildKit
// makes by itself beside a service, SLICE:docker:ID, as it asks the system
// manager for no scope.
var ways = [wayCount][]token{
	wayContainers: scopeTokens(containerDigits),
	waySteps:      append(append(literals("/"), token{kind: inSlices}, token{kind: inside}), append(literals(":docker:"), digits(stepDigits)...)...),
}

func scopeTokens(n int) []token {
	all := append(literals("/"), token{kind: inSlices})
	all = append(append(all, literals("docker-")...), digits(n)...)
	return append(all, literals(".scope")...)
}

func digits(n int) []token { return slices.Repeat([]token{{kind: digit}}, n) }

// Followed is what is selected beside Options.Selections, and can change.
type Followed struct {
	Selection int // whose it is
	// Cgroups are plain paths. One that Options.Selections have stays theirs; of
	// several the first has it. All below is selected, too.
	Cgroups []string
	// Containers are all docker-ID.scope in slices, with the 64 digits of a
	// container; Steps are all that BuildKit makes for its steps beside such.
	Containers, Steps bool
}

// chosen is what is selected now. It is immutable.
type chosen struct {
	*picker
	opts    *Options // with the newest Selections
	base    *picker  // without what is followed
	entries []entry  // the followed paths that are nobody else's
}

// picker is the newest one.
func (s *Selector) picker() *picker { return s.picked.Load().picker }

// Follow replaces what is selected beside Options.Selections. What it selects
// is selected when it returns; the Snapshot shows it a little later. It wants
// Options.Follows. An error names what is left out, and the rest is selected:
// paths that another instance has, and what this process itself is in.
func (s *Selector) Follow(wanted []Followed) error {
	if !s.opts.Follows {
		return nil
	}
	s.following.Lock()
	defer s.following.Unlock()
	old := s.picked.Load()
	owners := nobody
	var entries []entry
	var errs []error
	for _, f := range wanted {
		for way, on := range [wayCount]bool{f.Containers, f.Steps} {
			if on && owners[way] == none {
				owners[way] = f.Selection
			}
		}
		for _, p := range f.Cgroups {
			e := entry{path: p, selection: f.Selection}
			if err := s.follows(old, e); err != nil {
				errs = append(errs, err)
				continue
			}
			_, taken := old.base.plain[p]
			if !taken && !slices.ContainsFunc(entries, func(o entry) bool { return o.path == p }) {
				entries = append(entries, e)
			}
		}
	}
	if slices.Equal(entries, old.entries) && owners == old.followed {
		return errors.Join(errs...)
	}
	s.picked.Store(&chosen{picker: old.base.with(entries, owners), opts: old.opts, base: old.base, entries: entries})
	if s.traces != nil {
		errs = append(errs, s.turn(old.entries, entries, owners), s.fill(), s.unselect())
	}
	tell(s.again)
	return errors.Join(errs...)
}

// follows says why a path cannot be followed.
func (s *Selector) follows(old *chosen, e entry) error {
	if !path.IsAbs(e.path) || path.Clean(e.path) != e.path || e.path == "/" {
		return fmt.Errorf("select cgroup %q: not a clean path below the root of cgroup2", e.path)
	}
	if slices.Contains(old.entries, e) {
		return nil
	}
	s.mu.Lock()
	self, moved := s.self, s.home != ""
	s.mu.Unlock()
	if self.Path != "" && !moved && within(self.Path, e.path) {
		return fmt.Errorf("select cgroup %s: cgtun itself is in it, and was before; start it again", e.path)
	}
	if s.traces == nil {
		return nil
	}
	want := claim{paths: []string{s.real(e.path)}}
	if id, err := s.tree.id(e.path); err == nil {
		want.ids = map[uint64]string{id: e.path}
	}
	return s.maps.free(s.opts.Instance, want)
}

// turn tells the kernel of other paths and ways.
func (s *Selector) turn(old, entries []entry, owners [wayCount]int) error {
	var errs []error
	for way, selection := range owners {
		var v value
		if selection != none {
			v = s.value(selection)
		}
		if s.maps.globs != nil {
			errs = append(errs, s.maps.marks.Put(uint32(len(s.now().Selections)+way), v))
		}
	}
	for _, e := range entries {
		errs = append(errs, s.putPath(e))
	}
	for _, o := range old {
		if slices.ContainsFunc(entries, func(e entry) bool { return e.path == o.path }) {
			continue
		}
		if err := s.maps.paths.Delete(newTrieKey(s.real(o.path))); !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unselect takes out what is not selected any more. A cgroup that was made
// meanwhile has its parent's word: so it looks until there is none.
func (s *Selector) unselect() error {
	pick := s.picker()
	for found := true; found; {
		found = false
		var gone []uint64
		var id uint64
		var v value
		for it := s.maps.sel.Iterate(); it.Next(&id, &v); {
			if v.Mask == 0 {
				continue
			}
			if name, ok := s.PathByID(id); ok && pick.find(name).selection == none {
				gone = append(gone, id)
			}
		}
		for _, id := range gone {
			if err := s.maps.sel.Delete(id); err == nil {
				found = true
			} else if !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("unselect a cgroup: %w", err)
			}
		}
	}
	return nil
}
