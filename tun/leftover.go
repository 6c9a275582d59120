package tun

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// settle is how long a device may have its temporary name without a queue, if
// the start that makes it is alive.
const settle = 100 * time.Millisecond

// RemoveLeftovers removes the devices that killed starts have left in ns under
// their temporary names, and returns these names. Devices that are open stay.
func RemoveLeftovers(ns netns.Ref) (removed []string, err error) {
	err = ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		found, err := unopened(h)
		if err != nil || len(found) == 0 {
			return err
		}
		time.Sleep(settle)
		still, err := unopened(h)
		errs := []error{err}
		for name, index := range found {
			if still[name] != index {
				continue
			}
			err := h.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}})
			if err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("remove device %s: %w", name, err))
				continue
			}
			removed = append(removed, name)
		}
		return errors.Join(errs...)
	})
	return removed, err
}

// unopened returns the devices with temporary names that nobody has a queue of,
// and the index of each. An open one belongs to a process.
func unopened(h *netlink.Handle) (map[string]int, error) {
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	found := map[string]int{}
	for _, l := range links {
		t, ok := l.(*netlink.Tuntap)
		number, ours := strings.CutPrefix(l.Attrs().Name, temporaryPrefix)
		_, errNumber := strconv.ParseUint(number, 10, 32)
		// Only what is persistent outlives its last queue.
		if ok && ours && errNumber == nil && !t.NonPersist && t.Attrs().RawFlags&unix.IFF_LOWER_UP == 0 {
			found[t.Attrs().Name] = t.Attrs().Index
		}
	}
	return found, nil
}
