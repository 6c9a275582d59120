package rules

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"cgtun/flow"
)

// bitmap has a bit for each rule, rule n at bit n%64 of word n/64. Those of an
// index are shared and never changed after Compile.
type bitmap []uint64

func newBitmap(rules int) bitmap { return make(bitmap, (rules+63)/64) }

func (b bitmap) set(i int) { b[i/64] |= 1 << (i % 64) }

func (b bitmap) put(i int, on bool) {
	b[i/64] &^= 1 << (i % 64)
	if on {
		b.set(i)
	}
}

func (b bitmap) clone() bitmap { return append(bitmap(nil), b...) }

func (b bitmap) or(o bitmap) {
	for i := range o {
		b[i] |= o[i]
	}
}

// interner gives equal bitmaps the same storage: a list of 10,000 prefixes in
// one rule is one bitmap.
type interner map[string]bitmap

func (in interner) intern(b bitmap) bitmap {
	key := keyOf(b)
	if known, ok := in[key]; ok {
		return known
	}
	in[key] = b
	return b
}

// keyOf is the same for equal bitmaps.
func keyOf(b bitmap) string {
	key := make([]byte, 0, len(b)*8)
	for _, w := range b {
		key = binary.LittleEndian.AppendUint64(key, w)
	}
	return string(key)
}

// prefixIndex leads from an address to the rules that let it pass.
type prefixIndex struct {
	table bart.Table[bitmap]
	none  bitmap // no prefix covers the address
}

// find looks the address up by longest prefix. Mapped and zoned addresses
// count as the plain ones, as they do on the wire.
func (x *prefixIndex) find(a netip.Addr) bitmap {
	if b, ok := x.table.Lookup(a.Unmap().WithZone("")); ok {
		return b
	}
	return x.none
}

// newPrefixIndex compiles one condition: wanted[n] are the prefixes of rule n,
// nil means any.
func newPrefixIndex(wanted [][]netip.Prefix) *prefixIndex {
	x := &prefixIndex{none: newBitmap(len(wanted))}
	own := new(bart.Table[bitmap])
	for n, prefixes := range wanted {
		if prefixes == nil {
			x.none.set(n)
		}
		for _, p := range prefixes {
			own.Modify(plain(p), func(b bitmap, known bool) (bitmap, bool) {
				if !known {
					b = newBitmap(len(wanted))
				}
				b.set(n)
				return b, false
			})
		}
	}
	// A lookup gives one prefix only, so each carries the rules of all that
	// cover it. The sorted order brings the wider one first.
	in := make(interner)
	for p, b := range own.AllSorted() {
		b = b.clone()
		if _, wider, ok := x.table.LookupPrefixLPM(p); ok {
			b.or(wider)
		} else {
			b.or(x.none)
		}
		x.table.Insert(p, in.intern(b))
	}
	return x
}

// portIndex leads from a port to the rules that let it pass. A protocol
// without ports passes only rules that name none.
type portIndex struct {
	starts []uint16 // sorted; starts[0] is 0
	sets   []bitmap // sets[i] is for starts[i] up to the next start
	none   bitmap
}

func (x *portIndex) find(p flow.Proto, port uint16) bitmap {
	if p != flow.TCP && p != flow.UDP {
		return x.none
	}
	lo, hi := 0, len(x.starts)
	for hi-lo > 1 {
		if mid := (lo + hi) / 2; x.starts[mid] <= port {
			lo = mid
		} else {
			hi = mid
		}
	}
	return x.sets[lo]
}

// newPortIndex compiles one condition, as newPrefixIndex does. It sweeps over the
// ports, and cuts them where a range begins or ends.
func newPortIndex(wanted [][]PortRange) *portIndex {
	x := &portIndex{none: newBitmap(len(wanted))}
	type change struct{ port, rule, by int } // by: +1 a range begins, -1 one has ended
	changes := []change{{}}
	for n, ranges := range wanted {
		if len(ranges) == 0 {
			x.none.set(n)
		}
		for _, r := range ranges {
			changes = append(changes, change{int(r.From), n, 1}, change{int(r.To) + 1, n, -1})
		}
	}
	slices.SortFunc(changes, func(a, b change) int { return a.port - b.port })
	in, now, depth := make(interner), x.none.clone(), make([]int, len(wanted)) // ranges of one rule can overlap
	for i, c := range changes {
		if c.by != 0 {
			depth[c.rule] += c.by
			now.put(c.rule, depth[c.rule] > 0)
		}
		if c.port > 65535 || i+1 < len(changes) && changes[i+1].port == c.port {
			continue
		}
		x.starts = append(x.starts, uint16(c.port))
		x.sets = append(x.sets, in.intern(now.clone()))
	}
	return x
}

// keyIndex leads from one of few values to the rules that let it pass.
type keyIndex[K comparable] struct {
	sets map[K]bitmap
	none bitmap // a value that no rule names
}

func (x *keyIndex[K]) find(k K) bitmap {
	if b, ok := x.sets[k]; ok {
		return b
	}
	return x.none
}

// newKeyIndex compiles one condition, as newPrefixIndex does.
func newKeyIndex[K comparable](wanted [][]K) *keyIndex[K] {
	x := &keyIndex[K]{sets: make(map[K]bitmap), none: newBitmap(len(wanted))}
	for n, keys := range wanted {
		if len(keys) == 0 {
			x.none.set(n)
		}
	}
	for n, keys := range wanted {
		for _, k := range keys {
			if x.sets[k] == nil {
				x.sets[k] = x.none.clone()
			}
			x.sets[k].set(n)
		}
	}
	return x
}
