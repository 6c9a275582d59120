package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
	"cgtun/steer"
)

// namespaces lists the network namespaces of all processes, names and mounts
// but home, each once. One that ends meanwhile is left out.
func namespaces(home netns.Ref) (all []netns.Ref) {
	paths, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	names, _ := filepath.Glob("/run/netns/*")
	paths = append(paths, names...)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		// The fifth field is the mount point; what is mounted follows a dash.
		if fields := strings.Fields(line); len(fields) > 5 && strings.Contains(line, " - nsfs ") {
			paths = append(paths, fields[4])
		}
	}
	seen := map[uint64]bool{home.Inode(): true}
	for _, path := range paths {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || seen[st.Ino] {
			continue
		}
		seen[st.Ino] = true
		if ns, err := netns.Named(path); err == nil {
			all = append(all, ns)
		}
	}
	return all
}

// removeElsewhere removes what dead instances of this home left in other
// namespaces, and returns it; what blocks on purpose only if opens says so. A
// table there says whose it is; what has none leads nowhere, and the next start
// that comes there takes it.
func removeElsewhere(home netns.Ref, opens bool) (removed []steer.Object, err error) {
	here, err := steer.Find(home)
	if err != nil {
		return nil, err
	}
	alive := map[string]bool{}
	for _, o := range here {
		alive[o.Instance] = alive[o.Instance] || o.Alive
	}
	var errs []error
	for _, ns := range namespaces(home) {
		objects, err := steer.Find(ns)
		if err != nil {
			continue // it has ended
		}
		done := map[string]bool{}
		for _, o := range objects {
			if o.Home != home.Cookie() || o.Alive || alive[o.Instance] || o.Closed && !opens {
				continue
			}
			if !done[o.Instance] {
				done[o.Instance] = true
				errs = append(errs, steer.Remove(ns, o.Instance))
			}
			removed = append(removed, o)
		}
	}
	err = errors.Join(errs...)
	if errors.Is(err, netns.ErrGone) {
		err = nil
	}
	return removed, err
}
