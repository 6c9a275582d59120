package steer

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"cgtun/doctor"
)

// What can be read off the rules of others. It is little: what they mean as a
// whole is not known, so only the plain cases count.

// lets says whether a rule of a chain plainly lets pass what leaves by a device:
// an accept of everything, or of what that device has.
func lets(rules []*nftables.Rule, device string) bool {
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		return verdict(r, expr.VerdictAccept) && (unconditional(r) || namesDevice(r, expr.MetaKeyOIFNAME, device))
	})
}

// letsAnswers says the same of what comes out of a device as an answer.
func letsAnswers(rules []*nftables.Rule, device string) bool {
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		return verdict(r, expr.VerdictAccept) && (unconditional(r) || asksState(r) || namesDevice(r, expr.MetaKeyIIFNAME, device))
	})
}

// writing finds rules that change our mark, or that judge forwarded packets
// which are not forwarded any more.
func writing(p *Plan, c *nftables.Chain, rules []*nftables.Rule) (found []doctor.Result) {
	where := fmt.Sprintf("chain %s of table %s %s", c.Name, familyName(c.Table.Family), c.Table.Name)
	marks := func(r *nftables.Rule) bool { return writesMark(r, p.Mark)&p.Mask != 0 }
	if seesOurs(p, c) && slices.ContainsFunc(rules, marks) {
		found = append(found, result("firewall", doctor.Warn, fmt.Sprintf("%s writes marks, also bits of %#x: packets whose mark it changes are not captured any more", where, p.Mask),
			"give cgtun bits of its own: route.mask, and route.mark within it")...)
	}
	if c.Name == "DOCKER-USER" && slices.ContainsFunc(rules, drops) {
		found = append(found, result("firewall", doctor.Warn, where+" drops packets that are forwarded; what cgtun sends for a container is sent by the machine itself, and not judged there",
			`put the same into a rule of cgtun (use = "reject"), or into an output chain for cgtun's own cgroup (socket cgroupv2)`)...)
	}
	return found
}

// seesOurs says whether packets pass a chain that have our mark, or are to get
// it: those of own sockets do not come in. A chain without a hook may be jumped
// to from anywhere.
func seesOurs(p *Plan, c *nftables.Chain) bool {
	return c.Hooknum == nil || len(p.Interfaces) > 0 ||
		*c.Hooknum == *nftables.ChainHookOutput || *c.Hooknum == *nftables.ChainHookPostrouting
}

func verdict(r *nftables.Rule, kind expr.VerdictKind) bool {
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		v, ok := e.(*expr.Verdict)
		return ok && v.Kind == kind
	})
}

// drops also counts what iptables-nft calls REJECT.
func drops(r *nftables.Rule) bool {
	return verdict(r, expr.VerdictDrop) || slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		t, isTarget := e.(*expr.Target)
		_, isReject := e.(*expr.Reject)
		return isReject || isTarget && t.Name == "REJECT"
	})
}

// unconditional rules have nothing but counters before their verdict.
func unconditional(r *nftables.Rule) bool {
	return !slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		switch e.(type) {
		case *expr.Verdict, *expr.Counter, *expr.Log:
			return false
		}
		return true
	})
}

// asksState finds "ct state …", also as iptables-nft writes it.
func asksState(r *nftables.Rule) bool {
	return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
		switch e := e.(type) {
		case *expr.Ct:
			return e.Key == expr.CtKeySTATE
		case *expr.Match:
			return e.Name == "conntrack" || e.Name == "state"
		}
		return false
	})
}

// namesDevice finds a comparison with the name of a device.
func namesDevice(r *nftables.Rule, key expr.MetaKey, device string) bool {
	for i, e := range r.Exprs {
		m, ok := e.(*expr.Meta)
		if !ok || m.Key != key || i+1 == len(r.Exprs) {
			continue
		}
		if c, ok := r.Exprs[i+1].(*expr.Cmp); ok && c.Op == expr.CmpOpEq && unix.ByteSliceToString(c.Data) == device {
			return true
		}
	}
	return false
}

// writesMark returns the bits of the packet's or the connection's mark that a
// rule may change of a packet with our mark.
func writesMark(r *nftables.Rule, ours uint32) uint32 {
	changed := ^uint32(0) // by what stands in the register
	for i, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Meta:
			if e.Key == expr.MetaKeyMARK && e.SourceRegister {
				return changed
			}
			if e.Key == expr.MetaKeyMARK && isOther(r.Exprs[i+1:], ours) {
				return 0
			}
			changed = ^uint32(0)
		case *expr.Ct:
			if e.Key == expr.CtKeyMARK && e.SourceRegister {
				return changed
			}
			changed = ^uint32(0)
		case *expr.Bitwise:
			if len(e.Mask) == 4 && len(e.Xor) == 4 {
				changed = ^binary.NativeEndian.Uint32(e.Mask) | binary.NativeEndian.Uint32(e.Xor)
			}
		case *expr.Target:
			if e.Name == "MARK" || e.Name == "CONNMARK" {
				return targetBits(e)
			}
		}
	}
	return 0
}

// isOther says whether the next expression lets only packets with another mark
// go on.
func isOther(next []expr.Any, ours uint32) bool {
	if len(next) == 0 {
		return false
	}
	c, ok := next[0].(*expr.Cmp)
	return ok && c.Op == expr.CmpOpEq && len(c.Data) == 4 && binary.NativeEndian.Uint32(c.Data) != ours
}

// targetBits reads xt_mark_tginfo2 and xt_connmark_tginfo1: value and mask
// first, and for the latter the mask of the packet's mark.
func targetBits(t *expr.Target) (changed uint32) {
	raw, ok := t.Info.(*xt.Unknown)
	if !ok || len(*raw) < 8 {
		return ^uint32(0)
	}
	for i := 0; i+4 <= min(len(*raw), 12); i += 4 {
		changed |= binary.NativeEndian.Uint32((*raw)[i:])
	}
	return changed
}
