package cgroupsel

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"

	"github.com/cilium/ebpf"
)

// allowed is nil unless Options.Without names the feature.
func (s *Selector) allowed(feature string) error {
	if slices.Contains(s.opts.Without, feature) {
		return errSwitchedOff
	}
	return nil
}

// trace fills the trie and attaches the tracepoints. A TakenError is the
// user's to mend; any other error is a kernel that refuses.
func (s *Selector) trace() error {
	if err := s.allowed(FeatureMkdir); err != nil {
		return err
	}
	l, err := s.readLayout()
	if err != nil {
		return err
	}
	prefix, err := s.tree.prefix(l)
	if err != nil {
		return err
	}
	if err := s.fillMarks(prefix); err != nil {
		return err
	}
	s.prefix = prefix
	reals := make([]string, 0, len(s.plain))
	for _, e := range s.plain {
		if err := s.putPath(e); err != nil {
			return err
		}
		reals = append(reals, s.real(e.path))
	}
	there, err := s.there()
	if err != nil {
		return err
	}
	if err := s.maps.free(s.opts.Instance, claim{reals, there}); err != nil {
		return err
	}
	s.layout = l
	s.traces, err = attachTracepoints(s.maps, l)
	return err
}

// real is a path from the real root of cgroup2.
func (s *Selector) real(name string) string { return path.Join("/", s.prefix, name) }

// putPath has the program at cgroup_mkdir select a path.
func (s *Selector) putPath(e entry) error {
	real := s.real(e.path)
	if len(real) > maxPathLen {
		return fmt.Errorf("select %s: its path from the real root, %s, is longer than %d bytes", e.path, real, maxPathLen)
	}
	key := newTrieKey(real)
	v := pathValue{Value: s.value(e.selection), Bits: key.Bits}
	v.Value.Flags |= flagPlain
	copy(v.Instance[:], s.opts.Instance)
	if err := s.maps.paths.Put(key, v); err != nil {
		return fmt.Errorf("select %s: %w", e.path, err)
	}
	return nil
}

// there lists the selected cgroups that exist, by id.
func (s *Selector) there() (map[uint64]string, error) {
	all := make(map[uint64]string)
	err := s.explore(true, func(at spot, dir *os.File) error {
		id, err := inode(dir)
		if at.selection != none && err == nil {
			all[id] = at.path
		}
		return err
	})
	return all, err
}

// fillMarks prepares what globs and units select.
func (s *Selector) fillMarks(prefix string) error {
	wishes := s.now().wishes()
	if len(wishes) == 0 {
		return nil
	}
	for i := range s.now().Selections {
		if err := s.maps.marks.Put(uint32(i), s.value(i)); err != nil {
			return fmt.Errorf("select cgroups of route %d: %w", i+1, err)
		}
	}
	a, err := compile(prefix, wishes)
	if err != nil {
		return err
	}
	return s.maps.setGlobs(a)
}

// fill selects the cgroups that are older than the tracepoints.
func (s *Selector) fill() error {
	return s.explore(true, func(at spot, dir *os.File) error {
		if at.selection == none || s.isOwn(at.path) {
			return nil
		}
		return s.fillOne(at, dir)
	})
}

func (s *Selector) fillOne(at spot, dir *os.File) error {
	id, err := inode(dir)
	if err != nil {
		return err
	}
	v := s.value(at.selection)
	if at.plain {
		v.Flags |= flagPlain
	}
	if at.top == at.path {
		v.Flags |= flagTop
	}
	if at.rival != none {
		v.Flags |= flagRival
	}
	if err := s.maps.sel.Put(id, v); err != nil {
		return fmt.Errorf("select %s (at most %d cgroups): %w", at.path, s.opts.MaxCgroups, err)
	}
	// Removed before the entry was in: nobody else would delete it.
	if now, err := s.tree.id(at.path); err == nil && now == id {
		return nil
	}
	if err := s.maps.sel.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("unselect %s: %w", at.path, err)
	}
	return nil
}

// armRoot attaches the socket programs once for all.
func (s *Selector) armRoot() error {
	err := s.allowed(FeatureRoot)
	if err == nil {
		s.root, err = s.attachRoot(func(others []int32) []*ebpf.ProgramSpec {
			return socketPrograms(s.maps, bySel(s.maps, others))
		})
	}
	return err
}

// rooted are programs at the root of cgroup2. Those of closed selections are
// pinned; those of open ones must not outlive us.
type rooted struct{ open, closed hooks }

// attachRoot attaches programs for the open selections and for the closed ones,
// where there are any, which are told the selections that they are not for.
func (s *Selector) attachRoot(programs func(others []int32) []*ebpf.ProgramSpec) (r rooted, err error) {
	open, closed := s.opts.byExit()
	if len(open) > 0 {
		r.open, err = attachSockets(s.tree.root, programs(closed))
	}
	if err == nil && len(closed) > 0 {
		r.closed, err = attachSockets(s.tree.root, programs(open))
	}
	if err != nil {
		return rooted{}, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r rooted) Close() error { return errors.Join(r.closed.Close(), r.open.Close()) }

// armNamed attaches socket programs at the root that go by the namespace, where
// those that go by the cgroup as well are refused.
func (s *Selector) armNamed() {
	if s.maps == nil || s.maps.named == nil {
		return
	}
	root, err := attachSockets(s.tree.root, socketPrograms(s.maps, byNamed(s.maps, s.exempt())))
	if s.note(FeatureNetns, err) {
		s.root.open = root
	}
}

// dropTraces gives up what is of no use without programs at the root.
func (s *Selector) dropTraces() {
	if err := s.traces.Close(); err != nil {
		s.log.Warn("detach tracepoints", "err", err)
	}
	s.traces = nil
}

// each is the second best way: socket programs on the selected cgroups
// themselves, attached anew to one that is made again. Only begin, Run and
// Close touch it, one after the other.
type each struct {
	programs [][]*ebpf.ProgramSpec // by selection
	on       map[string]armed
}

// armed are the programs on one cgroup. A cgroup that is made again has
// another id; the programs of the old one ended with it.
type armed struct {
	id    uint64
	hooks hooks
}

// useEach goes over to programs on each cgroup, or says why not.
func (s *Selector) useEach() {
	if s.each != nil {
		return
	}
	err := s.allowed(FeaturePerCgroup)
	if err == nil && s.maps == nil {
		if s.maps, err = newMaps(1); err == nil {
			s.note(FeatureProcess, s.tryRemember())
		}
	}
	if err == nil {
		s.each = &each{on: make(map[string]armed)}
		for i := range s.now().Selections {
			s.each.programs = append(s.each.programs, socketPrograms(s.maps, always(s.value(i), s.exempt())))
		}
		if err = s.armAll(); err != nil {
			err = errors.Join(err, s.each.close())
			s.each = nil
		}
	}
	s.note(FeaturePerCgroup, err)
}

// armAll attaches to all that is there.
func (s *Selector) armAll() error {
	return s.explore(false, func(at spot, dir *os.File) error {
		if at.selection == none || at.top != at.path {
			return nil
		}
		return s.each.arm(at, dir)
	})
}

// arm attaches to a cgroup where a selection begins, if it is another one than
// the last time.
func (e *each) arm(at spot, dir *os.File) error {
	if e == nil {
		return nil
	}
	name := at.path
	id, err := inode(dir)
	if err != nil || e.on[name].id == id {
		return err
	}
	if err := e.drop(name); err != nil {
		return err
	}
	h, err := attachSockets(dir, e.programs[at.selection])
	if gone(err) {
		return nil // removed meanwhile: the next look sees it
	}
	if err == nil {
		e.on[name] = armed{id: id, hooks: h}
	}
	return err
}

func (e *each) drop(name string) error {
	err := e.on[name].hooks.Close()
	delete(e.on, name)
	return err
}

// dropOthers lets go of all cgroups but those that are there.
func (e *each) dropOthers(there map[string]bool) error {
	if e == nil {
		return nil
	}
	var errs []error
	for name := range e.on {
		if !there[name] {
			errs = append(errs, e.drop(name))
		}
	}
	return errors.Join(errs...)
}

func (e *each) close() error { return e.dropOthers(nil) }
