package cgroupsel

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// ErrNotSelected is what Join says of a cgroup that is not selected: to move a
// process there would leave it uncaptured.
var ErrNotSelected = errors.New("cgroup is not selected")

// Join moves a process, with all its threads, into a selected cgroup, which it
// makes if it is missing and Options.Create is set. The pidfd names the
// process (pidfd_open(2), SO_PEERPIDFD): a number could be another's by now.
// Sockets that the process has keep their cgroup, but are marked when they are
// connected. Where Held is false, what the process sends is captured once the
// steering has been given a Snapshot with the cgroup that is returned.
func (s *Selector) Join(cgroup string, pidfd *os.File) (Cgroup, error) {
	selection, ok := s.Selected(cgroup)
	if !ok {
		return Cgroup{}, fmt.Errorf("join %s: %w", cgroup, ErrNotSelected)
	}
	err := s.moveTo(cgroup, pidfd)
	if errors.Is(err, fs.ErrNotExist) && s.now().Selections[selection].Create {
		if err := s.create(cgroup); err != nil {
			return Cgroup{}, err
		}
		err = s.moveTo(cgroup, pidfd)
	}
	if err != nil {
		return Cgroup{}, err
	}
	return s.topOf(cgroup)
}

// topOf is the cgroup of a Snapshot that a selected one is within, as it is
// now.
func (s *Selector) topOf(cgroup string) (Cgroup, error) {
	at, _ := s.covering(cgroup)
	return s.newest(at.top, at.selection)
}

// Leave moves a process to the root of the tree, out of all selected cgroups.
// Its sockets keep their marks.
func (s *Selector) Leave(pidfd *os.File) error {
	if _, all := s.Selected("/"); all {
		return errors.New(`leave: all cgroups are selected ("/")`)
	}
	return s.moveTo("/", pidfd)
}

// moveTo looks at the pidfd before and after: if the process still lives then,
// nobody else had its number in between.
func (s *Selector) moveTo(cgroup string, pidfd *os.File) error {
	pid, err := pidOf(pidfd)
	if err != nil {
		return err
	}
	if err := s.tree.move(cgroup, strconv.Itoa(pid)); err != nil {
		return err
	}
	_, err = pidOf(pidfd)
	return err
}

// pidOf reads the process of a pidfd: proc_pid_fdinfo(5).
func pidOf(pidfd *os.File) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd.Fd()))
	if err != nil {
		return 0, fmt.Errorf("read pidfd: %w", err)
	}
	for line := range bytes.Lines(text) {
		value, ok := strings.CutPrefix(string(line), "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(value))
		switch {
		case err != nil:
			return 0, fmt.Errorf("read pidfd: %w", err)
		case pid < 0:
			return 0, fmt.Errorf("find process: %w", os.ErrProcessDone)
		case pid == 0:
			return 0, errors.New("find process: it is in a pid namespace that is not seen from here")
		}
		return pid, nil
	}
	return 0, errors.New("read pidfd: it is none")
}
