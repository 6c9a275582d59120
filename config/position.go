package config

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// A path names a value of a file: "rule[2].cidr[0]", "dns.hosts.\"a.b\"[1]".
// Keys that are not bare are quoted; [n] counts the tables of an array and the
// elements of a list from 0.

var bareKey = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// join appends a key to a path.
func join(path, key string) string {
	if !bareKey.MatchString(key) {
		key = strconv.Quote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// at appends an index to a path.
func at(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// parent cuts the last key or index off a path.
func parent(path string) string {
	if strings.HasSuffix(path, "]") {
		return path[:strings.LastIndexByte(path, '[')]
	}
	quoted := false
	for i := len(path) - 1; i >= 0; i-- {
		switch {
		case path[i] == '"' && (i == 0 || path[i-1] != '\\'):
			quoted = !quoted
		case path[i] == '.' && !quoted:
			return path[:i]
		}
	}
	return ""
}

// positions says where the keys and values of a file are. The toml package
// tells it for syntax errors alone: the rest it keys by name, so that the
// first of two [[rule]] is told the second's line, and unknown keys have none.
type positions struct {
	keys  []toml.Key     // as MetaData.Keys has them
	key   map[string]int // path to offset, of keys and headers
	value map[string]int // path to offset, of values and elements
	lines lines
}

// lines has the offsets at which the lines of a text begin.
type lines []int

func linesOf(data string) lines {
	starts := lines{0}
	for i, c := range []byte(trimBOM(data)) {
		if c == '\n' {
			starts = append(starts, i+1)
		}
	}
	return starts
}

// at returns line and column, from 1, of an offset.
func (l lines) at(offset int) (line, col int) {
	line, exact := slices.BinarySearch(l, offset)
	if !exact {
		line--
	}
	return line + 1, offset - l[line] + 1
}

// keyAt and valueAt return line and column, from 1, of the path or, where that
// is not written, of what it would stand in; the whole file is 1:1.
func (p *positions) keyAt(path string) (line, col int)   { return p.find(path, p.key, p.value) }
func (p *positions) valueAt(path string) (line, col int) { return p.find(path, p.value, p.key) }

// has tells whether a path is written.
func (p *positions) has(path string) bool {
	_, key := p.key[path]
	_, value := p.value[path]
	return key || value
}

func (p *positions) find(path string, first, second map[string]int) (line, col int) {
	for ; path != ""; path = parent(path) {
		offset, ok := first[path]
		if !ok {
			offset, ok = second[path]
		}
		if ok {
			return p.lines.at(offset)
		}
	}
	return 1, 1
}

// scan finds the keys of a file that the toml package has read without an
// error; of any other the result is worthless, but scan returns.
func scan(data string) *positions {
	s := scanner{
		src:    trimBOM(data),
		tables: map[string]int{},
		out:    &positions{key: map[string]int{}, value: map[string]int{}, lines: linesOf(data)},
	}
	s.file()
	return s.out
}

// trimBOM cuts what the toml package reads over.
func trimBOM(data string) string {
	for _, bom := range []string{"\xff\xfe", "\xfe\xff", "\xef\xbb\xbf"} {
		if rest, ok := strings.CutPrefix(data, bom); ok {
			return rest
		}
	}
	return data
}

// scanner walks over a valid file. Each of its methods begins at s.at and
// leaves s.at behind what it has read.
type scanner struct {
	src    string
	at     int
	depth  int            // of lists and inline tables
	tables map[string]int // path of an array of tables to the number of its tables so far
	out    *positions
}

// maxDepth is how deep in lists places are kept: no key has lists of lists.
const maxDepth = 16

// part is one part of a dotted key.
type part struct {
	name   string
	offset int
}

func (s *scanner) peek() byte {
	if s.at < len(s.src) {
		return s.src[s.at]
	}
	return 0
}

func (s *scanner) skip(n int) { s.at = min(s.at+n, len(s.src)) }

func (s *scanner) file() {
	var path string
	var name toml.Key
	for {
		s.skipBlank()
		switch {
		case s.at >= len(s.src):
			return
		case strings.HasPrefix(s.src[s.at:], "[["):
			s.skip(2)
			path, name = s.header(s.parts(), true)
			s.skip(2)
		case s.peek() == '[':
			s.skip(1)
			path, name = s.header(s.parts(), false)
			s.skip(1)
		default:
			s.pair(path, name)
		}
	}
}

// header notes a table, or the next one of an array of tables.
func (s *scanner) header(parts []part, array bool) (path string, name toml.Key) {
	for i, p := range parts {
		name = append(name, p.name)
		path = join(path, p.name)
		s.note(path, p.offset)
		last := i == len(parts)-1
		if last && array {
			s.tables[path]++
		}
		if n := s.tables[path]; n > 0 {
			path = at(path, n-1)
			if last {
				s.out.key[path] = p.offset
			}
		}
	}
	s.out.keys = append(s.out.keys, name)
	return path, name
}

// note keeps the first place of a path.
func (s *scanner) note(path string, offset int) {
	if _, ok := s.out.key[path]; !ok {
		s.out.key[path] = offset
	}
}

// pair reads KEY = VALUE in the table of that path and name.
func (s *scanner) pair(path string, name toml.Key) {
	name = slices.Clone(name)
	for _, p := range s.parts() {
		name = append(name, p.name)
		path = join(path, p.name)
		s.note(path, p.offset)
	}
	s.out.keys = append(s.out.keys, name)
	s.skip(1) // the equals sign
	s.skipBlank()
	s.value(path, name)
}

// parts reads a dotted key up to what is not part of it.
func (s *scanner) parts() (parts []part) {
	for {
		s.skipBlank()
		start := s.at
		if c := s.peek(); c == '"' || c == '\'' {
			s.quoted()
			parts = append(parts, part{unquoteKey(s.src[start:s.at]), start})
		} else {
			for s.at < len(s.src) && strings.IndexByte(" \t\r\n.=]#", s.peek()) < 0 {
				s.at++
			}
			parts = append(parts, part{s.src[start:s.at], start})
		}
		s.skipBlank()
		if s.peek() != '.' {
			return parts
		}
		s.at++
	}
}

// unquoteKey lets the toml package read a quoted key: its escapes are its own.
func unquoteKey(quoted string) string {
	var into map[string]any
	if _, err := toml.Decode(quoted+" = 0", &into); err != nil {
		return quoted
	}
	for key := range into {
		return key
	}
	return quoted
}

func (s *scanner) value(path string, name toml.Key) {
	if s.depth++; s.depth <= maxDepth {
		s.out.value[path] = s.at
	}
	defer func() { s.depth-- }()
	switch s.peek() {
	case '"', '\'':
		s.quoted()
	case '[':
		s.at++
		for i := 0; !s.closed(']'); i++ {
			element := path
			if s.depth <= maxDepth {
				element = at(path, i)
			}
			s.value(element, name)
		}
	case '{':
		s.at++
		for !s.closed('}') {
			s.pair(path, name)
		}
	default: // a number, a date, true or false
		s.skip(1)
		for s.at < len(s.src) && strings.IndexByte(",]}#\r\n", s.peek()) < 0 {
			s.at++
		}
	}
}

// closed reads over blanks and commas, and the closing bracket if it comes.
func (s *scanner) closed(bracket byte) bool {
	s.skipBlank()
	if s.peek() == ',' {
		s.at++
		s.skipBlank()
	}
	if s.at >= len(s.src) {
		return true
	}
	if s.peek() != bracket {
		return false
	}
	s.at++
	return true
}

// skipBlank reads over spaces, newlines and comments.
func (s *scanner) skipBlank() {
	for s.at < len(s.src) {
		switch s.src[s.at] {
		case ' ', '\t', '\r', '\n':
			s.at++
		case '#':
			end := strings.IndexByte(s.src[s.at:], '\n')
			if end < 0 {
				s.at = len(s.src)
				return
			}
			s.at += end
		default:
			return
		}
	}
}

// quoted reads one of the four kinds of strings.
func (s *scanner) quoted() {
	quote := s.src[s.at : s.at+1]
	escapes := quote == `"`
	if triple := strings.Repeat(quote, 3); strings.HasPrefix(s.src[s.at:], triple) {
		quote = triple
	}
	s.at += len(quote)
	for s.at < len(s.src) && !strings.HasPrefix(s.src[s.at:], quote) {
		if escapes && s.src[s.at] == '\\' {
			s.at++
		}
		s.at++
	}
	s.skip(len(quote))
	if len(quote) == 1 {
		return
	}
	// Up to two quotes can stand directly before the three that close.
	for range 2 {
		if s.peek() == quote[0] {
			s.at++
		}
	}
}
