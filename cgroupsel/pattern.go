package cgroupsel

import (
	"slices"
	"strings"
)

// kind is what a token of a pattern stands for.
type kind uint8

const (
	literal    kind = iota // one byte
	digit                  // of an id: 0-9, a-z
	inside                 // *: any bytes of one component
	across                 // **: any bytes
	components             // "**/" where a component begins: whole components, maybe none
	inSlices               // whole components that are slices, maybe none
)

// token is one piece of a pattern.
type token struct {
	kind kind
	b    byte // of a literal
}

func literals(text string) []token {
	all := make([]token, len(text))
	for i := range text {
		all[i] = token{literal, text[i]}
	}
	return all
}

// parseGlob reads a glob. It means the same in the cgroup key of a [[rule]].
func parseGlob(glob string) []token {
	var all []token
	for i := 0; i < len(glob); i++ {
		rest := glob[i:]
		switch {
		case strings.HasPrefix(rest, "**/") && i > 0 && glob[i-1] == '/':
			all, i = append(all, token{kind: components}), i+2
		case strings.HasPrefix(rest, "**"):
			all, i = append(all, token{kind: across}), i+1
		case rest[0] == '*':
			all = append(all, token{kind: inside})
		default:
			all = append(all, token{literal, rest[0]})
		}
	}
	return all
}

// unitTokens is the place of a unit of the system manager: below slices, and
// only slices, as systemd.slice(5) nests them. Which ones they are (Slice= of a
// service; "a.slice" above "a-b.slice") needs no systemd to be asked then, and
// may change while we run. Units of a user's manager are not meant: a path or
// a glob names those.
func unitTokens(unit string) []token {
	all := append(literals("/"), token{kind: inSlices})
	return append(all, literals(cgroupOfUnit(unit))...)
}

// controllers are the names with which the files of a cgroup can begin.
var controllers = []string{
	"cgroup", "cpu", "cpuacct", "cpuset", "io", "blkio", "memory", "devices", "pids", "hugetlb", "rdma", "misc", "dmem",
	"freezer", "net_cls", "net_prio", "perf_event",
}

// cgroupOfUnit is the name of a unit's directory: the unit's name, but for
// those that would look like a file of the cgroup, which systemd puts an
// underscore before. (Escapes such as \x2d are part of the unit's name.)
func cgroupOfUnit(unit string) string {
	first, _, _ := strings.Cut(unit, ".")
	if unit[0] == '_' || unit[0] == '.' || slices.Contains(controllers, first) {
		return "_" + unit
	}
	return unit
}
