package cgroupsel

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// # Theory of operation: filters
//
// A filter (tc-bpf(8)) is the other way to have a program at the egress of a device. It
// is there at once, whereas for a link the kernel waits for a grace period of RCU, 11 ms,
// and again when the device ends, and lets nobody on the machine change any device
// meanwhile: who makes containers waits for that.
//
// But a filter is nobody's, and outlives its maker. So it only leads to the program, by
// a map that the kernel empties when its last descriptor is closed: what is left
// does nothing, and is told from what works by that map. RemoveFilters is for cleanup.
// Who may change devices in the namespace can take a filter away. Programs of links come
// before it, and it takes a clsact qdisc, beside which nobody can have an ingress one.

const (
	filterName = "cgtun_frames"
	// madeName is the name of one for which the clsact was made, too.
	madeName = "cgtun_frames_made"
	// filterPriority is the first.
	filterPriority = 1
)

// addFilter makes one at a device of the namespace it runs in.
func addFilter(device int, by *leader) (f *netlink.BpfFilter, err error) {
	f = &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: device, Parent: netlink.HANDLE_MIN_EGRESS, Protocol: unix.ETH_P_ALL, Priority: filterPriority,
			Handle: uint32(by.id), // which nobody else's there is
		},
		Fd: by.program.FD(), Name: filterName, DirectAction: true,
	}
	err = withLinks(func(h *netlink.Handle) error {
		made, err := addClsact(h, device)
		if err != nil {
			return err
		}
		var all, dead []*netlink.BpfFilter
		if !made {
			if all, dead, err = findFilters(h, device); err != nil {
				return err
			}
		}
		// Of several instances the last one removes it.
		if made || slices.ContainsFunc(all, func(other *netlink.BpfFilter) bool { return other.Name == madeName }) {
			f.Name = madeName
		}
		if err := h.FilterAdd(f); err != nil {
			if made {
				err = errors.Join(err, h.QdiscDel(clsact(device)))
			}
			return err
		}
		for _, d := range dead {
			if err := h.FilterDel(d); err != nil {
				return errors.Join(err, remove(h, f))
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("add a filter: %w", err)
	}
	return f, nil
}

// leader is a program that leads to another one for as long as it is open.
type leader struct {
	program *ebpf.Program
	id      ebpf.ProgramID
	to      *ebpf.Map // with the other one
}

func newLeader(to *ebpf.Program) (_ *leader, err error) {
	l := &leader{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("load what leads to cgtun_frames: %w", err), l.Close())
		}
	}()
	l.to, err = ebpf.NewMap(&ebpf.MapSpec{Name: "cgtun_frames", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err == nil {
		err = l.to.Put(uint32(0), to)
	}
	if err == nil {
		l.program, err = ebpf.NewProgram(program("cgtun_leads", ebpf.SchedCLS, ebpf.AttachTCXEgress, asm.Instructions{
			asm.LoadMapPtr(asm.R2, l.to.FD()),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, tcxNext),
			asm.Return(),
		}))
	}
	if err != nil {
		return nil, err
	}
	info, err := l.program.Info()
	if err != nil {
		return nil, err
	}
	var ok bool
	if l.id, ok = info.ID(); !ok {
		return nil, errors.New("the kernel does not tell the number of a program")
	}
	return l, nil
}

// Close has it lead nowhere.
func (l *leader) Close() error {
	return errors.Join(l.to.Close(), l.program.Close())
}

// removeFilter takes one away. ns is its namespace; where that cannot be entered any more
// it stays. None is removed already.
func removeFilter(ns netns.Ref, f *netlink.BpfFilter) error {
	if f == nil {
		return nil
	}
	err := ns.Do(func() error {
		return withLinks(func(h *netlink.Handle) error { return remove(h, f) })
	})
	if isGone(err) {
		return nil
	}
	return err
}

// isGone says of an error that there is nothing any more: no namespace, no device, no
// filter, or nothing that filters hang on.
func isGone(err error) bool {
	return slices.ContainsFunc([]error{netns.ErrGone, unix.ENODEV, unix.ENOENT, unix.EINVAL}, func(gone error) bool { return errors.Is(err, gone) })
}

// remove takes a filter away, and the clsact if that was made for it and nobody else
// has a filter there.
func remove(h *netlink.Handle, f *netlink.BpfFilter) error {
	if err := h.FilterDel(f); err != nil || f.Name != madeName {
		return err
	}
	at := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: f.LinkIndex}}
	for _, parent := range []uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS} {
		others, err := h.FilterList(at, parent)
		if err != nil || len(others) > 0 {
			return err
		}
	}
	return h.QdiscDel(clsact(f.LinkIndex))
}

func clsact(device int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

// addClsact makes what filters hang on, and says whether there was none yet. An ingress
// qdisc would take a filter for the egress, and never ask it.
func addClsact(h *netlink.Handle, device int) (made bool, err error) {
	err = h.QdiscAdd(clsact(device))
	if !errors.Is(err, unix.EEXIST) {
		return err == nil, err
	}
	all, err := h.QdiscList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: device}})
	if err == nil && !slices.ContainsFunc(all, isClsact) {
		err = errors.New("somebody else has an ingress qdisc")
	}
	return false, err
}

func isClsact(q netlink.Qdisc) bool { return q.Type() == "clsact" }

// findFilters finds those of all instances at a device, and which of them lead nowhere.
func findFilters(h *netlink.Handle, device int) (all, dead []*netlink.BpfFilter, err error) {
	there, err := h.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: device}}, netlink.HANDLE_MIN_EGRESS)
	if err != nil {
		return nil, nil, err
	}
	for _, one := range there {
		b, ok := one.(*netlink.BpfFilter)
		if !ok || b.Name != filterName && b.Name != madeName {
			continue
		}
		leads, err := leadsOn(ebpf.ProgramID(b.Id))
		switch {
		case errors.Is(err, unix.ENOENT): // it went meanwhile
			continue
		case err != nil:
			return nil, nil, err
		case !leads:
			dead = append(dead, b)
		}
		all = append(all, b)
	}
	return all, dead, nil
}

// leadsOn says whether the program of a leader still leads to another one.
func leadsOn(id ebpf.ProgramID) (bool, error) {
	maps, err := mapsOfProgram(id)
	if err != nil {
		return false, err
	}
	for _, id := range maps {
		by, err := ebpf.NewMapFromID(id)
		if err != nil {
			return false, err
		}
		var to uint32
		err = by.Lookup(uint32(0), &to)
		by.Close()
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}

// RemoveFilters removes the filters that instances which have ended left at the devices of
// a namespace, and returns how many. It needs no Selector.
func RemoveFilters(ns netns.Ref) (removed int, err error) {
	err = ns.Do(func() error {
		return withLinks(func(h *netlink.Handle) error {
			qdiscs, err := h.QdiscList(nil)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				if !isClsact(q) {
					continue
				}
				_, dead, err := findFilters(h, q.Attrs().LinkIndex)
				for _, d := range dead {
					if err = remove(h, d); err != nil {
						break
					}
					removed++
				}
				if err != nil && !isGone(err) {
					return err
				}
			}
			return nil
		})
	})
	if err != nil && !errors.Is(err, netns.ErrGone) {
		return removed, fmt.Errorf("remove filters in %s: %w", ns, err)
	}
	return removed, nil
}

// withLinks runs f with a handle of the namespace it runs in.
func withLinks(f func(*netlink.Handle) error) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	return f(h)
}
