package cgroupsel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cilium/ebpf"
)

// # Theory of operation: other selections while all is in force
//
// The programs stay as they are; what they read changes. It is Run that does it,
// which has all that is not under a lock. First what is new is told to the kernel,
// then the tree is walked and each cgroup gets its value in one piece, and at last
// what is not selected any more is taken out. So a cgroup that is selected before
// and after is so all the time, under the one mark or the other: both must be
// steered by then. Globs are a table that a program has from its birth: a second
// program is attached, and the first goes after it.
//
// What tells of selections for good when the programs are made cannot change: how
// many there are, Closed, and whether any has Netns.

// ErrFixed is wrapped by the errors of Reselect that say what cannot change while
// the Selector is there.
var ErrFixed = errors.New("cannot change while cgtun runs; restart it to apply the file")

// Reselect replaces Options.Selections, and calls what Run was given with the
// picture of that. On an error it is as before, but for cgroups that were made. A
// TakenError says that another instance selects what is new. Run must be
// running, and ctx end when it does.
func (s *Selector) Reselect(ctx context.Context, selections []Selection) error {
	a := ask{selections, make(chan error, 1)}
	select {
	case s.asks <- a:
	case <-ctx.Done():
		return fmt.Errorf("select otherwise: %w", ctx.Err())
	}
	return <-a.done
}

// ask is for Reselect, and done once Run has told of the picture.
type ask struct {
	selections []Selection
	done       chan error
}

// CanReselect says what stands against other selections. It changes nothing.
func (s *Selector) CanReselect(selections []Selection) error {
	_, _, err := s.next(selections)
	return err
}

// next are options with other selections, and their picker.
func (s *Selector) next(selections []Selection) (*Options, *picker, error) {
	o := s.opts
	o.Selections = selections
	o, err := o.checked()
	if err != nil {
		return nil, nil, err
	}
	before := s.now()
	if len(o.Selections) != len(before.Selections) {
		return nil, nil, fmt.Errorf("the number of selections %w", ErrFixed)
	}
	named := func(o *Options) bool {
		return slices.ContainsFunc(o.Selections, func(one Selection) bool { return len(one.Netns) > 0 })
	}
	if named(&o) && !named(&s.opts) {
		return nil, nil, fmt.Errorf("select.netns where there was none at the start %w", ErrFixed)
	}
	pick, err := newPicker(o)
	if err != nil {
		return nil, nil, fmt.Errorf("select cgroups: %w", err)
	}
	for i, one := range o.Selections {
		if one.Closed != before.Selections[i].Closed {
			return nil, nil, fmt.Errorf("on_exit %w", ErrFixed)
		}
	}
	s.mu.Lock()
	self, moved := s.self, s.home != ""
	s.mu.Unlock()
	if self.Path != "" && !moved && pick.find(self.Path).selection != none {
		return nil, nil, fmt.Errorf("select cgroup %s: cgtun itself is in it, and was before: that %w", self.Path, ErrFixed)
	}
	return &o, pick, s.freeFor(&o, before)
}

// freeFor returns a TakenError if another instance has what is new.
func (s *Selector) freeFor(o, before *Options) error {
	if s.traces == nil {
		return nil
	}
	had := before.plain()
	var want claim
	for _, e := range o.plain() {
		if slices.ContainsFunc(had, func(old entry) bool { return old.path == e.path }) {
			continue
		}
		if len(s.real(e.path)) > maxPathLen {
			return fmt.Errorf("select %s: its path from the real root is longer than %d bytes", e.path, maxPathLen)
		}
		want.paths = append(want.paths, s.real(e.path))
	}
	if len(want.paths) == 0 {
		return nil
	}
	return s.maps.free(o.Instance, want)
}

// reselect is Reselect. Run calls it.
func (s *Selector) reselect(selections []Selection) error {
	s.following.Lock()
	defer s.following.Unlock()
	o, pick, err := s.next(selections)
	if err != nil {
		return err
	}
	for _, e := range o.plain() {
		if !o.Selections[e.selection].Create {
			continue
		}
		if err := s.create(e.path); err != nil {
			return err
		}
	}
	old := s.picked.Load()
	// Who is followed keeps that where nobody has it otherwise.
	entries := slices.DeleteFunc(slices.Clone(old.entries), func(e entry) bool { _, ok := pick.plain[e.path]; return ok })
	next := &chosen{picker: pick.with(entries, old.followed), opts: o, base: pick, entries: entries}
	if err := s.choose(next, old); err != nil {
		return errors.Join(err, s.choose(old, next))
	}
	return nil
}

// choose puts what is chosen in force, in place of old.
func (s *Selector) choose(next, old *chosen) error {
	from, to := s.marks(), make([]uint32, len(next.opts.Selections))
	for i := range to {
		to[i] = next.opts.value(i).Mark
	}
	if s.spaces != nil {
		// The guards come first: nothing may pass before they are there.
		if err := s.spaces.m.guardToo(from, to); err != nil {
			return err
		}
	}
	s.picked.Store(next)
	s.plain = next.opts.plain()
	names := newNames(*next.opts)
	names.warned = s.names.warned
	s.names = names
	if s.traces != nil {
		if err := s.tellKernel(old); err != nil {
			return err
		}
	}
	if s.each != nil {
		was := s.each
		s.each = nil
		if s.useEach(); s.each == nil {
			s.each = was
			return errors.New("the programs of the selected cgroups could not be replaced")
		}
		if err := was.close(); err != nil {
			s.log.Warn("programs of before are left on a cgroup", "err", err)
		}
	}
	if s.spaces != nil {
		s.spaces.m.unguard(from, to)
	}
	return nil
}

// tellKernel tells the kernel what is chosen now.
func (s *Selector) tellKernel(old *chosen) error {
	s.names.resolve(true)
	if err := s.fillNamed(s.namespaces()); err != nil {
		return err
	}
	now := s.picked.Load()
	gone := slices.DeleteFunc(slices.Concat(old.opts.plain(), old.entries), func(e entry) bool { _, ok := now.plain[e.path]; return ok })
	if err := s.retrace(); err != nil {
		return err
	}
	for _, e := range slices.Concat(s.plain, now.entries) {
		if err := s.putPath(e); err != nil {
			return err
		}
	}
	for _, e := range gone {
		if err := s.maps.paths.Delete(newTrieKey(s.real(e.path))); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("unselect %s: %w", e.path, err)
		}
	}
	return errors.Join(s.fill(), s.unselect())
}

// retrace has the program at cgroup_mkdir go by the globs and marks of now.
func (s *Selector) retrace() error {
	before := *s.maps
	s.maps.globs = nil
	err := s.fillMarks(s.prefix)
	if err == nil {
		err = s.turn(nil, nil, s.picker().followed)
	}
	var mkdir io.Closer
	if err == nil {
		mkdir, err = attachTracepoint("cgroup_mkdir", mkdirProgram(s.maps, s.layout))
	}
	if err != nil {
		if s.maps.globs != nil {
			err = errors.Join(err, s.maps.globs.Close())
		}
		s.maps.globs, s.maps.start = before.globs, before.start
		return err
	}
	was := s.traces[len(s.traces)-1]
	s.traces[len(s.traces)-1] = mkdir
	if d := s.spaces; d != nil {
		d.mu.Lock()
		armed := !d.armed.IsZero()
		d.mu.Unlock()
		if armed {
			err = d.settle()
		}
	}
	err = errors.Join(err, was.Close())
	if before.globs != nil {
		err = errors.Join(err, before.globs.Close())
	}
	return err
}
