package rules

import (
	"fmt"
	"strings"
)

// glob is a pattern of cgroup paths: * is anything within one component, **
// anything at all, and /**/ also a single /. It matches a path and all that
// lies beneath it, as [select] does.
type glob struct{ pattern string }

func newGlob(pattern string) (glob, error) {
	if !strings.HasPrefix(pattern, "/") {
		return glob{}, fmt.Errorf("cgroup %q is no path from the root of cgroup2, such as \"/docker/**\"", pattern)
	}
	if pattern != "/" {
		pattern = strings.TrimRight(pattern, "/")
	}
	return glob{pattern}, nil
}

// mark is a place to go back to: a star, and what it has taken of the path.
type mark struct{ p, s int } // p < 0: none

// match walks pattern and path once, keeping the last star of each kind: an
// earlier one never has to take more. It allocates nothing, and a hostile
// path costs at most its length squared.
func (g glob) match(path string) bool {
	pat, p, s := g.pattern, 0, 0
	star, deep := mark{p: -1}, mark{p: -1}
	if pat == "/" {
		return true
	}
	for {
		switch {
		case p == len(pat) && (s == len(path) || path[s] == '/'):
			return true
		case strings.HasPrefix(pat[p:], "**"):
			p += 2
			if p < len(pat) && pat[p] == '/' && pat[p-3] == '/' {
				p++ // whole components, maybe none
			}
			deep, star = mark{p, s}, mark{p: -1}
		case p < len(pat) && pat[p] == '*':
			p++
			star = mark{p, s}
		case p < len(pat) && s < len(path) && pat[p] == path[s]:
			p++
			s++
		default:
			var ok bool
			if p, s, ok = retry(pat, path, &star, &deep); !ok {
				return false
			}
		}
	}
}

// retry lets the last star take one more step and returns where to go on.
func retry(pat, path string, star, deep *mark) (p, s int, ok bool) {
	if star.p >= 0 && star.s < len(path) && path[star.s] != '/' {
		star.s++
		return star.p, star.s, true
	}
	star.p = -1
	if deep.p < 0 || deep.s >= len(path) {
		return 0, 0, false
	}
	deep.s++
	if pat[deep.p-1] == '/' { // after "**/": only where a component begins
		next := strings.IndexByte(path[deep.s-1:], '/')
		if next < 0 {
			return 0, 0, false
		}
		deep.s += next
	}
	return deep.p, deep.s, true
}

// CgroupGlob returns what tells whether a cgroup is one that a glob of a rule's
// cgroup key means.
func CgroupGlob(pattern string) (func(path string) bool, error) {
	g, err := newGlob(pattern)
	if err != nil {
		return nil, err
	}
	return g.match, nil
}
