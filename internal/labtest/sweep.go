package labtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"
)

// labName matches the names of namespaces and cgroups of labs, and the pid in
// them.
var labName = regexp.MustCompile(`^lab(\d+)n\d+(-|$)`)

// sweep takes away what test processes left that were killed before their labs
// could be closed: namespaces, with the programs in them, and cgroups whose
// names hold the pid of a process that is no more.
func sweep() error {
	if os.Geteuid() != 0 {
		return nil
	}
	var err error
	names, _ := filepath.Glob("/run/netns/lab*")
	for _, path := range names {
		if name := filepath.Base(path); abandoned(name) {
			endProcesses(&Host{Name: name, Path: path})
			_, e := output("ip", "netns", "del", name)
			err = errors.Join(err, e)
		}
	}
	root, e := cgroupRoot()
	if e != nil {
		return err // then no lab has made any
	}
	dirs, _ := filepath.Glob(filepath.Join(root, "lab*"))
	for _, dir := range dirs {
		if abandoned(filepath.Base(dir)) {
			(&cgroupTree{root: root, base: dir}).remove()
		}
	}
	return err
}

func abandoned(name string) bool {
	m := labName.FindStringSubmatch(name)
	if m == nil {
		return false
	}
	var pid int
	if _, err := fmt.Sscan(m[1], &pid); err != nil {
		return false
	}
	return errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}
