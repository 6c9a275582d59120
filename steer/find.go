package steer

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// Object is something in a namespace's kernel tables that a cgtun made.
type Object struct {
	Instance string // the number of its table
	Kind     string // "nft table", "ip rule", "ip -6 rule" or "route table"
	Text     string // "inet cgtun_101", "10101: from all fwmark 0x65 lookup 101 proto 197", "101"
	// Alive: the instance is running, by its nft table, which has an owner,
	// or by its device, which has somebody who reads it.
	Alive bool
	// Home is the cookie of the namespace that the instance is of, if that is
	// another one than this and there is a table to tell it.
	Home uint64
	// Closed: it blocks on purpose until the instance starts again.
	Closed bool
}

// Find lists the objects of all instances in a namespace, the running ones
// too, sorted by instance and kind.
func Find(ns netns.Ref) ([]Object, error) {
	tables, err := ourTables(ns)
	if err != nil {
		return nil, err
	}
	var objects []Object
	of := map[string]foundTable{}
	for _, t := range tables {
		of[t.instance] = t
		objects = append(objects, Object{Instance: t.instance, Kind: "nft table", Text: "inet " + t.Name})
	}
	var routes foundRoutes
	err = withRoutes(ns, func(h *netlink.Handle) error {
		for _, family := range families {
			if err := routes.find(h, family); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	objects = append(objects, routes.objects...)
	for i := range objects {
		o := &objects[i]
		t, ok := of[o.Instance]
		o.Home = t.home
		o.Alive = t.owned || routes.live[o.Instance]
		o.Closed = ok && !o.Alive && routes.blocks[o.Instance]
	}
	slices.SortStableFunc(objects, func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Kind, b.Kind))
	})
	return slices.Compact(objects), nil // a table has routes of two families
}

// foundRoutes is what there is besides nft tables, by instance.
type foundRoutes struct {
	objects []Object
	live    map[string]bool // its device is being read
	blocks  map[string]bool // its table ends in a route that blocks
}

// find lists rules and tables of one family.
func (f *foundRoutes) find(h *netlink.Handle, family int) error {
	kind := "ip rule"
	if family == unix.AF_INET6 {
		kind = "ip -6 rule"
	}
	if f.live == nil {
		f.live, f.blocks = map[string]bool{}, map[string]bool{}
	}
	rules, err := listRules(h, family)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if r.Protocol == Protocol {
			instance := strconv.Itoa(numberOf(&r, rules))
			f.objects = append(f.objects, Object{Instance: instance, Kind: kind, Text: ruleText(&r)})
		}
	}
	routes, err := listRoutes(h, family, unix.RT_TABLE_UNSPEC)
	if err != nil {
		return err
	}
	seen := map[int]bool{}
	for _, r := range routes {
		if r.Protocol != Protocol {
			continue
		}
		instance := strconv.Itoa(r.Table)
		if !seen[r.Table] {
			seen[r.Table] = true
			f.objects = append(f.objects, Object{Instance: instance, Kind: "route table", Text: instance})
		}
		f.blocks[instance] = f.blocks[instance] || r.Type == unix.RTN_UNREACHABLE
		if link := keyOf(&r).link; link != 0 && !f.live[instance] {
			f.live[instance] = isRead(h, link)
		}
	}
	return nil
}

// isRead says whether somebody has a queue of a tun open: without one it has
// no carrier. Other devices are nobody's sign of life.
func isRead(h *netlink.Handle, index int) bool {
	l, err := h.LinkByIndex(index)
	return err == nil && l.Type() == "tuntap" && l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
}

// hasOwner reads the table's flags, which come in network order; the library
// takes them for the machine's.
func hasOwner(t *nftables.Table) bool {
	return binary.BigEndian.Uint32(host32(t.Flags))&flagOwner != 0
}

// foundTable is an nft table of some instance.
type foundTable struct {
	*nftables.Table
	instance string
	owned    bool
	home     uint64 // see Object
}

// ourTables lists the nft tables of all instances in a namespace.
func ourTables(ns netns.Ref) (found []foundTable, err error) {
	err = ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
		if err != nil {
			return err
		}
		for _, t := range tables {
			number, ok := strings.CutPrefix(t.Name, tablePrefix)
			if _, err := strconv.Atoi(number); !ok || err != nil {
				continue
			}
			found = append(found, foundTable{Table: t, instance: number, owned: hasOwner(t)})
		}
		if len(found) == 0 {
			return nil
		}
		chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
		for i := range found {
			found[i].home = homeIn(chains, found[i].Name)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list nft tables in %s: %w", ns, err)
	}
	return found, nil
}

// homeIn reads the chain by which a table says whose it is.
func homeIn(chains []*nftables.Chain, table string) uint64 {
	for _, c := range chains {
		if cookie, ok := strings.CutPrefix(c.Name, homePrefix); ok && c.Table.Name == table {
			n, _ := strconv.ParseUint(cookie, 10, 64)
			return n
		}
	}
	return 0
}

// Remove deletes what a dead instance left in a namespace; nothing left is no
// error. It returns ErrAlive, and changes nothing, if the instance runs.
func Remove(ns netns.Ref, instance string) error {
	number, err := strconv.Atoi(instance)
	if err != nil || number <= 0 {
		return fmt.Errorf("remove instance %q: not the number of a table", instance)
	}
	objects, err := Find(ns)
	if err != nil {
		return fmt.Errorf("remove instance %s: %w", instance, err)
	}
	hasTable := false
	for _, o := range objects {
		if o.Instance != instance {
			continue
		}
		if o.Alive {
			return fmt.Errorf("remove instance %s from %s: %w", instance, ns, ErrAlive)
		}
		hasTable = hasTable || o.Kind == "nft table"
	}
	if hasTable {
		t, err := openTable(ns, number, false)
		if err != nil {
			return err
		}
		if err := errors.Join(t.remove(), t.close()); err != nil {
			return err
		}
	}
	return withRoutes(ns, func(h *netlink.Handle) error { return clearRoutes(h, number) })
}

// removeDead removes what dead instances of any number left, but for what
// blocks on purpose. A table that an instance of another home made is not
// judged from here: cleanup looks there, too.
func removeDead(ns netns.Ref) error {
	objects, err := Find(ns)
	if err != nil {
		return err
	}
	home, err := netns.Home()
	if err != nil {
		return err
	}
	var errs []error
	done := map[string]bool{}
	for _, o := range objects {
		if o.Alive || o.Closed || done[o.Instance] {
			continue
		}
		done[o.Instance] = true
		if o.Home != 0 {
			if o.Home != home.Cookie() {
				continue
			}
			if alive, err := runs(home, o.Instance); alive || err != nil {
				errs = append(errs, err)
				continue
			}
		}
		errs = append(errs, Remove(ns, o.Instance))
	}
	return errors.Join(errs...)
}

// runs says whether an instance of this home is alive.
func runs(home netns.Ref, instance string) (bool, error) {
	tables, err := ourTables(home)
	for _, t := range tables {
		if t.instance == instance && t.owned {
			return true, nil
		}
	}
	return false, err
}
