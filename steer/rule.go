package steer

import (
	"errors"
	"fmt"
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

// wantRule is the ip rule of a plan in one family.
func wantRule(p *Plan, family int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = family, p.Priority, p.Table, Protocol
	r.Mark, r.Mask = p.Mark, &p.Mask
	return r
}

func sameRule(a, b *netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.Protocol == b.Protocol &&
		a.Mark == b.Mark && maskOf(a) == maskOf(b) && !a.Invert
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
func setRules(h *netlink.Handle, p *Plan, v6 bool) (changed bool, stale []netlink.Rule, err error) {
	for _, family := range families {
		rules, err := listRules(h, family)
		if err != nil {
			return changed, nil, err
		}
		want, have := wantRule(p, family), false
		for _, r := range rules {
			switch {
			case r.Protocol != Protocol || r.Table != p.Table:
			case !have && sameRule(&r, want) && (v6 || family == unix.AF_INET):
				have = true
			default:
				stale = append(stale, r)
			}
		}
		if have || family == unix.AF_INET6 && !v6 {
			continue
		}
		if err := h.RuleAdd(want); err != nil {
			return changed, nil, fmt.Errorf("add ip rule %s: %w", ruleText(want), err)
		}
		changed = true
	}
	return changed, stale, nil
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
	if mask := maskOf(r); mask != 0 {
		fmt.Fprintf(&b, " fwmark %#x", r.Mark)
		if mask != ^uint32(0) {
			fmt.Fprintf(&b, "/%#x", mask)
		}
	}
	if r.Table != 0 {
		fmt.Fprintf(&b, " lookup %d", r.Table)
	}
	if r.Protocol != 0 {
		fmt.Fprintf(&b, " proto %d", r.Protocol)
	}
	return b.String()
}
