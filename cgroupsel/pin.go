package cgroupsel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// # Theory of operation: what outlives us
//
// With a closed Selection everything that selects, marks, shuts and guards for it
// is pinned in a bpffs: the tracepoints of cgroups, its socket programs, its gate.
// Open selections beside it have programs of their own, which end with cgtun.
// So after the end of cgtun, however it came, sockets of selected cgroups still
// get their mark, those of cgroups that are made again, too; and
//
//	unknown namespaces  nobody makes them known any more: the gate is shut
//	known ones          a marked packet may leave by its tun alone, and that
//	                    has gone with us: the guard drops it
//
// Home is such a namespace, if the manager admits it with its device. What has
// no mark goes on as before: answers to what came from outside, and the bypass
// list as long as the steering's table is there to take the mark off.
//
// Discovery and hold are never pinned: nobody would let go.
//
// The pins are a directory per instance, pinDir and its name. A start leaves
// those of its dead predecessor in force until Arm, and takes them away when
// its own gate is shut; there is no time between. RemovePins is for cleanup.

// What the name of the directory of an instance begins with, also while it is
// being filled. Instance and cookie of home follow: in two homes instances can
// have the same number. A bpffs takes no dot.
const (
	pinPrefix  = "cgtun_"
	fillPrefix = "cgtunfill_"
)

// Pins are what an instance pinned.
type Pins struct {
	Instance string
	Home     uint64 // cookie of the network namespace that it was started in
	Dir      string // as seen from the mount namespace that it is in
	Objects  int
	PID      int // the live process that pinned them, 0: it is dead, or not seen from here

	maps []ebpf.MapID
}

// FindPins lists what these instances pinned, or any instance if none is named:
// also of live ones. It needs no Selector.
func FindPins(instances ...string) ([]Pins, error) {
	found, err := findPins(instances)
	for i := range found {
		found[i].PID = found[i].holder()
	}
	return found, err
}

func findPins(instances []string) (found []Pins, err error) {
	err = eachPlace(func(dir string) error {
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			p, ok := parsePins(e.Name())
			if ok && e.IsDir() && (len(instances) == 0 || slices.Contains(instances, p.Instance)) {
				p.Dir = filepath.Join(dir, e.Name())
				p.read()
				found = append(found, p)
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look for pinned programs: %w", err)
	}
	return found, nil
}

// parsePins reads the name of a directory of pins.
func parsePins(name string) (p Pins, ok bool) {
	rest, ok := strings.CutPrefix(name, pinPrefix)
	if !ok {
		rest, ok = strings.CutPrefix(name, fillPrefix)
	}
	i := strings.LastIndexByte(rest, '_')
	if !ok || i < 0 {
		return p, false
	}
	home, err := strconv.ParseUint(rest[i+1:], 10, 64)
	return Pins{Instance: rest[:i], Home: home}, err == nil
}

// read looks into the directory. What cannot be read is passed over: then the
// instance counts as live.
func (p *Pins) read() {
	entries, _ := os.ReadDir(p.Dir)
	p.Objects = len(entries)
	for _, e := range entries {
		p.maps = append(p.maps, mapsOf(filepath.Join(p.Dir, e.Name()))...)
	}
	slices.Sort(p.maps)
	p.maps = slices.Compact(p.maps)
}

// holder is the process that has the map of selected cgroups open, as each live
// selector does.
func (p *Pins) holder() int {
	for _, id := range p.maps {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		info, err := m.Info()
		m.Close() // or we would be the holder
		if err == nil && info.Name == selMap {
			return holderOf(id)
		}
	}
	return 0
}

// RemovePins takes away what a dead instance of a home pinned, and so opens what
// it left closed. It reports whether there was anything. It is for the caller to know
// that the instance is dead.
func RemovePins(home uint64, instance string) (bool, error) {
	removed := false
	err := eachPlace(func(dir string) error {
		for _, name := range pinDirs(home, instance) {
			ok, err := removePins(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			removed = removed || ok
		}
		return nil
	})
	if err != nil {
		return removed, fmt.Errorf("remove pinned programs of instance %s: %w", instance, err)
	}
	return removed, leavePlaces()
}

// pinDirs are the names of the directory, when it is full and while it is filled.
func pinDirs(home uint64, instance string) []string {
	name := fmt.Sprintf("%s_%d", instance, home)
	return []string{pinPrefix + name, fillPrefix + name}
}

// removePins removes a directory of pins. A link that is not pinned any more is
// detached by the kernel unless somebody has it open.
func removePins(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return false, err
		}
	}
	return true, os.Remove(dir)
}

// settle makes pins what they have to be from Arm on: for a closed selection
// those of this selector, else none.
func (d *spaces) settle() error {
	instance := d.s.opts.Instance
	if _, closed := d.s.opts.byExit(); len(closed) == 0 {
		_, err := RemovePins(d.home, instance)
		return err
	}
	return d.s.missing(FeaturePin, d.pin(instance))
}

// pin pins what outlives us, in place of what a dead one did.
func (d *spaces) pin(instance string) error {
	if err := d.s.allowed(FeaturePin); err != nil {
		return err
	}
	p, err := bestPlace()
	if err != nil {
		return err
	}
	if !p.lasting {
		d.s.log.Warn("what is pinned goes with this mount namespace: after a kill it may be open", "dir", p.dir)
	}
	names := pinDirs(d.home, instance)
	dir, fill := filepath.Join(p.dir, names[0]), filepath.Join(p.dir, names[1])
	defer d.s.frames.lock()()
	err = p.in(func() error {
		if err := p.prepare(); err != nil {
			return err
		}
		if _, err := removePins(fill); err != nil {
			return err
		}
		if err := os.Mkdir(fill, 0o700); err != nil {
			return err
		}
		for name, all := range map[string]hooks{"cgroups": d.s.traces, "sockets": d.s.root.closed, "options": d.s.options.closed, "cookies": d.cookies.closed, "gate": d.arms.closed} {
			if err := all.pin(filepath.Join(fill, name)); err != nil {
				return err
			}
		}
		if err := d.s.frames.pin(fill); err != nil {
			return err
		}
		if _, err := removePins(dir); err != nil {
			return err
		}
		return os.Rename(fill, dir)
	})
	if err == nil {
		d.s.frames.keep(func(f func(string) error) error { return p.in(func() error { return f(dir) }) })
	}
	if err != nil {
		return fmt.Errorf("pin programs: %w", errors.Join(err, leavePlaces()))
	}
	d.s.log.Info("pinned: what is selected stays shut when cgtun is gone; `cgtun cleanup` opens it", "dir", dir)
	return nil
}

// pin pins links under a name with a number behind it.
func (h hooks) pin(name string) error {
	for i, one := range h {
		lk, ok := one.(link.Link)
		if !ok {
			return fmt.Errorf("pin %s: it is no link", filepath.Base(name))
		}
		if err := lk.Pin(fmt.Sprintf("%s%d", name, i)); err != nil {
			return fmt.Errorf("pin %s: %w", filepath.Base(name), err)
		}
	}
	return nil
}

// pinnedMaps are those that an instance of this name and home, live or dead,
// pinned.
func pinnedMaps(home uint64, instance string) (map[ebpf.MapID]bool, error) {
	maps := make(map[ebpf.MapID]bool)
	found, err := findPins([]string{instance})
	for _, p := range found {
		if p.Home != home {
			continue
		}
		for _, id := range p.maps {
			maps[id] = true
		}
	}
	return maps, err
}

// mapsOf lists the maps of the program of a pinned link.
func mapsOf(file string) []ebpf.MapID {
	lk, err := link.LoadPinnedLink(file, nil)
	if err != nil {
		return nil
	}
	defer lk.Close()
	info, err := lk.Info()
	if err != nil {
		return nil
	}
	ids, _ := mapsOfProgram(info.Program)
	return ids
}

func mapsOfProgram(id ebpf.ProgramID) ([]ebpf.MapID, error) {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return nil, err
	}
	ids, _ := info.MapIDs()
	return ids, nil
}
