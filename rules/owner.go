package rules

import (
	"os/user"
	"path"
	"slices"
	"strconv"
	"strings"

	"cgtun/flow"
)

// ownerCond is what a rule wants of the process behind a flow: of each kind
// that has a value, one of them.
type ownerCond struct {
	cgroups   []glob
	processes []string // names, or absolute paths
	byUser    bool
	users     []uint32 // empty, too, if this machine knows none of the names
}

// ownerOf returns what a rule wants of the process, nil if nothing.
func ownerOf(c *Config) (*ownerCond, error) {
	if len(c.Cgroup) == 0 && len(c.Process) == 0 && len(c.User) == 0 {
		return nil, nil
	}
	o := &ownerCond{processes: slices.Clone(c.Process), byUser: len(c.User) > 0}
	for _, pattern := range c.Cgroup {
		g, err := newGlob(pattern)
		if err != nil {
			return nil, err
		}
		o.cgroups = append(o.cgroups, g)
	}
	for _, name := range c.User {
		if uid, ok := uidOf(name); ok {
			o.users = append(o.users, uid)
		}
	}
	return o, nil
}

// ask says whether a rule matches, or what it has to know for that.
func (c *ownerCond) ask(f *Facts) (yes bool, missing Fact) {
	switch {
	case f.Known&FactOwner != 0:
		return c.match(f.Owner), 0
	case f.Known&FactCgroup == 0:
		return false, FactOwner
	case f.Owner == nil || !c.matchCgroup(f.Owner.Cgroup):
		return false, 0
	case c.byUser || len(c.processes) > 0:
		return false, FactOwner
	}
	return true, 0
}

// match says whether an owner is meant, or could be if it is lost. What is not
// known of one is not.
func (c *ownerCond) match(o *flow.Owner) bool {
	if o != nil && o.Lost {
		return len(c.cgroups) > 0 || c.byUser
	}
	return o != nil && c.matchCgroup(o.Cgroup) && c.matchProcess(o.Process) &&
		(!c.byUser || slices.Contains(c.users, o.UID))
}

func (c *ownerCond) matchCgroup(cgroup string) bool {
	for i := range c.cgroups {
		if cgroup != "" && c.cgroups[i].match(cgroup) {
			return true
		}
	}
	return len(c.cgroups) == 0
}

// matchProcess takes a program's path, or a name where that is not known.
func (c *ownerCond) matchProcess(process string) bool {
	name := process[strings.LastIndexByte(process, '/')+1:]
	for _, want := range c.processes {
		if process != "" && (want == process || want == name) {
			return true
		}
	}
	return len(c.processes) == 0
}

// uidOf is the number of a user, false if this machine has none of that name.
func uidOf(name string) (uint32, bool) {
	if u, err := user.Lookup(name); err == nil {
		name = u.Uid
	}
	number, err := strconv.ParseUint(name, 10, 32)
	return uint32(number), err == nil
}

// isProcess says whether text can be a value of Process.
func isProcess(text string) bool { return !strings.Contains(text, "/") || path.IsAbs(text) }
