package cgroupsel

import (
	"errors"
	"os"
	"slices"
)

// create makes a selected cgroup if it is missing, and remembers what is ours.
func (s *Selector) create(name string) error {
	ours, err := s.tree.make(name, s.opts.Instance)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range ours {
		if !slices.Contains(s.created, p) {
			s.created = append(s.created, p)
		}
	}
	return err
}

// removeCreated removes those of created that are empty, children first.
func (s *Selector) removeCreated(created []string) error {
	var errs []error
	for _, p := range slices.Backward(created) {
		removed, err := s.tree.removeOurs(p, s.opts.Instance)
		if err == nil && !removed {
			s.log.Info("cgroup stays: it is in use", "cgroup", p)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Leftover is a cgroup that an instance of cgtun made.
type Leftover struct {
	Path     string
	ID       uint64
	Instance string
	Alive    bool // who made it runs
}

// Find lists the cgroups that these instances made, or any instance if none is
// named: of live ones too, parents first. It needs no Selector.
func Find(instances ...string) ([]Leftover, error) {
	t, err := openTree()
	if err != nil {
		return nil, err
	}
	defer t.close()
	return t.find(instances)
}

func (t *tree) find(instances []string) ([]Leftover, error) {
	var found []Leftover
	err := t.walk("/", func(name string, dir *os.File) error {
		by := owner(dir)
		if by == "" || (len(instances) > 0 && !slices.Contains(instances, by)) {
			return nil
		}
		id, err := inode(dir)
		found = append(found, Leftover{Path: name, ID: id, Instance: by, Alive: isHeld(dir)})
		return err
	})
	return found, err
}

// Remove removes the cgroups that dead runs of an instance made, children first,
// and returns those that it removed. It leaves those of a live one, and what
// has processes or children of others in it.
func Remove(instance string) ([]string, error) {
	t, err := openTree()
	if err != nil {
		return nil, err
	}
	defer t.close()
	found, err := t.find([]string{instance})
	if err != nil {
		return nil, err
	}
	var removed []string
	var errs []error
	for _, l := range slices.Backward(found) {
		if l.Alive {
			continue
		}
		ok, err := t.removeDead(l.Path, instance)
		if ok {
			removed = append(removed, l.Path)
		}
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}
