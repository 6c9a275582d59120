package cgroupsel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"cgtun/internal/netns"

	"github.com/cilium/ebpf"
)

const (
	pathsMap = "cgtun_paths" // the trie's name: how instances find each other
	selMap   = "cgtun_sel"   // that of the map of selected cgroups
	// lingers is how long the programs and maps of a killed instance can stay:
	// the kernel takes them away in the background.
	lingers = 2 * time.Second
	// holds is how long a process has a map open that is its own. Others open
	// it for a moment when they start.
	holds = 200 * time.Millisecond
)

// pathValue is what the trie holds. The instance is for other instances, not
// for the programs.
type pathValue struct {
	Value    value
	Bits     uint32 // those of the key
	_        uint32
	Instance [maxInstance]byte
}

// The offset of Bits, and the size of it all.
const (
	pathValueBits  = valueBytes
	pathValueBytes = valueBytes + 8 + maxInstance
)

// TakenError says that another live instance selects a cgroup, or one above or
// below it. Paths are from the real root of cgroup2.
type TakenError struct {
	Cgroup   string // what was asked for
	Held     string // what the other selects
	Instance string // the other; "": not known
	PID      int    // its process; 0: not visible from here
}

func (e *TakenError) Error() string {
	who := "another instance"
	if e.Instance != "" {
		who = "instance " + e.Instance
	}
	if e.PID != 0 {
		who += fmt.Sprintf(" (process %d)", e.PID)
	}
	return fmt.Sprintf("select cgroup %s: %s selects %s; choose another cgroup or stop that one", e.Cgroup, who, e.Held)
}

// claim is what a selector wants: plain paths from the real root, and cgroups
// that exist. Globs of two instances can meet later; who marks last wins then.
type claim struct {
	paths []string
	ids   map[uint64]string // with their paths
}

// free returns a TakenError if another selector has a part of a claim: soon if
// the process that has it is seen, else when it should have gone if it were
// dead. The own trie has to be filled before: of two that start together, one
// at least sees the other. What a dead instance of this name pinned is no other.
func (m *maps) free(instance string, want claim) error {
	own, err := m.paths.Info()
	if err != nil {
		return fmt.Errorf("look for other instances: %w", err)
	}
	self, _ := own.ID()
	sel, err := m.sel.Info()
	if err != nil {
		return fmt.Errorf("look for other instances: %w", err)
	}
	selfSel, _ := sel.ID()
	home, err := netns.Home()
	if err != nil {
		return fmt.Errorf("look for other instances: %w", err)
	}
	pinned, err := pinnedMaps(home.Cookie(), instance)
	if err != nil {
		return err
	}
	pass := map[ebpf.MapID]bool{self: true, selfSel: true}
	start := time.Now()
	seen, since := 0, start // who holds it, and since when
	for ; ; time.Sleep(20 * time.Millisecond) {
		taken, trie := overlap(pass, want)
		if taken == nil {
			return nil
		}
		taken.PID = holderOf(trie)
		if taken.PID == 0 && pinned[trie] {
			pass[trie] = true // ours, and dead
			continue
		}
		if taken.PID != seen {
			seen, since = taken.PID, time.Now()
		}
		if time.Since(start) > lingers || seen != 0 && time.Since(since) > holds {
			return taken
		}
	}
}

// overlap looks at the maps of all selectors on this machine but those to be
// passed over, and returns the first that is in the way, too. What cannot be read is passed
// over: it ended meanwhile.
func overlap(pass map[ebpf.MapID]bool, want claim) (*TakenError, ebpf.MapID) {
	for _, kind := range []string{pathsMap, selMap} { // tries tell more
		for id, err := ebpf.MapGetNextID(0); err == nil; id, err = ebpf.MapGetNextID(id) {
			if pass[id] {
				continue
			}
			if taken := overlapOne(id, kind, want); taken != nil {
				return taken, id
			}
		}
	}
	return nil, 0
}

func overlapOne(id ebpf.MapID, kind string, want claim) *TakenError {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil
	}
	defer m.Close()
	info, err := m.Info()
	switch {
	case err != nil || info.Name != kind:
		return nil
	case kind == selMap && m.ValueSize() == valueBytes:
		return overlapIDs(m, want.ids)
	case m.ValueSize() != uint32(binary.Size(pathValue{})):
		return nil
	}
	var key trieKey
	var v pathValue
	for it := m.Iterate(); it.Next(&key, &v); {
		held := key.path()
		for _, p := range want.paths {
			if within(p, held) || within(held, p) {
				instance, _, _ := bytes.Cut(v.Instance[:], []byte{0})
				return &TakenError{Cgroup: p, Held: held, Instance: string(instance)}
			}
		}
	}
	return nil
}

// overlapIDs finds what globs select already.
func overlapIDs(sel *ebpf.Map, ids map[uint64]string) *TakenError {
	for id, name := range ids {
		var v value
		if sel.Lookup(id, &v) == nil && v.Mask != 0 {
			return &TakenError{Cgroup: name, Held: name}
		}
	}
	return nil
}

// trieKey is a path with a slash at its end, as cgroup_mkdir's program makes
// it, behind its length in bits.
type trieKey struct {
	Bits uint32
	Path [pathBytes]byte
}

func newTrieKey(name string) trieKey {
	if name != "/" {
		name += "/"
	}
	k := trieKey{Bits: uint32(8 * len(name))}
	copy(k.Path[:], name)
	return k
}

func (k *trieKey) path() string {
	name := string(k.Path[:min(k.Bits/8, pathBytes)])
	if name == "/" {
		return name
	}
	return strings.TrimSuffix(name, "/")
}

// isTaken tells a conflict from a kernel that refuses.
func isTaken(err error) bool {
	var taken *TakenError
	return errors.As(err, &taken)
}
