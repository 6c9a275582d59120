package config

import (
	"regexp"
	"strings"
)

// report collects the mistakes of one file.
type report struct {
	file   string
	places *positions
	errs   Errors
	broken map[string]bool // paths with a mistake: one is enough
	around map[string]bool // paths that hold such a path
	meant  map[string]bool // paths for which another key was probably meant
	single map[string]bool // paths of lists that are written without brackets
}

// bad reports a value: "KEY WHAT", at its place or, if it is not written, at
// that of its table. Only the first mistake of a value is kept, and none of
// what a broken value is part of or holds.
func (r *report) bad(path, what string) {
	if r.isBroken(path) || r.meant[path] && !r.places.has(r.asWritten(path)) {
		return
	}
	r.breaks(path)
	line, col := r.places.valueAt(r.asWritten(path))
	r.errs = append(r.errs, Error{r.file, line, col, display(path) + " " + what})
}

// badKey reports a key rather than its value, in the words of what alone.
func (r *report) badKey(path, what string) {
	r.breaks(path)
	line, col := r.places.keyAt(r.asWritten(path))
	r.errs = append(r.errs, Error{r.file, line, col, what})
}

// asWritten takes the index off what stands alone for a list of one: a table
// in the place of several, or a value without brackets.
func (r *report) asWritten(path string) string {
	for p := path; p != ""; p = parent(p) {
		if list, ok := strings.CutSuffix(p, "[0]"); ok && r.single[list] {
			path = list + path[len(p):]
		}
	}
	return path
}

// breaks notes a mistake.
func (r *report) breaks(path string) {
	r.broken[path] = true
	for p := parent(path); p != "" && !r.around[p]; p = parent(p) {
		r.around[p] = true
	}
}

// under returns bad for the keys of one table.
func (r *report) under(path string) func(key, what string) {
	return func(key, what string) {
		if path != "" {
			key = path + "." + key
		}
		r.bad(key, what)
	}
}

// isBroken tells whether a path, what it holds or what it is part of has a
// mistake.
func (r *report) isBroken(path string) bool {
	if r.around[path] {
		return true
	}
	for ; path != ""; path = parent(path) {
		if r.broken[path] {
			return true
		}
	}
	return false
}

var indices = regexp.MustCompile(`\[\d+\]`)

// display is a path as a user writes it: the place tells which of several.
func display(path string) string { return indices.ReplaceAllString(path, "") }
