package labtest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// State is what cgtun must leave as it found it, as text: an nft ruleset
// without its counters, ip rules, all route tables, devices, addresses, the
// sysctls of devices, and cgroups.
type State string

// transient matches what changes by itself: remaining lifetimes, the ages and
// states of neighbours and of cached exceptions.
var transient = regexp.MustCompile(`(?m)(valid|preferred)_lft \S+ ?|expires \S+|\b(age|used) \S+`)

// Snapshot takes the state of a namespace and, of the cgroups, the lab's own
// and the named ones ("/cgtun"), with all that is below them. Others come and
// go as other tests run.
func (l *Lab) Snapshot(h *Host, cgroups ...string) State {
	l.t.Helper()
	for i := range h.devices {
		h.awaitLinkLocal(fmt.Sprintf("eth%d", i))
	}
	var b strings.Builder
	section := func(name string, args ...string) {
		fmt.Fprintf(&b, "== %s\n%s", name, transient.ReplaceAllString(h.Run(args[0], args[1:]...), ""))
	}
	section("nft", "nft", "-s", "list", "ruleset")
	section("ip -4 rule", "ip", "-4", "rule")
	section("ip -6 rule", "ip", "-6", "rule")
	section("ip -4 route", "ip", "-4", "route", "show", "table", "all")
	section("ip -6 route", "ip", "-6", "route", "show", "table", "all")
	section("link", "ip", "-d", "link")
	section("address", "ip", "addr")
	// Some of the files cannot be read; grep says so by its exit code.
	section("sysctl", "sh", "-c", "cd /proc/sys/net && grep -rs . ipv4/conf ipv6/conf | sort")
	l.mu.Lock()
	tree := l.cgroups
	l.mu.Unlock()
	root, err := cgroupRoot()
	if err != nil {
		return State(b.String())
	}
	if tree != nil {
		cgroups = append(cgroups, strings.TrimPrefix(tree.base, root))
	}
	b.WriteString("== cgroup\n")
	for _, c := range cgroups {
		_ = filepath.WalkDir(filepath.Join(root, c), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				fmt.Fprintln(&b, strings.TrimPrefix(path, root))
			}
			return nil
		})
	}
	return State(b.String())
}

// awaitLinkLocal waits for the address that a device gives itself a little after
// it has gone up. A state taken before would differ from one taken after.
func (h *Host) awaitLinkLocal(dev string) {
	h.lab.t.Helper()
	_ = h.Do(func() error {
		eventually(2*time.Second, func() bool {
			off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6")
			if err != nil || strings.TrimSpace(string(off)) != "0" {
				return true
			}
			all, _ := os.ReadFile("/proc/thread-self/net/if_inet6")
			for line := range strings.Lines(string(all)) {
				if w := strings.Fields(line); len(w) == 6 && w[5] == dev && strings.HasPrefix(w[0], "fe80") {
					return true
				}
			}
			return false
		})
		return nil
	})
}

// Diff returns what has changed in after, a line each: "-" in front of what is
// gone, "+" of what is new. Empty: nothing.
func (s State) Diff(after State) string {
	old, now := s.lines(), after.lines()
	var b strings.Builder
	for _, line := range old.order {
		if old.count[line] > now.count[line] {
			fmt.Fprintf(&b, "- %s\n", line)
		}
	}
	for _, line := range now.order {
		if now.count[line] > old.count[line] {
			fmt.Fprintf(&b, "+ %s\n", line)
		}
	}
	return b.String()
}

type lineSet struct {
	order []string
	count map[string]int
}

// lines splits a state into lines that carry the name of their section and, if
// indented, the line they belong to.
func (s State) lines() lineSet {
	set := lineSet{count: map[string]int{}}
	var section, parent string
	for line := range strings.Lines(string(s)) {
		line = strings.TrimRight(line, " \n")
		if name, ok := strings.CutPrefix(line, "== "); ok {
			section, parent = name, ""
			continue
		}
		key := section + ": " + line
		if strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") || line == "}" {
			key = section + ": " + parent + " | " + strings.TrimSpace(line)
		} else {
			parent = line
		}
		if set.count[key]++; set.count[key] == 1 {
			set.order = append(set.order, key)
		}
	}
	return set
}
