package rules

import (
	"bytes"
	"hash/maphash"
	"regexp"
	"strings"
)

// nameIndex leads from a name to the rules that let it pass for an exact name or
// a suffix. Names are kept as hashes of 64 bits alone, under a seed of this
// process: 16 bytes a name, and one in 10^13 names that are not on a list of a
// million is taken for one that is. To sort flows that is good enough; to
// protect anything a name is not.
type nameIndex struct {
	seed           maphash.Seed
	exact, suffix  nameTable
	bitmaps        []bitmap
	none           bitmap // a name that no rule has, and no name
	conditional    bitmap // the rules that have a condition on the name
	loose          bitmap // those of them that have words or expressions too
	patterns       []*patterns
	hasConditional bool
}

// patterns are what a rule looks for in a name, beside what the index has.
type patterns struct {
	keywords []string
	regexes  []*regexp.Regexp
}

func (p *patterns) match(name string) bool {
	for _, k := range p.keywords {
		if strings.Contains(name, k) {
			return true
		}
	}
	for _, r := range p.regexes {
		if r.MatchString(name) {
			return true
		}
	}
	return false
}

// find returns the rules that a name passes, by names and suffixes: those of the
// longest one that is known, which has those of all that are shorter.
func (x *nameIndex) find(name string) bitmap {
	if id, ok := x.exact.get(maphash.String(x.seed, name)); ok {
		return x.bitmaps[id]
	}
	for s := name; s != ""; _, s, _ = strings.Cut(s, ".") {
		if id, ok := x.suffix.get(maphash.String(x.seed, s)); ok {
			return x.bitmaps[id]
		}
	}
	return x.none
}

// nameTable is a hash table with open addressing. Zero means an empty place: the
// one hash in 2^64 that is zero is taken for one.
type nameTable struct {
	hashes []uint64
	ids    []uint32
	shift  uint
}

func newNameTable(n int) nameTable {
	size, shift := 8, uint(61)
	for size*3 < n*4 {
		size *= 2
		shift--
	}
	return nameTable{make([]uint64, size), make([]uint32, size), shift}
}

// place returns where a hash is, or would be.
func (t *nameTable) place(h uint64) int {
	mask := len(t.hashes) - 1
	for i := int(h >> t.shift); ; i = (i + 1) & mask {
		if t.hashes[i] == h || t.hashes[i] == 0 {
			return i
		}
	}
}

func (t *nameTable) get(h uint64) (id uint32, ok bool) {
	if len(t.hashes) == 0 || h == 0 {
		return 0, false
	}
	i := t.place(h)
	return t.ids[i], t.hashes[i] == h
}

// nameBuilder makes a nameIndex.
type nameBuilder struct {
	x     *nameIndex
	rules int
	ids   map[string]uint32    // of bitmaps, by their bytes
	pairs map[[2]uint32]uint32 // the union of two
}

// newNameIndex compiles the conditions on names: lists[n] are the names of rule n
// and its files, patterns[n] what it looks for in them; both nil: any name.
func newNameIndex(lists []*Names, all []*patterns) *nameIndex {
	b := &nameBuilder{
		x:     &nameIndex{seed: maphash.MakeSeed(), patterns: all, none: newBitmap(len(lists)), conditional: newBitmap(len(lists)), loose: newBitmap(len(lists))},
		rules: len(lists), ids: map[string]uint32{}, pairs: map[[2]uint32]uint32{},
	}
	x := b.x
	exact, suffix := 0, 0
	for n := range lists {
		if lists[n] == nil && all[n] == nil {
			x.none.set(n)
			continue
		}
		x.conditional.set(n)
		x.hasConditional = true
		if all[n] != nil {
			x.loose.set(n)
		}
		if lists[n] != nil {
			is := bytes.Count(lists[n].text, []byte{'='})
			exact += is
			suffix += lists[n].Len() - is
		}
	}
	x.exact, x.suffix = newNameTable(exact), newNameTable(suffix)
	for n := range lists {
		if lists[n] != nil {
			b.own(n, lists[n])
		}
	}
	b.widen(lists)
	return x
}

// own puts the names of one rule into the tables, with the bits of those that
// have the same name.
func (b *nameBuilder) own(rule int, names *Names) {
	alone := newBitmap(b.rules)
	alone.set(rule)
	id := b.id(alone)
	names.each(func(name []byte, exact bool) {
		t := &b.x.suffix
		if exact {
			t = &b.x.exact
		}
		h := maphash.Bytes(b.x.seed, name)
		if h == 0 {
			return
		}
		if i := t.place(h); t.hashes[i] == 0 {
			t.hashes[i], t.ids[i] = h, id
		} else {
			t.ids[i] = b.union(t.ids[i], id)
		}
	})
}

// widen gives each name the bits of the suffixes above it, and of the rules
// that want no name.
func (b *nameBuilder) widen(lists []*Names) {
	none := b.id(b.x.none.clone())
	suffix := nameTable{b.x.suffix.hashes, append([]uint32(nil), b.x.suffix.ids...), b.x.suffix.shift}
	exact := nameTable{b.x.exact.hashes, append([]uint32(nil), b.x.exact.ids...), b.x.exact.shift}
	for _, names := range lists {
		if names == nil {
			continue
		}
		names.each(func(name []byte, isExact bool) {
			own, wide := &b.x.suffix, &suffix
			if isExact {
				own, wide = &b.x.exact, &exact
			}
			h := maphash.Bytes(b.x.seed, name)
			if h == 0 {
				return
			}
			i := own.place(h)
			id := b.union(own.ids[i], none)
			for s := name; len(s) > 0; _, s, _ = bytes.Cut(s, []byte{'.'}) {
				if above, ok := b.x.suffix.get(maphash.Bytes(b.x.seed, s)); ok {
					id = b.union(id, above)
				}
			}
			wide.ids[i] = id
		})
	}
	b.x.suffix, b.x.exact = suffix, exact
}

// id gives equal bitmaps the same number.
func (b *nameBuilder) id(m bitmap) uint32 {
	key := keyOf(m)
	if id, ok := b.ids[key]; ok {
		return id
	}
	id := uint32(len(b.x.bitmaps))
	b.ids[key] = id
	b.x.bitmaps = append(b.x.bitmaps, m)
	return id
}

func (b *nameBuilder) union(one, other uint32) uint32 {
	if one == other {
		return one
	}
	pair := [2]uint32{min(one, other), max(one, other)}
	if id, ok := b.pairs[pair]; ok {
		return id
	}
	m := b.x.bitmaps[one].clone()
	m.or(b.x.bitmaps[other])
	id := b.id(m)
	b.pairs[pair] = id
	return id
}
