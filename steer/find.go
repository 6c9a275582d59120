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
}

// Find lists the objects of all instances in a namespace, the running ones
// too, sorted by instance and kind.
func Find(ns netns.Ref) ([]Object, error) {
	tables, err := ourTables(ns)
	if err != nil {
		return nil, err
	}
	var objects []Object
	alive := map[string]bool{}
	for _, t := range tables {
		instance := strings.TrimPrefix(t.Name, tablePrefix)
		objects = append(objects, Object{Instance: instance, Kind: "nft table", Text: "inet " + t.Name})
		alive[instance] = hasOwner(t)
	}
	err = withRoutes(ns, func(h *netlink.Handle) error {
		for _, family := range families {
			found, live, err := findRoutes(h, family)
			if err != nil {
				return err
			}
			objects = append(objects, found...)
			for _, instance := range live {
				alive[instance] = true
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range objects {
		objects[i].Alive = alive[objects[i].Instance]
	}
	slices.SortStableFunc(objects, func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Kind, b.Kind))
	})
	return slices.Compact(objects), nil // a table has routes of two families
}

// hasOwner reads the table's flags, which come in network order; the library
// takes them for the machine's.
func hasOwner(t *nftables.Table) bool {
	return binary.BigEndian.Uint32(host32(t.Flags))&flagOwner != 0
}

// findRoutes lists rules and tables of one family, and the instances whose
// device is being read.
func findRoutes(h *netlink.Handle, family int) (objects []Object, live []string, err error) {
	kind := "ip rule"
	if family == unix.AF_INET6 {
		kind = "ip -6 rule"
	}
	rules, err := listRules(h, family)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range rules {
		if r.Protocol == Protocol {
			objects = append(objects, Object{Instance: strconv.Itoa(r.Table), Kind: kind, Text: ruleText(&r)})
		}
	}
	routes, err := listRoutes(h, family, unix.RT_TABLE_UNSPEC)
	if err != nil {
		return nil, nil, err
	}
	seen := map[int]bool{}
	for _, r := range routes {
		if r.Protocol != Protocol {
			continue
		}
		instance := strconv.Itoa(r.Table)
		if !seen[r.Table] {
			seen[r.Table] = true
			objects = append(objects, Object{Instance: instance, Kind: "route table", Text: instance})
		}
		if r.Type == unix.RTN_UNICAST && isRead(h, r.LinkIndex) {
			live = append(live, instance)
		}
	}
	return objects, live, nil
}

// isRead says whether somebody has a queue of a tun open: without one it has
// no carrier. Other devices are nobody's sign of life.
func isRead(h *netlink.Handle, index int) bool {
	l, err := h.LinkByIndex(index)
	return err == nil && l.Type() == "tuntap" && l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
}

func ourTables(ns netns.Ref) ([]*nftables.Table, error) {
	var tables []*nftables.Table
	err := ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err = conn.ListTablesOfFamily(nftables.TableFamilyINet)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list nft tables in %s: %w", ns, err)
	}
	return slices.DeleteFunc(tables, func(t *nftables.Table) bool {
		number, ok := strings.CutPrefix(t.Name, tablePrefix)
		_, err := strconv.Atoi(number)
		return !ok || err != nil
	}), nil
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
		t, err := openTable(ns, number)
		if err != nil {
			return err
		}
		if err := errors.Join(t.remove(), t.close()); err != nil {
			return err
		}
	}
	return withRoutes(ns, func(h *netlink.Handle) error { return clearRoutes(h, number) })
}

// removeDead removes what dead instances of any number left.
func removeDead(ns netns.Ref) error {
	objects, err := Find(ns)
	if err != nil {
		return err
	}
	var errs []error
	done := map[string]bool{}
	for _, o := range objects {
		if o.Alive || done[o.Instance] {
			continue
		}
		done[o.Instance] = true
		errs = append(errs, Remove(ns, o.Instance))
	}
	return errors.Join(errs...)
}
