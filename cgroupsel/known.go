package cgroupsel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
)

const (
	// maxKnown bounds the namespaces that the gate tells apart: those of the
	// Snapshot and select.netns.
	maxKnown = 8192
	// maxGuards bounds the tuns that the guard lets marked packets leave by.
	maxGuards = 4096
	// maxHeld bounds the processes that are stopped at one time; the next one
	// goes on and the gate decides.
	maxHeld = 1024
	// seenBytes is the size of the ring of records, a power of two: 1,300 of them.
	seenBytes = 64 << 10
)

// What the gate knows of a namespace. One without an entry is unknown.
const (
	knownPass   = 1 << iota // attached, offline or never ours: passes
	knownShut               // denied, or nothing came in time: nothing of a selected cgroup passes
	knownWaived             // above the bounds: on_exit of the selection decides
	knownTell               // say once when a selected task does something there
	knownDoubt4             // undecided again as to IPv4: who begins to send is held
	knownDoubt6             // the same for IPv6
)

// knownDoubts are the flags of Doubt.
const knownDoubts = knownDoubt4 | knownDoubt6

// known is what the map holds by namespace cookie.
type known struct{ Flags, _ uint32 }

// guardKey and its device say by which interface packets with a mark may
// leave a namespace.
type guardKey struct {
	Cookie uint64
	Mark   uint32
	_      uint32
}

// stopped is what the map of held processes has for a tgid.
type stopped struct {
	Cookie uint64
	Since  uint64 // CLOCK_MONOTONIC, nanoseconds
}

// Slots of spaceMaps.count.
const (
	countDrop  = iota // dropped by the gate
	countGuard        // dropped by the guard
	countLost         // records that the ring had no room for
	countStop         // stopped tasks
	countSpaces
)

// spaceMaps are the maps of discovery, hold and gate.
type spaceMaps struct {
	known *ebpf.Map // cookie → known
	guard *ebpf.Map // guardKey → ifindex
	held  *ebpf.Map // tgid → stopped
	order *ebpf.Map // queue of the tgids in held, with some that are not there any more
	seen  *ebpf.Map // ring of records
	beat  *ebpf.Map // one u64: when the reader was last alive, as ktime
	count *ebpf.Map
	// cookies is a storage of sockets with the cookie of their namespace; nil:
	// the kernel tells the gate by itself.
	cookies *ebpf.Map
}

func newSpaceMaps() (*spaceMaps, error) {
	m := &spaceMaps{}
	for _, spec := range []struct {
		to **ebpf.Map
		ebpf.MapSpec
	}{
		{&m.known, ebpf.MapSpec{Name: "cgtun_known", Type: ebpf.Hash, KeySize: 8, ValueSize: uint32(binary.Size(known{})), MaxEntries: maxKnown}},
		{&m.guard, ebpf.MapSpec{Name: "cgtun_guard", Type: ebpf.Hash, KeySize: uint32(binary.Size(guardKey{})), ValueSize: 4, MaxEntries: maxGuards}},
		{&m.held, ebpf.MapSpec{Name: "cgtun_held", Type: ebpf.Hash, KeySize: 4, ValueSize: uint32(binary.Size(stopped{})), MaxEntries: maxHeld}},
		{&m.order, ebpf.MapSpec{Name: "cgtun_order", Type: ebpf.Queue, ValueSize: 4, MaxEntries: maxHeld}},
		{&m.seen, ebpf.MapSpec{Name: "cgtun_seen", Type: ebpf.RingBuf, MaxEntries: seenBytes}},
		{&m.beat, ebpf.MapSpec{Name: "cgtun_beat", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}},
		{&m.count, ebpf.MapSpec{Name: "cgtun_gatecount", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: countSpaces}},
	} {
		made, err := ebpf.NewMap(&spec.MapSpec)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make map %s: %w", spec.Name, err), m.Close())
		}
		*spec.to = made
	}
	return m, nil
}

// Close lets the maps go; programs that are still attached keep theirs.
func (m *spaceMaps) Close() error {
	var errs []error
	for _, one := range []*ebpf.Map{m.known, m.guard, m.held, m.order, m.seen, m.beat, m.count, m.cookies} {
		if one != nil {
			errs = append(errs, one.Close())
		}
	}
	return errors.Join(errs...)
}

// counter reads a slot of count. Only a closed map fails, as zero.
func (m *spaceMaps) counter(slot uint32) (n uint64) {
	_ = m.count.Lookup(slot, &n)
	return n
}

// setGuard sets by which device packets with a mark may leave; 0: by any.
func (m *spaceMaps) setGuard(key guardKey, device uint32) error {
	if device != 0 {
		return m.guard.Put(key, device)
	}
	if err := m.guard.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// forget takes a namespace and its guards out.
func (m *spaceMaps) forget(cookie uint64, marks []uint32) error {
	errs := []error{m.known.Delete(cookie)}
	for _, mark := range marks {
		errs = append(errs, m.guard.Delete(guardKey{Cookie: cookie, Mark: mark}))
	}
	for i, err := range errs {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			errs[i] = nil
		}
	}
	return errors.Join(errs...)
}

// marks are those of the selections, in their order.
func (s *Selector) marks() []uint32 {
	o := s.now()
	marks := make([]uint32, len(o.Selections))
	for i := range marks {
		marks[i] = o.value(i).Mark
	}
	return marks
}

// guardToo has packets with the marks of to guarded as those with from, each in
// its place, wherever these are.
func (m *spaceMaps) guardToo(from, to []uint32) error {
	also := make(map[guardKey]uint32)
	var key guardKey
	var device uint32
	for it := m.guard.Iterate(); it.Next(&key, &device); {
		if i := slices.Index(from, key.Mark); i >= 0 && to[i] != from[i] {
			also[guardKey{Cookie: key.Cookie, Mark: to[i]}] = device
		}
	}
	for key, device := range also {
		if err := m.guard.Put(key, device); err != nil {
			return fmt.Errorf("guard another mark: %w", err)
		}
	}
	return nil
}

// unguard takes out the marks of from that are none of to.
func (m *spaceMaps) unguard(from, to []uint32) {
	var old []guardKey
	var key guardKey
	var device uint32
	for it := m.guard.Iterate(); it.Next(&key, &device); {
		if slices.Contains(from, key.Mark) && !slices.Contains(to, key.Mark) {
			old = append(old, key)
		}
	}
	for _, key := range old {
		_ = m.guard.Delete(key) // it guards what nobody sends any more
	}
}

// addTo fills in what the kernel and the reader counted.
func (d *spaces) addTo(c *Counters) {
	if d == nil {
		return
	}
	c.GateDrops, c.GuardDrops = d.m.counter(countDrop), d.m.counter(countGuard)
	c.Lost, c.Held = d.m.counter(countLost), d.m.counter(countStop)
	d.mu.Lock()
	defer d.mu.Unlock()
	c.Late, c.Excess = d.late, d.excess
}
