package config

import (
	"fmt"
	"slices"
	"strings"
)

// Error is one mistake in a file.
type Error struct {
	File      string
	Line, Col int // from 1, in bytes; 0: the file as a whole
	Msg       string
}

// Error returns "FILE:LINE:COL: what is wrong, and what is allowed".
func (e Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Msg)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Col, e.Msg)
}

// Errors are all the mistakes of a file and of the lists that it names, in
// their order. It is never empty.
type Errors []Error

// Error returns one line for each mistake.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// sort orders by place, the file's own mistakes before those of its lists.
func (e Errors) sort(file string) {
	slices.SortStableFunc(e, func(a, b Error) int {
		if a.File != b.File {
			if a.File == file {
				return -1
			}
			if b.File == file {
				return 1
			}
			return strings.Compare(a.File, b.File)
		}
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		if a.Col != b.Col {
			return a.Col - b.Col
		}
		return strings.Compare(a.Msg, b.Msg)
	})
}
