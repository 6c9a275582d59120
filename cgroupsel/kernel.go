package cgroupsel

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// maps are those of one selector. They live as long as a program or a
// descriptor refers to them.
type maps struct {
	sel     *ebpf.Map // cgroup id → value
	paths   *ebpf.Map // trie of "/a/b/" → pathValue
	globs   *ebpf.Map // the automaton's table; nil: there are no globs and units
	start   int32     // its first row
	marks   *ebpf.Map // selection → value, of what the automaton matches
	news    *ebpf.Map // ring of ids of cgroups that were selected or forgotten
	named   *ebpf.Map // cookie of a network namespace → value; nil: none is selected
	senders *ebpf.Map // socket cookie → sender; nil: this kernel does not tell
	scratch *ebpf.Map // per CPU: the trie key being made, too large for the stack
	count   *ebpf.Map // counters
}

func newMaps(cgroups int) (*maps, error) {
	m := &maps{}
	for _, spec := range []struct {
		to **ebpf.Map
		ebpf.MapSpec
	}{
		// Preallocated (no flag): an update in cgroup_mkdir never waits for
		// memory and never fails for want of it.
		{&m.sel, ebpf.MapSpec{Name: selMap, Type: ebpf.Hash, KeySize: 8, ValueSize: valueBytes, MaxEntries: uint32(cgroups)}},
		{&m.paths, ebpf.MapSpec{Name: pathsMap, Type: ebpf.LPMTrie, KeySize: 4 + pathBytes, ValueSize: pathValueBytes, MaxEntries: maxPaths, Flags: noPrealloc}},
		{&m.marks, ebpf.MapSpec{Name: "cgtun_marks", Type: ebpf.Array, KeySize: 4, ValueSize: valueBytes, MaxEntries: maxSelections + wayCount}},
		{&m.news, ebpf.MapSpec{Name: "cgtun_news", Type: ebpf.RingBuf, MaxEntries: newsBytes}},
		{&m.senders, ebpf.MapSpec{Name: "cgtun_senders", Type: ebpf.LRUHash, KeySize: 8, ValueSize: senderBytes, MaxEntries: maxSenders}},
		{&m.scratch, ebpf.MapSpec{Name: "cgtun_scratch", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8 + pathBytes, MaxEntries: 1}},
		{&m.count, ebpf.MapSpec{Name: "cgtun_count", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: countEntries}},
	} {
		made, err := ebpf.NewMap(&spec.MapSpec)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make map %s: %w", spec.Name, err), m.Close())
		}
		*spec.to = made
	}
	return m, nil
}

const (
	// noPrealloc is BPF_F_NO_PREALLOC, which a trie wants.
	noPrealloc = 1
	// newsBytes is a page of any size that there is, and a power of two.
	newsBytes = 64 << 10
)

// addNamed makes the map of selected namespaces.
func (m *maps) addNamed() (err error) {
	m.named, err = ebpf.NewMap(&ebpf.MapSpec{Name: "cgtun_named", Type: ebpf.Hash, KeySize: 8, ValueSize: valueBytes, MaxEntries: maxNamed})
	if err != nil {
		return fmt.Errorf("make map cgtun_named: %w", err)
	}
	return nil
}

// setGlobs puts an automaton where the program at cgroup_mkdir finds it.
func (m *maps) setGlobs(a *automaton) error {
	made, err := ebpf.NewMap(&ebpf.MapSpec{Name: "cgtun_globs", Type: ebpf.Array, KeySize: 4, ValueSize: classBytes + cellsBytes, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("make map cgtun_globs: %w", err)
	}
	m.globs, m.start = made, int32(a.start)
	if err := made.Put(uint32(0), &a.table); err != nil {
		return fmt.Errorf("fill map cgtun_globs: %w", err)
	}
	return nil
}

func (m *maps) Close() error {
	var errs []error
	for _, one := range []*ebpf.Map{m.sel, m.paths, m.globs, m.marks, m.news, m.named, m.senders, m.scratch, m.count} {
		if one != nil {
			errs = append(errs, one.Close())
		}
	}
	return errors.Join(errs...)
}

// hooks are attached programs. None is pinned: all end with the process.
type hooks []io.Closer

// Close detaches, the last attached first.
func (h hooks) Close() error {
	var errs []error
	for i := len(h) - 1; i >= 0; i-- {
		errs = append(errs, h[i].Close())
	}
	return errors.Join(errs...)
}

// attachTracepoints makes the kernel keep sel by itself from here on.
func attachTracepoints(m *maps, l *layout) (hooks, error) {
	var h hooks
	for _, one := range []struct {
		name string
		spec *ebpf.ProgramSpec
	}{
		{"cgroup_release", releaseProgram(m, l)},
		{"cgroup_mkdir", mkdirProgram(m, l)},
	} {
		lk, err := attachTracepoint(one.name, one.spec)
		if err != nil {
			return nil, errors.Join(err, h.Close())
		}
		h = append(h, lk)
	}
	return h, nil
}

func attachTracepoint(name string, spec *ebpf.ProgramSpec) (io.Closer, error) {
	lk, err := attach(spec, func(p *ebpf.Program) (io.Closer, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: name, Program: p})
	})
	if err != nil {
		return nil, fmt.Errorf("tracepoint %s: %w", name, err)
	}
	return lk, nil
}

// socketPrograms are what marks the sockets of those whom choose lets through.
func socketPrograms(m *maps, choose chooser) []*ebpf.ProgramSpec {
	return []*ebpf.ProgramSpec{
		createProgram(m, choose),
		connectProgram("cgtun_connect4", ebpf.AttachCGroupInet4Connect, m, choose),
		connectProgram("cgtun_connect6", ebpf.AttachCGroupInet6Connect, m, choose),
	}
}

// tryPrograms loads programs and lets them go again.
func tryPrograms(specs []*ebpf.ProgramSpec) error {
	for _, spec := range specs {
		p, err := ebpf.NewProgram(spec)
		if err != nil {
			return fmt.Errorf("load %s: %w", spec.Name, err)
		}
		p.Close()
	}
	return nil
}

// attachSockets attaches the socket programs to one cgroup: they run for it and
// for all below it.
func attachSockets(dir *os.File, specs []*ebpf.ProgramSpec) (hooks, error) {
	var h hooks
	for _, spec := range specs {
		lk, err := attach(spec, func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: p, Attach: spec.AttachType})
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", spec.AttachType, err), h.Close())
		}
		h = append(h, lk)
	}
	return h, nil
}

// attach loads a program and attaches it. The link alone keeps it loaded.
func attach(spec *ebpf.ProgramSpec, to func(*ebpf.Program) (io.Closer, error)) (io.Closer, error) {
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", spec.Name, err)
	}
	defer p.Close()
	lk, err := to(p)
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("attach %s (another program there may allow no second one: see `bpftool cgroup tree`): %w", spec.Name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", spec.Name, err)
	}
	return lk, nil
}
