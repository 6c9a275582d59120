package steer

import (
	"net/netip"
	"slices"

	"github.com/google/nftables"
)

// bypassOf returns the built-in and the plan's bypassed prefixes, as outermost
// does.
func bypassOf(p *Plan) []netip.Prefix { return outermost(slices.Concat(builtin, p.Bypass)) }

// outermost returns prefixes sorted by address, without those inside of others.
func outermost(prefixes []netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, prefix := range prefixes {
		if !prefix.IsValid() {
			continue
		}
		if a := prefix.Addr(); a.Is4In6() && prefix.Bits() >= 96 {
			prefix = netip.PrefixFrom(a.Unmap(), prefix.Bits()-96)
		}
		all = append(all, prefix.Masked())
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits() // the wider one first
	})
	kept := all[:0]
	for _, prefix := range all {
		if n := len(kept); n > 0 && kept[n-1].Overlaps(prefix) {
			continue
		}
		kept = append(kept, prefix)
	}
	return kept
}

// split parts sorted prefixes by family: v4 sorts first.
func split(prefixes []netip.Prefix) (v4, v6 []netip.Prefix) {
	i := slices.IndexFunc(prefixes, func(p netip.Prefix) bool { return p.Addr().Is6() })
	if i < 0 {
		return prefixes, nil
	}
	return prefixes[:i], prefixes[i:]
}

// intervals are the elements of an interval set: a start, and an end that is
// the first address outside. Neighbours become one, and what reaches the last
// address of all has no end.
func intervals(sorted []netip.Prefix) []nftables.SetElement {
	var elems []nftables.SetElement
	for i := 0; i < len(sorted); {
		end := after(sorted[i])
		next := i + 1
		for next < len(sorted) && sorted[next].Addr() == end {
			end = after(sorted[next])
			next++
		}
		elems = append(elems, nftables.SetElement{Key: sorted[i].Addr().AsSlice()})
		if end.IsValid() {
			elems = append(elems, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
		i = next
	}
	return elems
}

// after returns the first address behind a prefix; not a valid one if there
// is none.
func after(p netip.Prefix) netip.Addr {
	last := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(last)*8; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(last)
	return a.Next()
}
