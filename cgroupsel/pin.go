package cgroupsel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// # Theory of operation: what outlives us
//
// With a closed Selection everything that selects, marks, shuts and guards is
// pinned in a bpffs: the tracepoints of cgroups, the socket programs, the gate.
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
// being filled. A bpffs takes no dot.
const (
	pinPrefix  = "cgtun_"
	fillPrefix = "cgtunfill_"
)

// Pins are what an instance pinned.
type Pins struct {
	Instance string
	Dir      string // as seen from the mount namespace that it is in
	Objects  int
}

// FindPins lists what these instances pinned, or any instance if none is named:
// also of live ones. It needs no Selector.
func FindPins(instances ...string) ([]Pins, error) {
	var found []Pins
	err := eachPlace(func(dir string) error {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			prefix, instance, _ := strings.Cut(e.Name(), "_")
			if prefix+"_" != pinPrefix && prefix+"_" != fillPrefix || !e.IsDir() || (len(instances) > 0 && !slices.Contains(instances, instance)) {
				continue
			}
			p := Pins{Instance: instance, Dir: filepath.Join(dir, e.Name())}
			objects, err := os.ReadDir(p.Dir)
			if err != nil {
				return err
			}
			p.Objects = len(objects)
			found = append(found, p)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for pinned programs: %w", err)
	}
	return found, nil
}

// RemovePins takes away what a dead instance pinned, and so opens what it left
// closed. It reports whether there was anything. It is for the caller to know
// that the instance is dead.
func RemovePins(instance string) (bool, error) {
	removed := false
	err := eachPlace(func(dir string) error {
		for _, name := range pinDirs(instance) {
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

func pinDirs(instance string) []string {
	return []string{pinPrefix + instance, fillPrefix + instance}
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
	if len(d.s.opts.closed()) == 0 {
		_, err := RemovePins(instance)
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
	dir, fill := filepath.Join(p.dir, pinPrefix+instance), filepath.Join(p.dir, fillPrefix+instance)
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
		for name, all := range map[string]hooks{"cgroups": d.s.traces, "sockets": d.s.root, "gate": d.arms} {
			if err := all.pin(filepath.Join(fill, name)); err != nil {
				return err
			}
		}
		if _, err := removePins(dir); err != nil {
			return err
		}
		return os.Rename(fill, dir)
	})
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

// pinnedTries are the maps by which a dead instance of the same name seems to
// select. One that a process has open is not dead.
func pinnedTries(instance string) (map[ebpf.MapID]bool, error) {
	tries := make(map[ebpf.MapID]bool)
	err := eachPlace(func(dir string) error {
		for _, name := range pinDirs(instance) {
			links, err := os.ReadDir(filepath.Join(dir, name))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			for _, lk := range links {
				for _, id := range mapsOf(filepath.Join(dir, name, lk.Name())) {
					tries[id] = holderOf(id) == 0
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for pinned programs: %w", err)
	}
	return tries, nil
}

// mapsOf lists the maps of the program of a pinned link. What cannot be read is
// passed over: then the instance counts as live.
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
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil
	}
	defer p.Close()
	about, err := p.Info()
	if err != nil {
		return nil
	}
	ids, _ := about.MapIDs()
	return ids
}
