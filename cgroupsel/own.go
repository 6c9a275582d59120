package cgroupsel

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"golang.org/x/sys/unix"
)

// Self is the cgroup that this process is in, if its sockets can be told from
// captured ones by it: steer exempts what is in it. It is false if the cgroup
// is the root of the tree or can have a selected one below it; then no socket
// of ours is in a selected cgroup, and nothing needs to be exempt.
func (s *Selector) Self() (Cgroup, bool) {
	s.mu.Lock()
	self, moved := s.self, s.home != ""
	s.mu.Unlock()
	if !self.Present || self.Level == 0 {
		return Cgroup{}, false
	}
	at := s.picker().find(self.Path)
	return self, moved || at.selection == none && !s.picker().mayBegin(at)
}

// stepOut finds our own cgroup. If it is selected, or namespaces are, this
// process moves into a child of it that is not.
func (s *Selector) stepOut() error {
	home, err := cgroupOf("self")
	if err != nil {
		return err
	}
	// In a selected namespace our sockets are known by our cgroup alone.
	if _, selected := s.inSelection(home); !selected && len(s.names.all) == 0 {
		id, err := s.tree.id(home)
		s.setSelf(Cgroup{Path: home, ID: id, Level: level(home), Present: err == nil}, "")
		return nil
	}
	own := path.Join(home, ".cgtun-"+s.opts.Instance)
	if err := s.makeOwn(own); err != nil {
		return err
	}
	id, err := s.tree.id(own)
	if err != nil {
		return err
	}
	// cgroup_mkdir's program selected it like any child. An entry is written
	// even if the tracepoints are not there: it costs nothing.
	if s.maps != nil {
		if err := s.maps.sel.Put(id, value{}); err != nil {
			return errors.Join(fmt.Errorf("exempt own cgroup %s: %w", own, err), s.tree.remove(own))
		}
	}
	if err := s.tree.move(own, "0"); err != nil {
		err = fmt.Errorf("leave cgroup %s (start cgtun in a cgroup that is not selected): %w", home, err)
		return errors.Join(err, s.tree.remove(own))
	}
	s.setSelf(Cgroup{Path: own, ID: id, Level: level(own), Present: true}, home)
	s.log.Info("cgtun moved into a cgroup of its own, which is never captured", "cgroup", own)
	return nil
}

// makeOwn makes the child that we move to, or takes over a dead instance's.
func (s *Selector) makeOwn(own string) error {
	ours, err := s.tree.make(own, s.opts.Instance)
	if err != nil {
		return fmt.Errorf("make own cgroup: %w", err)
	}
	if !slices.Contains(ours, own) {
		return fmt.Errorf("make own cgroup: %s is there and is not of instance %s; remove it", own, s.opts.Instance)
	}
	return nil
}

// isOwn says whether a path is the cgroup that this process moved to.
func (s *Selector) isOwn(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.home != "" && name == s.self.Path
}

func (s *Selector) setSelf(c Cgroup, home string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.self, s.home = c, home
}

// exempt is the id of our own cgroup if it is below a selected one, else 0.
func (s *Selector) exempt() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.home == "" {
		return 0
	}
	return s.self.ID
}

// stepBack undoes stepOut.
func (s *Selector) stepBack() error {
	s.mu.Lock()
	own, home := s.self, s.home
	s.home = ""
	s.mu.Unlock()
	if home == "" {
		return nil
	}
	if err := s.tree.move(home, "0"); err != nil {
		return fmt.Errorf("go back to the cgroup that cgtun was started in: %w", err)
	}
	err := s.tree.remove(own.Path)
	if errors.Is(err, unix.EBUSY) {
		// Children of this process are still in it; cleanup takes it later.
		s.log.Warn("own cgroup stays: a process is in it", "cgroup", own.Path)
		return nil
	}
	return err
}
