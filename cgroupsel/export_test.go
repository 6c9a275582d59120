package cgroupsel

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// SelectedIDs lists the ids in the map, with those that are there as "not
// selected".
func (s *Selector) SelectedIDs() map[uint64]uint32 {
	masks := make(map[uint64]uint32)
	var id uint64
	var v value
	for it := s.maps.sel.Iterate(); it.Next(&id, &v); {
		masks[id] = v.Mask
	}
	return masks
}

// SelectedBy tells which selection the map has a cgroup for.
func (s *Selector) SelectedBy(id uint64) (selection int, ok bool) {
	var v value
	if s.maps.sel.Lookup(id, &v) != nil || v.Mask == 0 {
		return none, false
	}
	return int(v.Selection), true
}

// DieFilters has the filters lead nowhere, as they do when a process has died, and
// forgets them.
func (s *Selector) DieFilters() error {
	var errs []error
	for _, there := range s.frames.on {
		errs = append(errs, there.Close())
		clear(there.leaders)
		for _, on := range there.devices {
			on.filter = nil
		}
	}
	return errors.Join(errs...)
}

// FeatureLetGo can be in Options.Without.
const FeatureLetGo = featureLetGo

// Stall makes everything wait that takes the lock of the namespaces, until the
// function that it returns is called.
func (s *Selector) Stall() (goOn func()) {
	s.spaces.mu.Lock()
	return s.spaces.mu.Unlock
}

// SetBeat writes the sign of life of the reader. It is for the time when Run
// has returned.
func (s *Selector) SetBeat(at uint64) { s.spaces.beat(at) }

// BreakRecords makes the next read of records fail: what the reader waits by is
// another file then.
func (s *Selector) BreakRecords() error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	all, err := os.ReadDir("/proc/self/fdinfo")
	if err != nil {
		return err
	}
	ring := regexp.MustCompile(fmt.Sprintf(`(?m)^tfd: +%d `, s.spaces.m.seen.FD()))
	for _, e := range all {
		info, err := os.ReadFile("/proc/self/fdinfo/" + e.Name())
		if err != nil || !ring.Match(info) {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return err
		}
		return unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC)
	}
	return errors.New("nobody waits for records")
}

// Entries counts what is in the maps of namespaces.
func (s *Selector) Entries() (known, guards, held int) {
	count := func(m *ebpf.Map) (n int) {
		var key, value []byte
		for it := m.Iterate(); it.Next(&key, &value); {
			n++
		}
		return n
	}
	return count(s.spaces.m.known), count(s.spaces.m.guard), count(s.spaces.m.held)
}

// ParseMounts and Within are tested on their own.
var (
	ParseMounts = parseMounts
	Within      = within
)

// MountLine makes what ParseMounts returns readable.
func (m mount) String() string { return m.root + " " + m.dir + " " + m.options }

// LookEvery sets how often Run looks without having been told to. Before Run.
func (s *Selector) LookEvery(d time.Duration) { s.every = d }

// Picked returns the selection that a path belongs to, and where it begins.
func Picked(o Options, cgroup string) (selection int, top string, err error) {
	p, err := newPicker(o)
	if err != nil {
		return none, "", err
	}
	at := p.find(cgroup)
	return at.selection, at.top, nil
}

// SetSender writes who has a socket, as the programs do.
func (s *Selector) SetSender(cookie uint64, pid int, boot uint64) {
	_ = s.maps.senders.Put(cookie, sender{Boot: boot, PID: uint64(pid)})
}

// MakeAgain does what another instance does with a cgroup that it is to make. It
// lives until end is called.
func MakeAgain(path, instance string) (ours []string, end func() error, err error) {
	t, err := openTree()
	if err != nil {
		return nil, nil, err
	}
	ours, err = t.make(path, instance)
	return ours, t.close, err
}

// RemoveFound does what Remove does with a cgroup that was found to be a dead one's.
func RemoveFound(path, instance string) (bool, error) {
	t, err := openTree()
	if err != nil {
		return false, err
	}
	defer t.close()
	return t.removeDead(path, instance)
}

// PickedFollowing is Picked with what is followed from the start.
func PickedFollowing(o Options, name string) (selection int, top string, err error) {
	p, err := newPicker(o)
	if err != nil {
		return none, "", err
	}
	owners := nobody
	for _, f := range o.Followed {
		for way, on := range [wayCount]bool{f.Containers, f.Steps} {
			if on {
				owners[way] = f.Selection
			}
		}
	}
	at := p.with(nil, owners).find(name)
	return at.selection, at.top, nil
}

// FeatureRows are what docs/reliability.md says of features: a row of a table each.
func FeatureRows() (rows []string) {
	for name, f := range facts {
		rows = append(rows, fmt.Sprintf("| %s | %s | %s |", name, f.kernel, f.lost))
	}
	slices.Sort(rows)
	return rows
}

// LetGo lets a process go that is held.
func (s *Selector) LetGo(pid int) { s.spaces.letGo(uint32(pid)) }
