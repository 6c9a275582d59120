package attach

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
	"cgtun/steer"
)

// State is an attachment as status shows it: one for each route and namespace.
// Of a namespace that is not attached there is one, without a route.
type State struct {
	ID        string // "home", a name of /run/netns, a container's first 12 digits, "netns-INODE"
	Route     string
	Netns     string // its name in /run/netns, if it has one
	Container string // a container's first 12 digits, or those of a step of BuildKit; "": neither
	NetnsIno  uint64
	Device    string
	Kernel    bool   // the kernel routes: there is no device of ours
	All       bool   // everything inside is captured
	State     string // StateUp, …
	Addresses []netip.Prefix
	Bypass    []netip.Prefix
	V4, V6    bool
	Err       error // why what is wanted is not in force; nil: it is
	Missing   error // what the kernel does not offer
	Dropped   steer.Counters
	Since     time.Time
}

// States returns those of all attachments, first home's in the order of the
// routes; none before Run and after.
func (m *Manager) States() []State {
	m.mu.Lock()
	home := m.home
	sites := make([]*site, 0, len(m.sites))
	for _, s := range m.sites {
		sites = append(sites, s)
	}
	m.mu.Unlock()
	if home == nil {
		return nil
	}
	names := netns.Names()
	states := home.states(names)
	slices.SortFunc(sites, func(a, b *site) int { return strings.Compare(a.id, b.id) })
	for _, s := range sites {
		states = append(states, s.states(names)...)
	}
	for _, n := range m.picked.Load().Namespaces {
		if n.Excess != nil {
			id, container := nameOf([]cgroupsel.Namespace{n}, names, m.opts.CgroupPath)
			s := m.newSite(n.Ref, id)
			s.container = container
			s.state, s.err, s.since = StateFailed, n.Excess, time.Time{}
			states = append(states, s.states(names)...)
		}
	}
	return states
}

// states takes the names of all namespaces.
func (s *site) states(names map[uint64]string) []State {
	s.mu.Lock()
	defer s.mu.Unlock()
	base := State{ID: s.id, Netns: names[s.ns.Inode()], Container: s.container, NetnsIno: s.ns.Inode(), State: s.state, Err: s.err, Since: s.since}
	if len(s.attached) == 0 || s.state != StateUp && !s.home() {
		return []State{base}
	}
	states := make([]State, 0, len(s.attached))
	for _, a := range s.attached {
		states = append(states, s.stateOf(a, base))
	}
	return states
}

// stateOf is called with the lock held.
func (s *site) stateOf(a *Attachment, st State) State {
	st.Route, st.Kernel, st.Since, st.State = a.Route, a.kernel(), a.Since, StateUp
	if a.Device != nil {
		st.Device, st.Addresses = a.Device.Name(), a.Device.Addresses()
	}
	st.Bypass = slices.Concat(steer.Builtin(), a.plan.Bypass)
	st.All, st.V4, st.V6 = a.plan.All, !a.plan.No4, a.steering.V6()
	st.Missing = a.steering.Missing()
	if st.Err = cmp.Or(a.err, a.steering.Down()); st.Err != nil {
		st.State = StateFailed
	}
	var err error
	if st.Dropped, err = a.steering.Counters(); err != nil {
		s.m.opts.Logger.Debug("counters of steering could not be read", "attachment", s.id, "err", err)
	}
	return st
}

// Selects says whether the steering in a namespace has a cgroup, by its id.
func (m *Manager) Selects(netnsIno, cgroup uint64) bool {
	m.mu.Lock()
	sites := append(slices.Collect(maps.Values(m.sites)), m.home)
	m.mu.Unlock()
	return slices.ContainsFunc(sites, func(s *site) bool {
		return s != nil && s.ref().Inode() == netnsIno && s.selects(cgroup)
	})
}

func (s *site) selects(cgroup uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.attached {
		if slices.ContainsFunc(a.plan.Cgroups, func(c steer.Cgroup) bool { return c.ID == cgroup }) {
			return true
		}
	}
	return false
}

// find returns an attachment that is served, or nil.
func (m *Manager) find(id string) *Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.sites {
		if s.id == id {
			return s.served()
		}
	}
	if m.home != nil && id == Home {
		return m.home.served()
	}
	return nil
}

func (s *site) served() *Attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.attached {
		if !a.kernel() {
			return a
		}
	}
	return nil
}

// shownDigits is how many digits of its id name a container.
const shownDigits = 12

// nameOf names a namespace: by its name of ip-netns(8), which names has, else by
// the container that its first task is of, as docker and its kin name their
// cgroups. A step of BuildKit is no container, but has an id as one.
func nameOf(news []cgroupsel.Namespace, names map[uint64]string, cgroupPath func(uint64) (string, bool)) (id, container string) {
	ref := news[0].Ref
	var p string
	for _, n := range news {
		if n.Cgroup != 0 && cgroupPath != nil {
			p, _ = cgroupPath(n.Cgroup)
		}
	}
	container, step := containerOf(p)
	switch name := names[ref.Inode()]; {
	case name != "":
		return name, container
	case container != "" && !step:
		return container, container
	}
	return fmt.Sprintf("netns-%d", ref.Inode()), container
}

// The lengths of ids: of containers, in hex, and of BuildKit's steps.
const (
	containerDigits = 64
	stepDigits      = 25
)

// containerOf finds the shown digits of a container or a step in a cgroup's path.
func containerOf(cgroup string) (digits string, step bool) {
	dir, base := path.Split(cgroup)
	base = strings.TrimSuffix(base, ".scope")
	// With systemd: docker-ID.scope, and system.slice:docker:ID for a step.
	ofSteps := path.Base(dir) == "buildkit" || strings.Contains(base, ":docker:")
	if i := strings.LastIndexAny(base, "-:"); i >= 0 {
		base = base[i+1:]
	}
	switch {
	case len(base) == containerDigits && strings.Trim(base, "0123456789abcdef") == "":
		return base[:shownDigits], false
	case len(base) == stepDigits && ofSteps && strings.Trim(base, "0123456789abcdefghijklmnopqrstuvwxyz") == "":
		return base[:shownDigits], true
	}
	return "", false
}
