package cgroupsel

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// # Theory of operation
//
// All globs and units of a selector are one deterministic automaton over the
// bytes of a path, as a table: so the program at cgroup_mkdir decides with two
// loads a byte whether a new cgroup is selected, and by whom, and no process
// can be in it before user space has been asked. User space walks the same
// table for cgroups that are there already.
//
// A row of the table has a cell for each class of bytes that are told apart;
// it names the next row by its offset. Cell 0 is the label of what matches
// where the path ends here: 0 nothing, else the first selection that does,
// counted from 1. The row at offset 0 is the end of all hope.

// Bounds of the table, which is part of a map's value.
const (
	maxCells   = 1 << 16
	cellsBytes = 2 * maxCells
	classBytes = 256
)

// table is the automaton as the program sees it.
type table struct {
	Class [classBytes]uint8
	Cells [maxCells]uint16
}

// automaton matches paths with the globs and units of all selections.
type automaton struct {
	table table
	start uint16
}

// wish is a pattern of one selection.
type wish struct {
	tokens    []token
	selection int
}

// edge leads from a node to another by the bytes of a class; all: by every
// byte but a slash, and by that too if slash is set; digit: by those of ids.
type edge struct {
	b          byte
	all, slash bool
	digit      bool
	to         int
}

func isDigit(b byte) bool { return '0' <= b && b <= '9' || 'a' <= b && b <= 'z' }

func (e edge) takes(b byte) bool {
	if e.digit {
		return isDigit(b)
	}
	if !e.all {
		return e.b == b
	}
	return b != '/' || e.slash
}

// graph is the automaton before it is made deterministic. Each node has
// edges, and leaps that take no byte.
type graph struct {
	edges  [][]edge
	leaps  [][]int
	labels []int // 0: matches nothing; selection + 1
}

func (g *graph) node() int {
	g.edges, g.leaps, g.labels = append(g.edges, nil), append(g.leaps, nil), append(g.labels, 0)
	return len(g.edges) - 1
}

func (g *graph) edge(from int, e edge) { g.edges[from] = append(g.edges[from], e) }
func (g *graph) leap(from, to int)     { g.leaps[from] = append(g.leaps[from], to) }

// word leads from one node to another by some bytes.
func (g *graph) word(from, to int, text string) {
	for i := range text {
		next := to
		if i < len(text)-1 {
			next = g.node()
		}
		g.edge(from, edge{b: text[i], to: next})
		from = next
	}
}

// add leads from a node through a token and returns the node behind it.
func (g *graph) add(from int, t token) int {
	to := g.node()
	if t.kind == literal {
		g.edge(from, edge{b: t.b, to: to})
		return to
	}
	if t.kind == digit {
		g.edge(from, edge{digit: true, to: to})
		return to
	}
	g.leap(from, to)
	switch t.kind {
	case inside:
		g.edge(to, edge{all: true, to: to})
	case across:
		g.edge(to, edge{all: true, slash: true, to: to})
	case components:
		in := g.node()
		g.edge(to, edge{all: true, to: in})
		g.edge(in, edge{all: true, to: in})
		g.edge(in, edge{b: '/', to: to})
	case inSlices:
		in := g.node()
		g.leap(to, in)
		g.edge(in, edge{all: true, to: in})
		g.word(in, to, ".slice/")
	}
	return to
}

// close adds to a set of nodes all that leaps lead to.
func (g *graph) close(set map[int]bool) {
	for todo := sorted(set); len(todo) > 0; {
		last := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, to := range g.leaps[last] {
			if !set[to] {
				set[to] = true
				todo = append(todo, to)
			}
		}
	}
}

func sorted(set map[int]bool) []int {
	all := make([]int, 0, len(set))
	for n := range set {
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}

// compile makes one automaton of the wishes, all of which begin below prefix.
func compile(prefix string, wishes []wish) (*automaton, error) {
	g := &graph{}
	start := g.node()
	for _, w := range wishes {
		at := start
		for _, t := range append(literals(prefix), w.tokens...) {
			at = g.add(at, t)
		}
		g.labels[at] = w.selection + 1
	}
	a := &automaton{}
	columns := g.classes(&a.table)
	if len(columns) > math.MaxUint8 {
		return nil, fmt.Errorf("the globs are of %d different bytes; allowed: fewer", len(columns))
	}
	if err := g.fill(a, columns, start); err != nil {
		return nil, err
	}
	return a, nil
}

// classes gives each byte that some edge names a class of its own, one to the
// digits of ids that are left, where an edge has those, and one to all the
// others; it returns one byte of each class, behind the column of labels.
func (g *graph) classes(t *table) []byte {
	columns := []byte{0, 0} // a path has no NUL: it stands for the others
	for b := range t.Class {
		t.Class[b] = 1
	}
	own, digits := [classBytes]bool{'/': true}, false
	for _, edges := range g.edges {
		for _, e := range edges {
			digits = digits || e.digit
			if !e.all && !e.digit {
				own[e.b] = true
			}
		}
	}
	rest := uint8(0) // the class of digits that are left
	for b, is := range own {
		switch {
		case is:
		case !digits || !isDigit(byte(b)):
			continue
		case rest != 0:
			t.Class[b] = rest
			continue
		default:
			rest = uint8(len(columns))
		}
		t.Class[b] = uint8(len(columns))
		columns = append(columns, byte(b))
	}
	return columns
}

// fill writes the rows: each stands for a set of nodes.
func (g *graph) fill(a *automaton, columns []byte, start int) error {
	rows := map[string]uint16{"": 0}
	var todo []map[int]bool
	var full bool
	row := func(set map[int]bool) uint16 {
		if len(set) == 0 {
			return 0
		}
		g.close(set)
		var text []byte
		for _, n := range sorted(set) {
			text = binary.AppendUvarint(text, uint64(n))
		}
		key := string(text)
		offset, ok := rows[key]
		if !ok {
			next := len(rows) * len(columns)
			if full = full || next+len(columns) > maxCells; full {
				return 0
			}
			offset = uint16(next)
			rows[key] = offset
			todo = append(todo, set)
		}
		return offset
	}
	a.start = row(map[int]bool{start: true})
	for done := 0; done < len(todo) && !full; done++ {
		set := todo[done]
		at := (done + 1) * len(columns)
		a.table.Cells[at] = g.label(set)
		for c, b := range columns[1:] {
			next := make(map[int]bool)
			for n := range set {
				for _, e := range g.edges[n] {
					if e.takes(b) {
						next[e.to] = true
					}
				}
			}
			a.table.Cells[at+c+1] = row(next)
		}
	}
	if full {
		return fmt.Errorf("the globs are too many, or have too many stars, to be one table of %d cells; allowed: fewer or simpler ones", maxCells)
	}
	return nil
}

// label is the first selection that matches, counted from 1.
func (g *graph) label(set map[int]bool) uint16 {
	first := 0
	for n := range set {
		if l := g.labels[n]; l != 0 && (first == 0 || l < first) {
			first = l
		}
	}
	return uint16(first)
}

// run takes the bytes of text, from a row on.
func (a *automaton) run(row uint16, text string) uint16 {
	for i := 0; i < len(text) && row != 0; i++ {
		row = a.table.Cells[int(row)+int(a.table.Class[text[i]])]
	}
	return row
}

// match returns the selection that matches a path which ends here, -1 for none.
func (a *automaton) match(row uint16) int { return int(a.table.Cells[row]) - 1 }
