package cgroupsel

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// # Theory of operation: frames
//
// A socket of packet(7) hands whole frames to a device. They pass neither the
// tables of the firewall nor the gate, so a process with CAP_NET_RAW, which
// docker gives to all, would go around everything by it. A program at the
// egress of each device drops what such sockets of selected cgroups send,
// but for ARP and what is bypassed in every namespace.
//
// PACKET_QDISC_BYPASS and AF_XDP go around that program, too. Both have to be
// asked for by setsockopt(2), which a program at the root of cgroup2 refuses to
// selected processes. The kernel does not ask it where the call is one of a
// 32-bit program: that is open.
//
// The devices of a namespace are the caller's to tell, the newest list each
// time. The program is attached by a link (tcx), or, for open selections and where
// the device comes and goes with a container, by a filter (frames_filter.go has why).
// Neither keeps a namespace alive. The links of closed selections are
// pinned with the rest of what outlives us (pin.go), from Arm on.

// Device is one that is not ours, of some namespace.
type Device struct {
	Index    int
	Ethernet bool // its frames begin with an Ethernet header
	Passing  bool // it comes and goes with a container; what is said first of a device counts
}

// key is what tells devices apart.
func (d Device) key() Device {
	d.Passing = false
	return d
}

// AnyCgroup says that not the namespace but the cgroup of a sender decides who
// is selected.
const AnyCgroup = -1

// frames are the programs on devices.
type frames struct {
	m    *maps
	exit [2][]int32 // open and closed selections

	mu       sync.Mutex
	programs map[frameKind]*ebpf.Program
	on       map[uint64]*guarded // by cookie of the namespace
	pins     func(func(dir string) error) error
}

// guarded are the devices of a namespace.
type guarded struct {
	ns      netns.Ref             // the newest way in
	devices map[Device]*framed    // by their keys
	leaders map[frameKind]*leader // of the filters
}

// Close has the filters lead nowhere.
func (g *guarded) Close() error {
	var errs []error
	for _, l := range g.leaders {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// frameKind is what tells programs apart.
type frameKind struct {
	ethernet bool
	all      int // AnyCgroup, or the selection that has all of the namespace
	closed   bool
}

// framed is what is attached to a device.
type framed struct {
	all          int
	open, closed link.Link          // nil: there are no such selections, or
	filter       *netlink.BpfFilter // of open ones
	pinned       string             // the name of closed's pin
}

// tryFrames attaches a program to loopback for a moment.
func (s *Selector) tryFrames() error {
	if err := s.allowed(FeatureFrames); err != nil {
		return err
	}
	f := &frames{m: s.maps, programs: make(map[frameKind]*ebpf.Program), on: make(map[uint64]*guarded)}
	f.exit[0], f.exit[1] = s.opts.byExit()
	lk, err := f.link(frameKind{ethernet: true, all: AnyCgroup}, loopback)
	if err == nil {
		err = lk.Close()
	}
	if err != nil {
		return errors.Join(err, f.Close(nil))
	}
	s.frames = f
	return nil
}

// armOptions refuses selected processes the ways around the programs on devices.
func (s *Selector) armOptions() error {
	err := s.allowed(FeatureOptions)
	if err == nil {
		s.options, err = s.attachRoot(func(others []int32) []*ebpf.ProgramSpec {
			return []*ebpf.ProgramSpec{optionProgram(s.maps, bySel(s.maps, others))}
		})
	}
	return err
}

// GuardFrames keeps what selected processes hand to devices themselves from
// these devices of a namespace, and from no others in it any more. all is the
// selection that has everything inside, or AnyCgroup. What fails for one device
// is no obstacle for the others.
func (s *Selector) GuardFrames(ns netns.Ref, all int, devices ...Device) error {
	f := s.frames
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	wanted := make(map[Device]Device, len(devices)) // by their keys
	for _, d := range devices {
		wanted[d.key()] = d
	}
	there := f.on[ns.Cookie()]
	if there == nil {
		there = &guarded{devices: make(map[Device]*framed), leaders: make(map[frameKind]*leader)}
		f.on[ns.Cookie()] = there
	}
	there.ns = ns
	var errs []error
	for d, on := range there.devices {
		if _, ok := wanted[d]; !ok || on.all != all {
			errs = append(errs, f.drop(ns, on))
			delete(there.devices, d)
		}
	}
	var missing []Device
	for key, d := range wanted {
		if there.devices[key] == nil {
			missing = append(missing, d)
		}
	}
	if len(missing) == 0 {
		return errors.Join(errs...)
	}
	err := ns.Do(func() error {
		var errs []error
		for _, d := range missing {
			on, err := f.guard(there, d, all)
			if errors.Is(err, unix.ENODEV) {
				continue // gone meanwhile
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("guard device %d in %s: %w", d.Index, ns, err))
				continue
			}
			there.devices[d.key()] = on
		}
		return errors.Join(errs...)
	})
	return errors.Join(append(errs, err)...)
}

// guard attaches to a device of the namespace, in which it runs.
func (f *frames) guard(there *guarded, d Device, all int) (_ *framed, err error) {
	on := &framed{all: all, pinned: fmt.Sprintf("frames%d_%d", there.ns.Cookie(), d.Index)}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.drop(there.ns, on))
		}
	}()
	if f.has(false, all) {
		if err := f.open(there, on, d); err != nil {
			return nil, err
		}
	}
	if f.has(true, all) {
		if on.closed, err = f.link(frameKind{d.Ethernet, all, true}, d.Index); err != nil {
			return nil, err
		}
		if f.pins != nil {
			err = f.pins(func(dir string) error { return on.closed.Pin(filepath.Join(dir, on.pinned)) })
		}
	}
	return on, err
}

// open attaches for open selections: by a filter to what is passing, by a link where that
// cannot be.
func (f *frames) open(there *guarded, on *framed, d Device) (err error) {
	kind := frameKind{d.Ethernet, on.all, false}
	var first error
	if d.Passing {
		if on.filter, first = f.lead(there, kind, d.Index); first == nil || errors.Is(first, unix.ENODEV) {
			return first
		}
	}
	if on.open, err = f.link(kind, d.Index); err != nil {
		return errors.Join(first, err)
	}
	return nil
}

// has says whether there is a selection of this kind for a namespace.
func (f *frames) has(closed bool, all int) bool {
	which := f.exit[0]
	if closed {
		which = f.exit[1]
	}
	for _, one := range which {
		if all == AnyCgroup || int(one) == all {
			return true
		}
	}
	return false
}

// link puts our program before those of others: what they let pass they do
// not let pass for us.
func (f *frames) link(kind frameKind, device int) (link.Link, error) {
	p, err := f.program(kind)
	if err != nil {
		return nil, err
	}
	options := link.TCXOptions{Interface: device, Program: p, Attach: ebpf.AttachTCXEgress, Anchor: link.Head()}
	lk, err := link.AttachTCX(options)
	if errors.Is(err, unix.EEXIST) {
		// The device came from another namespace, and still has that one's,
		// which will be taken away there.
		if options.Program, err = f.load(kind); err != nil {
			return nil, err
		}
		defer options.Program.Close()
		lk, err = link.AttachTCX(options)
	}
	if err != nil {
		return nil, fmt.Errorf("attach cgtun_frames: %w", err)
	}
	return lk, nil
}

// lead has a filter lead to our program, if nobody comes before filters.
func (f *frames) lead(there *guarded, kind frameKind, device int) (*netlink.BpfFilter, error) {
	others, err := link.QueryPrograms(link.QueryOptions{Target: device, Attach: ebpf.AttachTCXEgress})
	if err == nil && len(others.Programs) > 0 {
		return nil, errors.New("somebody else has a program there")
	}
	l := there.leaders[kind]
	if l == nil {
		p, err := f.program(kind)
		if err == nil {
			l, err = newLeader(p)
		}
		if err != nil {
			return nil, err
		}
		there.leaders[kind] = l
	}
	return addFilter(device, l)
}

func (f *frames) program(kind frameKind) (*ebpf.Program, error) {
	if p := f.programs[kind]; p != nil {
		return p, nil
	}
	p, err := f.load(kind)
	if err == nil {
		f.programs[kind] = p
	}
	return p, err
}

func (f *frames) load(kind frameKind) (*ebpf.Program, error) {
	others := f.exit[1]
	if kind.closed {
		others = f.exit[0]
	}
	p, err := ebpf.NewProgram(frameProgram(f.m, kind, others))
	if err != nil {
		return nil, fmt.Errorf("load cgtun_frames: %w", err)
	}
	return p, nil
}

// drop lets a device of a namespace go, and its pin.
func (f *frames) drop(ns netns.Ref, on *framed) error {
	errs := []error{removeFilter(ns, on.filter)}
	for _, lk := range []link.Link{on.open, on.closed} {
		if lk != nil {
			errs = append(errs, lk.Close())
		}
	}
	if on.closed != nil && f.pins != nil {
		errs = append(errs, f.pins(func(dir string) error {
			err := os.Remove(filepath.Join(dir, on.pinned))
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		}))
	}
	return errors.Join(errs...)
}

// forget lets all devices of a namespace go.
func (f *frames) forget(ns netns.Ref) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	there := f.on[ns.Cookie()]
	if there == nil {
		return nil
	}
	// First, for where the namespace cannot be entered any more.
	errs := []error{there.Close()}
	for _, on := range there.devices {
		errs = append(errs, f.drop(ns, on))
	}
	delete(f.on, ns.Cookie())
	return errors.Join(errs...)
}

// pin pins what is attached for closed selections in a directory. It wants f.mu.
func (f *frames) pin(dir string) error {
	if f == nil {
		return nil
	}
	for _, there := range f.on {
		for _, on := range there.devices {
			if on.closed == nil {
				continue
			}
			if err := on.closed.Pin(filepath.Join(dir, on.pinned)); err != nil {
				return fmt.Errorf("pin %s: %w", on.pinned, err)
			}
		}
	}
	return nil
}

// lock keeps all as it is until the function that it returns is called.
func (f *frames) lock() (unlock func()) {
	if f == nil {
		return func() {}
	}
	f.mu.Lock()
	return f.mu.Unlock
}

// keep says how the directory is reached in which all is pinned now, and what
// comes later is to be. It wants f.mu.
func (f *frames) keep(pins func(func(dir string) error) error) {
	if f != nil {
		f.pins = pins
	}
}

// Close lets all go; what is pinned stays. newest finds the way into a namespace.
func (f *frames) Close(newest func(netns.Ref) netns.Ref) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []io.Closer
	var errs []error
	for _, there := range f.on {
		errs = append(errs, there.Close())
		for _, on := range there.devices {
			errs = append(errs, removeFilter(newest(there.ns), on.filter))
			for _, lk := range []link.Link{on.open, on.closed} {
				if lk != nil {
					all = append(all, lk)
				}
			}
		}
	}
	for _, p := range f.programs {
		all = append(all, p)
	}
	f.on, f.programs = nil, nil
	return errors.Join(append(errs, hooks(all).Close())...)
}
