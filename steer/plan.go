package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Protocol marks the ip rules and routes that cgtun made, in the field that
// ip-rule(8) and ip-route(8) show as "proto". It says "ours"; the number of
// the routing table says whose.
const Protocol = 197

// Cgroup is a cgroup v2 whose processes are selected, children included.
type Cgroup struct {
	Path  string // "/a/b"; for logs only, the kernel goes by ID
	ID    uint64 // inode of its directory; another one after it was made again
	Level int    // depth below the root of this process's cgroup namespace: "/a/b" has 2
}

// Mark is an fwmark under a mask.
type Mark struct{ Value, Mask uint32 }

// Plan says what is to be steered in one namespace. It is not kept after
// Apply returns.
type Plan struct {
	Mark, Mask uint32 // packets with mark & Mask == Mark take Table
	// Earlier are marks that were Mark before: sockets that have one are as old, and
	// what carries it is given Mark.
	Earlier  []Mark
	Table    int // the number of the instance, too
	Priority int // of the ip rules
	// Via is where the table's default route leads; the zero value is ViaTun.
	// The other ways are of the kernel, and in home only.
	Via    Via
	Device string // the tun, which must be up; "" where Via is another way
	// Closed: what blocks outlives this process, see the package comment.
	Closed bool

	// Cgroups are selected by the nft table. They may be all, or only those
	// which BPF programs mark as well.
	Cgroups []Cgroup
	// All selects whatever the namespace's own sockets send.
	All bool
	// Interfaces are devices of the namespace: what is forwarded in through
	// them is selected.
	Interfaces []string
	// No4 and No6 leave a family alone: there is no way out of this namespace
	// for it, and there is none with cgtun. With Closed there is none either if it
	// gets a default route while nobody looks: what is selected takes all routes of
	// the main table but that. A plan with both has no Device, and is for Closed.
	No4, No6 bool
	// Others are below some of Cgroups and belong to another plan: what they
	// send is that one's alone.
	Others []Cgroup
	// Self is the cgroup of cgtun itself: what it sends is never captured. At
	// level 0, the zero value and the root, that is left to the marks.
	Self Cgroup
	// Resolver is the port, of all addresses of loopback, to which goes what the
	// Cgroups ask resolvers on loopback. Home only; 0: nothing does.
	Resolver uint16
	// OnLink are prefixes of home's own networks: what the Cgroups ask resolvers
	// there goes to Resolver, too, at 127.0.0.1 and ::1. Origins tells who was
	// meant.
	OnLink []netip.Prefix
	// Bypass is left alone besides Builtin: the connected prefixes of the
	// namespace, home's addresses and the user's list, in any order and
	// overlapping as they may.
	Bypass []netip.Prefix
}

var builtin = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// Builtin returns the prefixes that are bypassed in every namespace:
// loopback, link-local, multicast and broadcast.
func Builtin() []netip.Prefix { return slices.Clone(builtin) }

// cameIn is the bit of the ct mark that says: this connection came in from
// outside. It means the same for all instances, and so they share it. The
// package comment has the rest of the ct mark.
const cameIn uint32 = 1 << 30

// ctMask and ctMark are how the mark shows in the ct mark.
func (p *Plan) ctMask() uint32 { return p.Mask &^ cameIn }
func (p *Plan) ctMark() uint32 { return p.Mark &^ cameIn }

// byTun says whether the way is our own device.
func (p *Plan) byTun() bool { return p.Via.Mode == ViaTun || p.Via.String() == "" }

// skips says whether a family is left alone.
func (p *Plan) skips(is6 bool) bool {
	if is6 {
		return p.No6
	}
	return p.No4
}

// fences says whether a family that is left alone is kept from default routes.
func (p *Plan) fences(is6 bool) bool { return p.Closed && p.skips(is6) }

// offline says whether the namespace has no way out at all.
func (p *Plan) offline() bool { return p.No4 && p.No6 }

func (p *Plan) validate() error {
	switch {
	case p.Mark&p.Mask != p.Mark:
		return fmt.Errorf("mark %#x has bits outside of mask %#x", p.Mark, p.Mask)
	case p.ctMark() == 0:
		return fmt.Errorf("mark %#x needs a bit other than %#x", p.Mark, cameIn)
	case p.Table <= 0 || p.Table >= 253 && p.Table <= 255:
		return fmt.Errorf("table %d is not free for use: the kernel's own are 0 and 253 to 255", p.Table)
	case p.Priority <= 0 || p.Priority > 32765:
		return fmt.Errorf("priority %d is not in 1 to 32765, before the main table", p.Priority)
	case p.offline() && !p.Closed:
		return errors.New("there is nothing to do where there is no way out, and nothing is closed")
	case p.byTun() && !p.offline() && !isDevice(p.Device):
		return fmt.Errorf("device name %q has not 1 to 15 bytes", p.Device)
	case p.Via.Mode == ViaTProxy || p.Via.Container != "":
		return fmt.Errorf("the way %q is not one that the kernel alone goes", p.Via)
	}
	for _, dev := range p.Interfaces {
		if !isDevice(dev) {
			return fmt.Errorf("interface name %q has not 1 to 15 bytes", dev)
		}
	}
	for _, c := range slices.Concat(p.Cgroups, p.Others) {
		if c.Level < 1 || c.Level > 255 {
			return fmt.Errorf("cgroup %q cannot be told apart at level %d", c.Path, c.Level)
		}
	}
	return nil
}

func isDevice(name string) bool { return name != "" && len(name) <= 15 }

// overlaps says whether a packet can match two fwmarks at once.
func overlaps(markA, maskA, markB, maskB uint32) bool {
	return (markA^markB)&maskA&maskB == 0
}

// TakenError says that something the plan needs is in use by another.
// Nothing has been changed.
type TakenError struct {
	What   string // "ip rule priority 10101", "mark 0x65/0xffffffff", "table 101", "device tun0"
	Holder string // who has it, as the kernel or ip(8) would show it
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("%s is taken by %s", e.What, e.Holder)
}

// FeatureError says what this kernel does not do, and what that costs.
type FeatureError struct {
	Feature string // "owned nft tables"
	Since   string // the first Linux that has it
	Lost    string // what is less without it
	Err     error
}

func (e *FeatureError) Error() string {
	return fmt.Sprintf("use %s, which need Linux %s: %v; %s", e.Feature, e.Since, e.Err, e.Lost)
}

// Unwrap returns what the kernel said.
func (e *FeatureError) Unwrap() error { return e.Err }

// ErrAlive is returned by Remove for an instance that is running.
var ErrAlive = errors.New("instance is alive")
