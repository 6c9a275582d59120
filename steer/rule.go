package steer

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func listRules(h *netlink.Handle, family int) ([]netlink.Rule, error) {
	rules, err := again(func() ([]netlink.Rule, error) { return h.RuleList(family) })
	if noFamily(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list ip rules: %w", err)
	}
	return rules, nil
}

// wantRules are the ip rules of a plan in one family, in their order. What
// comes out of our device for somebody behind an interface carries the mark,
// for the sake of rp_filter, and goes by the main table. Where a family is fenced,
// all of it goes by that, but for a default route.
func wantRules(p *Plan, family int) []*netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = family, p.Priority, p.Table, Protocol
	r.Mark, r.Mask = p.Mark, &p.Mask
	var rules []*netlink.Rule
	for _, mark := range append(slices.Clip(p.Earlier), Mark{p.Mark, p.Mask}) {
		one, own := *r, mark == Mark{p.Mark, p.Mask}
		one.Mark, one.Mask = mark.Value, &mark.Mask
		first := one
		first.Table = unix.RT_TABLE_MAIN
		switch {
		case p.fences(family == unix.AF_INET6):
			first.SuppressPrefixlen = 0
			rules = append(rules, &first)
		case own && len(p.Interfaces) > 0 && p.byTun():
			first.IifName = p.Device
			rules = append(rules, &first)
		}
		rules = append(rules, &one)
	}
	return rules
}

// inOrder says whether the order of rules matters: that of marks alone does not.
func inOrder(rules []*netlink.Rule) bool {
	return slices.ContainsFunc(rules, func(r *netlink.Rule) bool { return r.Table == unix.RT_TABLE_MAIN })
}

func sameRule(a, b *netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.Protocol == b.Protocol &&
		a.Mark == b.Mark && maskOf(a) == maskOf(b) && a.IifName == b.IifName && a.SuppressPrefixlen == b.SuppressPrefixlen && !a.Invert
}

// numberOf is the instance of one of our rules: its table, or that of the rule
// that it stands beside.
func numberOf(r *netlink.Rule, all []netlink.Rule) int {
	if r.Table != unix.RT_TABLE_MAIN {
		return r.Table
	}
	for _, o := range all {
		if o.Protocol == Protocol && o.Table != unix.RT_TABLE_MAIN && o.Priority == r.Priority && o.Mark == r.Mark {
			return o.Table
		}
	}
	return r.Table
}

// maskOf is the mask of a rule's fwmark; 0 means that it has none.
func maskOf(r *netlink.Rule) uint32 {
	switch {
	case r.Mask != nil:
		return *r.Mask
	case r.Mark != 0:
		return ^uint32(0)
	}
	return 0
}

// setRules adds the plan's ip rules where they are missing and says whether
// any was. stale are other ones of the instance, to be deleted when nothing
// sets their mark any more.
func setRules(h *netlink.Handle, p *Plan, w *way) (changed bool, stale []netlink.Rule, err error) {
	for _, family := range families {
		all, err := listRules(h, family)
		if err != nil {
			return changed, nil, err
		}
		rules := slices.Clone(all)
		var want []*netlink.Rule
		if steers(p, w, family == unix.AF_INET6) {
			want = wantRules(p, family)
		}
		if !inOrder(want) {
			// Not one is taken away before all are there.
			want = slices.DeleteFunc(want, func(o *netlink.Rule) bool {
				i := slices.IndexFunc(rules, func(r netlink.Rule) bool { return r.Protocol == Protocol && sameRule(&r, o) })
				if i >= 0 {
					rules = slices.Delete(rules, i, i+1)
				}
				return i >= 0
			})
		}
		var others []netlink.Rule
		found := 0 // of want, in their order
		for _, r := range rules {
			switch {
			case r.Protocol != Protocol || numberOf(&r, all) != p.Table:
			case found < len(want) && sameRule(&r, want[found]):
				found++
			default:
				others = append(others, r)
			}
		}
		if found == len(want) {
			stale = append(stale, others...)
			continue
		}
		changed = true
		if err := addRules(h, want[found:], others); err != nil {
			return changed, nil, err
		}
		stale = append(stale, slices.DeleteFunc(others, func(r netlink.Rule) bool { return isAny(&r, want[found:]) })...)
	}
	return changed, stale, nil
}

// addRules adds rules behind those of the same priority. One that is there,
// but at the wrong place, is taken away first.
func addRules(h *netlink.Handle, rules []*netlink.Rule, there []netlink.Rule) error {
	for _, r := range there {
		if isAny(&r, rules) {
			if err := delRules(h, []netlink.Rule{r}); err != nil {
				return err
			}
		}
	}
	for _, r := range rules {
		// One that is there is of the table before (Renumber).
		if err := h.RuleAdd(r); err != nil && !(r.Table == unix.RT_TABLE_MAIN && errors.Is(err, unix.EEXIST)) {
			return fmt.Errorf("add ip rule %s: %w", ruleText(r), err)
		}
	}
	return nil
}

func isAny(r *netlink.Rule, of []*netlink.Rule) bool {
	return slices.ContainsFunc(of, func(o *netlink.Rule) bool { return sameRule(r, o) })
}

func delRules(h *netlink.Handle, rules []netlink.Rule) error {
	var errs []error
	for _, r := range rules {
		if err := h.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("delete ip rule %s: %w", ruleText(&r), err))
		}
	}
	return errors.Join(errs...)
}

// ruleText shows a rule as ip-rule(8) does, as far as it concerns us.
func ruleText(r *netlink.Rule) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d: from all", r.Priority)
	if r.Src != nil {
		b.Reset()
		fmt.Fprintf(&b, "%d: from %s", r.Priority, r.Src)
	}
	if r.Invert {
		b.WriteString(" not")
	}
	if mask := maskOf(r); mask != 0 {
		fmt.Fprintf(&b, " fwmark %#x", r.Mark)
		if mask != ^uint32(0) {
			fmt.Fprintf(&b, "/%#x", mask)
		}
	}
	if r.IifName != "" {
		fmt.Fprintf(&b, " iif %s", r.IifName)
	}
	if r.Table != 0 {
		fmt.Fprintf(&b, " lookup %d", r.Table)
	}
	if r.SuppressPrefixlen >= 0 {
		fmt.Fprintf(&b, " suppress_prefixlength %d", r.SuppressPrefixlen)
	}
	if r.Protocol != 0 {
		fmt.Fprintf(&b, " proto %d", r.Protocol)
	}
	return b.String()
}
