// Package rules decides by which outbound a flow goes: facts in, verdict out.
//
// A Set is compiled once from the [[rule]] tables and is immutable; Match is a
// pure function of it and of the facts, allocates nothing and is safe for
// concurrent use. The package reads no kernel state, resolves no names but
// those of users and knows no outbound but by its name; router calls it, and explain through it.
//
// How the first match is found. Rules are bits of a bitmap. For each condition
// that the flow itself answers (destination, source, port, protocol,
// attachment) an index made by Compile leads from the flow's value to the
// bitmap of the rules that this condition lets pass, those without it
// included; the bitmaps are and-ed a word of 64 rules at a time. What is left
// is asked about its owner, in order, and whether it looks for something in the
// name that no index has. So the cost hangs neither on the number of prefixes and
// names nor, up to a few ns for each 64 of them, on the number of rules.
package rules

import (
	"math/bits"

	"cgtun/flow"
)

// Fact is a set of facts that have to be looked up for a flow.
type Fact uint8

const (
	// FactOwner is the process behind the flow: Facts.Owner.
	FactOwner Fact = 1 << iota
	// FactCgroup is its cgroup, where no more of Facts.Owner is known.
	FactCgroup
	// FactName is the name of the destination: Facts.Name.
	FactName
)

// Facts is what is known of a flow.
type Facts struct {
	Flow  *flow.Flow
	Owner *flow.Owner // nil with FactOwner in Known: there is none
	// Name is in lower case, without a dot at the end; "" with FactName in
	// Known: it has none.
	Name string
	// Known says which of the facts above are the last word on them. One that
	// is not is ignored, and comes back as missing if a rule hangs on it.
	Known Fact
}

// Verdict is what the rules say of a flow.
type Verdict struct {
	Rule int    // number from 1 in the order of the file; 0: no rule matched
	Line int    // its line in the file; 0 if there is no rule or no file
	Use  string // an outbound, a group, or UseDirect, UseReject, UseDrop
}

// Match returns the verdict of the first rule that matches, or UseDirect if none
// does. If a rule before that one hangs on a fact that is not known yet, that
// fact is missing and the verdict is void. A lost owner is meant by the rules that
// deny a cgroup or a user, and by no other that asks for one: else who closes his
// socket quickly enough would be denied nothing.
func (s *Set) Match(f *Facts) (v Verdict, missing Fact) {
	a, b, c, d, e := s.candidates(f.Flow)
	named, maybe := s.byName(f)
	for w := range s.words {
		left := a[w] & b[w] & c[w] & d[w] & e[w] & (named[w] | maybe[w])
		for left != 0 {
			bit := bits.TrailingZeros64(left)
			left &^= 1 << bit
			n := w*64 + bit
			r := &s.rules[n]
			if r.owner != nil {
				yes, missing := r.owner.ask(f)
				if missing != 0 {
					return Verdict{}, missing
				}
				if !yes {
					continue
				}
				if f.Owner.Lost && !r.denies() {
					continue
				}
			}
			if named[w]&(1<<bit) == 0 {
				if f.Known&FactName == 0 {
					return Verdict{}, FactName
				}
				if !s.name.patterns[n].match(f.Name) {
					continue
				}
			}
			return r.verdict, 0
		}
	}
	return Verdict{Use: UseDirect}, 0
}

// byName returns the rules that the name passes, and those that it may.
func (s *Set) byName(f *Facts) (named, maybe bitmap) {
	switch {
	case !s.name.hasConditional || f.Known&FactName != 0 && f.Name == "":
		return s.name.none, s.name.none
	case f.Known&FactName == 0:
		return s.name.none, s.name.conditional
	}
	return s.name.find(f.Name), s.name.loose
}

// candidates looks the flow up in each index. Arrays of bitmaps would escape
// or be copied; five results stay in registers and on the stack.
func (s *Set) candidates(f *flow.Flow) (dst, src, port, proto, att bitmap) {
	return s.dst.find(f.Dst.Addr()), s.src.find(f.Src.Addr()), s.port.find(f.Proto, f.Dst.Port()),
		s.proto.find(f.Proto), s.netns.find(f.Attachment)
}

// NeedsName says whether any rule hangs on the name of the destination.
func (s *Set) NeedsName() bool { return s.name.hasConditional }

// NeedsOwner says whether any rule hangs on the process behind a flow.
func (s *Set) NeedsOwner() bool { return s.needsOwner }

// Len returns the number of rules.
func (s *Set) Len() int { return len(s.rules) }

// compiled is one rule: what no index answers, and its verdict.
type compiled struct {
	owner   *ownerCond // nil: any owner, and none
	verdict Verdict
}

// denies says whether no outbound is asked.
func (r *compiled) denies() bool { return r.verdict.Use == UseReject || r.verdict.Use == UseDrop }
