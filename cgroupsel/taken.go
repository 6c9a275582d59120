package cgroupsel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

const (
	pathsMap = "cgtun_paths" // the trie's name: how instances find each other
	// lingers is how long the programs and maps of a killed instance can stay:
	// the kernel takes them away in the background.
	lingers = 2 * time.Second
)

// pathValue is what the trie holds. The programs read the value alone; the
// instance is for other instances.
type pathValue struct {
	Value    value
	Instance [maxInstance]byte
}

// TakenError says that another live instance selects a cgroup, or one above or
// below it. Paths are from the real root of cgroup2.
type TakenError struct {
	Cgroup   string // what was asked for
	Held     string // what the other selects
	Instance string // the other
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("select cgroup %s: instance %s selects %s; choose another cgroup or stop that one", e.Cgroup, e.Instance, e.Held)
}

// free returns a TakenError if another selector overlaps with paths. The own
// trie has to be filled before: of two that start together, one at least sees
// the other.
func (m *maps) free(paths []string) error {
	own, err := m.paths.Info()
	if err != nil {
		return fmt.Errorf("look for other instances: %w", err)
	}
	self, _ := own.ID()
	for end := time.Now().Add(lingers); ; time.Sleep(20 * time.Millisecond) {
		taken := overlap(self, paths)
		if taken == nil {
			return nil
		}
		if time.Now().After(end) {
			return taken
		}
	}
}

// overlap looks at the tries of all selectors on this machine but one's own.
// What cannot be read is passed over: it ended meanwhile.
func overlap(self ebpf.MapID, paths []string) *TakenError {
	for id, err := ebpf.MapGetNextID(0); err == nil; id, err = ebpf.MapGetNextID(id) {
		if id == self {
			continue
		}
		if taken := overlapOne(id, paths); taken != nil {
			return taken
		}
	}
	return nil
}

func overlapOne(id ebpf.MapID, paths []string) *TakenError {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil || info.Name != pathsMap || m.ValueSize() != uint32(binary.Size(pathValue{})) {
		return nil
	}
	var key trieKey
	var v pathValue
	for it := m.Iterate(); it.Next(&key, &v); {
		held := key.path()
		for _, p := range paths {
			if within(p, held) || within(held, p) {
				instance, _, _ := bytes.Cut(v.Instance[:], []byte{0})
				return &TakenError{Cgroup: p, Held: held, Instance: string(instance)}
			}
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
