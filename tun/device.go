package tun

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"cgtun/internal/netns"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Options says what device to open.
type Options struct {
	Name      string         // "tun0" if empty
	Table     uint32         // of the route it serves: the alias and the temporary name
	Addresses []netip.Prefix // none: one v4 and one v6 address that nobody can mean, the next free
	MTU       int            // bytes; 1500 if 0
	Queues    int            // 1 if 0
	// From is where the device is made, to be moved from there, which takes 10 to
	// 25 ms. A queue belongs to the namespace that it was opened in and keeps that
	// alive: with From, the device's own ends with its last process, and the queues
	// say so. The zero Ref: the device is made where it is to be, and whoever wants
	// the namespace to end sees who else keeps it, and lets go.
	From netns.Ref
	// Yield takes the next free name and address where a written one is taken.
	Yield bool
}

// AliasPrefix begins the alias of each device of cgtun.
const AliasPrefix = "cgtun_"

// Alias is the device alias (ip-link(8)) that tells a device of the route with
// this table from all others.
func Alias(table uint32) string { return AliasPrefix + strconv.FormatUint(uint64(table), 10) }

// IsOurs says whether a device is a tun of some cgtun. Who may name a device
// cannot make it a tun.
func IsOurs(l netlink.Link) bool {
	return l.Type() == "tuntap" && strings.HasPrefix(l.Attrs().Alias, AliasPrefix)
}

// TakenError says that the machine already uses what the device would need.
// Nothing was changed.
type TakenError struct {
	What   string // "device" or "address"
	Value  string // its name or prefix
	Holder string // who has it: a device, a route
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("%s %s is taken by %s", e.What, e.Value, e.Holder)
}

// Device is an open tun. It lives until Close or until its namespace ends; if
// the process dies it goes too.
type Device struct {
	name      string
	temporary string // name until it is ready
	mtu       int
	addresses []netip.Prefix
	ns        netns.Ref
	queues    []*Queue
}

// Queues returns the queues, at least one. They belong to the device.
func (d *Device) Queues() []*Queue { return d.queues }

// Name returns the name of the device in its namespace.
func (d *Device) Name() string { return d.name }

// MTU returns the largest packet in bytes. Segments that stand for several
// packets (Offload.GSOType) are larger.
func (d *Device) MTU() int { return d.mtu }

// Addresses returns what was set. A family that is off in the namespace has
// none.
func (d *Device) Addresses() []netip.Prefix { return d.addresses }

// Netns returns the namespace that the device is in. The Ref leads in by the device,
// as long as that and the namespace live.
func (d *Device) Netns() netns.Ref { return d.ns }

// Close removes the device. Readers of its queues return os.ErrClosed. After LetGo
// there is nothing left to do.
func (d *Device) Close() error {
	var errs []error
	for _, q := range d.queues {
		if !q.letGo.Load() {
			errs = append(errs, q.Close())
		}
	}
	return errors.Join(errs...)
}

// LetGo is Close for when nobody but the device keeps its namespace: readers of its
// queues return netns.ErrGone, as after any other end of it.
func (d *Device) LetGo() error {
	var errs []error
	for _, q := range d.queues {
		if !q.letGo.Swap(true) {
			errs = append(errs, q.Close())
		}
	}
	return errors.Join(errs...)
}

// Control calls f with the descriptor of a queue, which stays open meanwhile.
func (d *Device) Control(f func(fd uintptr)) error { return d.queues[0].raw.Control(f) }

// Open makes a device in ns, with its addresses, up. The caller closes it. If a
// name or a written address is taken, the error is a *TakenError; if ns has
// ended it wraps netns.ErrGone.
func Open(ns netns.Ref, o Options) (*Device, error) {
	if o.Name == "" {
		o.Name = "tun0"
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	o.Queues = max(o.Queues, 1)
	d, err := open(ns, o)
	if err != nil {
		return nil, fmt.Errorf("open tun %s: %w", o.Name, err)
	}
	return d, nil
}

func open(ns netns.Ref, o Options) (*Device, error) {
	d := &Device{ns: ns, mtu: o.MTU}
	moved := o.From != (netns.Ref{})
	if moved {
		if err := d.moveIn(ns, o); err != nil {
			return nil, err
		}
	}
	err := inside(d.ns, func(h *netlink.Handle) (err error) {
		used, err := d.free(h, o)
		if err != nil {
			return err
		}
		if !moved {
			name := temporaryName(o.Table)
			if err := removeLeftover(h, name); err != nil {
				return err
			}
			if d.temporary, d.queues, err = openQueues(h, name, o.Queues); err != nil {
				return err
			}
		}
		return d.configure(h, o, used)
	})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.ns = ns.Through(d.queues[0].netns)
	return d, nil
}

// inside runs f in a namespace with a handle of it.
func inside(ns netns.Ref, f func(*netlink.Handle) error) error {
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		return f(h)
	})
}

// moveIn makes the queues elsewhere and moves their device into ns. Others may
// do so at the same time: the kernel draws the end of the temporary name.
func (d *Device) moveIn(ns netns.Ref, o Options) error {
	err := ns.File(func(fd int) error {
		return inside(o.From, func(h *netlink.Handle) (err error) {
			if d.temporary, d.queues, err = openQueues(h, movedName(o.Table), o.Queues); err != nil {
				return err
			}
			link, err := h.LinkByName(d.temporary)
			if err == nil {
				err = h.LinkSetAlias(link, Alias(o.Table)) // it is seen to be ours from the first
			}
			if err == nil {
				err = h.LinkSetNsFd(link, fd)
			}
			if err != nil {
				return errors.Join(fmt.Errorf("move the new device in: %w", err), d.Close())
			}
			return nil
		})
	})
	if err == nil {
		d.ns = ns.Through(d.queues[0].netns)
	}
	return err
}

// free returns what is in use in the namespace, and settles the name.
func (d *Device) free(h *netlink.Handle, o Options) (inUse, error) {
	var err error
	if d.name, err = freeName(h, o); err != nil {
		return nil, err
	}
	used, err := prefixesInUse(h, o.Addresses)
	if err != nil {
		return nil, err
	}
	if err := used.allFree(o.Addresses); err != nil && !o.Yield {
		return nil, err
	}
	return used, nil
}

// queueLength is how many packets wait in the device for one queue's reader.
const queueLength = 4000

// configure names the device last: until then it is known as ours by its
// temporary name. A device must be down to be renamed on kernels before 6.2.
func (d *Device) configure(h *netlink.Handle, o Options, used inUse) error {
	link, err := h.LinkByName(d.temporary)
	if err != nil {
		return fmt.Errorf("find the new device: %w", err)
	}
	if err := h.LinkSetAlias(link, Alias(o.Table)); err != nil {
		return fmt.Errorf("set alias: %w", err)
	}
	if err := h.LinkSetMTU(link, o.MTU); err != nil {
		return fmt.Errorf("set mtu %d: %w", o.MTU, err)
	}
	// What waits while the reader has no CPU. The kernel's 500 are 4 ms of
	// 120,000 datagrams a second, less than a turn of another process.
	if err := h.LinkSetTxQLen(link, queueLength); err != nil {
		return fmt.Errorf("set queue length: %w", err)
	}
	// No link-local address of its own: nobody is on the other side, and the
	// solicitations that come with one would only be noise. A kernel without
	// IPv6 refuses, which is as good.
	_ = h.LinkSetIP6AddrGenMode(link, ipv6AddrGenNone)
	if d.addresses, err = setAddresses(h, link, o.Addresses, used); err != nil {
		return err
	}
	if err := h.LinkSetName(link, d.name); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return &TakenError{What: "device", Value: d.name, Holder: "another device of that name"}
		}
		return fmt.Errorf("rename: %w", err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return d.awaitLocal(h, link.Attrs().Index)
}

// freeName returns the name that the device gets, or says who has it.
func freeName(h *netlink.Handle, o Options) (string, error) {
	name := o.Name
	for n := range maxNames {
		link, err := find(h, name)
		if err != nil || link == nil {
			return name, err
		}
		if !o.Yield {
			holder := "another " + link.Type() + " device"
			if alias := link.Attrs().Alias; alias != "" {
				holder = "the " + link.Type() + " device of " + alias
			}
			return "", &TakenError{What: "device", Value: name, Holder: holder}
		}
		number := strconv.Itoa(n + 1)
		stem := strings.TrimRight(o.Name, "0123456789")
		name = stem[:min(len(stem), maxName-len(number))] + number
	}
	return "", fmt.Errorf("none of %d device names such as %s is free", maxNames, name)
}

// maxNames bounds the search for a free name.
const maxNames = 256

// find returns the device of a name, nil for none.
func find(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for device %s: %w", name, err)
	}
	return link, nil
}
