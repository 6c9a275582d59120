package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
	"cgtun/internal/netns"
	"cgtun/steer"
	"cgtun/tun"
)

const cleanupLong = `It looks at the kernel's tables of this network namespace, and of others where
cgtun was started from here, at the cgroups that
cgtun made, at the programs that it pinned and the filters that lead to them, for processes that it stopped, and at
the control socket (that of -s or -c, else the default one). Instances that run are left alone. Nothing to remove is no error.`

// runCleanup removes what dead instances left, and says what that was.
func runCleanup(ctx context.Context, c *call) error {
	if os.Geteuid() != 0 {
		return errors.New("cleanup needs root")
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	home, err := netns.Home()
	if err != nil {
		return err
	}
	w := cleaner{c: c}
	if st, _, err := client.Status(ctx); err == nil {
		w.answers = strconv.Itoa(st.Instance)
	}
	err = errors.Join(w.tables(home), w.elsewhere(home), w.filters(home), w.devices(home), w.pins(home), w.stopped(), w.cgroups(), w.socket(client.Socket))
	if err == nil && c.out.Len() == 0 {
		fmt.Fprintln(c.out, "nothing was left")
	}
	return err
}

// cleaner is one run of cleanup.
type cleaner struct {
	c       *call
	answers string // the instance that answers at the control socket
}

func (w *cleaner) removed(kind, what string) { fmt.Fprintf(w.c.out, "removed %s %s\n", kind, what) }

// tables removes nft tables, ip rules and routes of dead instances.
func (w *cleaner) tables(home netns.Ref) error {
	objects, err := steer.Find(home)
	if err != nil {
		return err
	}
	var errs []error
	done := map[string]bool{}
	for _, o := range objects {
		if done[o.Instance] {
			continue
		}
		done[o.Instance] = true
		if o.Alive || o.Instance == w.answers {
			fmt.Fprintf(w.c.out, "instance %s is running: left alone\n", o.Instance)
			continue
		}
		if err := steer.Remove(home, o.Instance); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, gone := range objects {
			if gone.Instance == o.Instance {
				w.removed(gone.Kind, gone.Text)
			}
		}
	}
	return errors.Join(errs...)
}

// devices removes those that killed starts left before they had their names.
func (w *cleaner) devices(home netns.Ref) error {
	removed, err := tun.RemoveLeftovers(home)
	for _, name := range removed {
		w.removed("device", name)
	}
	return err
}

// filters removes those that dead instances left at devices, here and elsewhere.
func (w *cleaner) filters(home netns.Ref) error {
	var errs []error
	for _, ns := range append(namespaces(home), home) {
		switch n, err := cgroupsel.RemoveFilters(ns); {
		case err != nil:
			errs = append(errs, err)
		case n > 0:
			w.removed("filters", fmt.Sprintf("of %s: %d", ns, n))
		}
	}
	return errors.Join(errs...)
}

// pins removes the programs that dead instances of this home pinned, and of
// homes that have ended.
func (w *cleaner) pins(home netns.Ref) error {
	found, err := cgroupsel.FindPins()
	errs := []error{err}
	for _, p := range found {
		if p.PID != 0 || p.Home == home.Cookie() && p.Instance == w.answers || p.Home != home.Cookie() && exists(home, p.Home) {
			continue
		}
		removed, err := cgroupsel.RemovePins(p.Home, p.Instance)
		if removed {
			w.removed("pinned programs", p.Dir)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// exists says whether a network namespace other than home is there.
func exists(home netns.Ref, cookie uint64) bool {
	return slices.ContainsFunc(namespaces(home), func(ns netns.Ref) bool { return ns.Cookie() == cookie })
}

// stopped continues the processes that a killed instance left stopped, in the
// cgroups that the file of -c selects, else the default one.
func (w *cleaner) stopped() error {
	path := w.c.config
	if _, err := os.Stat(config.DefaultPath); path == "" && err == nil {
		path = config.DefaultPath
	}
	if path == "" || w.answers != "" {
		return nil
	}
	file, err := config.Read(path)
	if err != nil {
		return err
	}
	pids, err := cgroupsel.Release(selections(file.Routes())...)
	for _, pid := range pids {
		fmt.Fprintf(w.c.out, "continued process %d\n", pid)
	}
	return err
}

// elsewhere removes what dead instances of this home left in other namespaces,
// and opens what they closed.
func (w *cleaner) elsewhere(home netns.Ref) error {
	removed, err := removeElsewhere(home, true)
	for _, o := range removed {
		w.removed(o.Kind, o.Text)
	}
	return err
}

// cgroups removes the empty ones that dead instances made.
func (w *cleaner) cgroups() error {
	removed, err := removeDeadCgroups()
	for _, path := range removed {
		w.removed("cgroup", path)
	}
	return err
}

// removeDeadCgroups removes the empty cgroups of instances that are not alive,
// and returns their paths.
func removeDeadCgroups() (removed []string, err error) {
	left, err := cgroupsel.Find()
	if err != nil {
		return nil, fmt.Errorf("find cgroups that were left: %w", err)
	}
	var errs []error
	done := map[string]bool{}
	for _, l := range left {
		if l.Alive || done[l.Instance] {
			continue
		}
		done[l.Instance] = true // all of its cgroups go with the first
		gone, err := cgroupsel.Remove(l.Instance)
		removed, errs = append(removed, gone...), append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// socket removes the file of a dead instance's control socket, and the
// directories that were made for it.
func (w *cleaner) socket(path string) error {
	removed, err := control.RemoveStale(path)
	var taken *control.TakenError
	if errors.As(err, &taken) {
		return nil
	}
	if removed {
		w.removed("socket", path)
	}
	control.RemoveDirs(path)
	return err
}
