package steer

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
)

// taken looks for others' ip rules and routes in the way of a plan. device
// asks for the device's name, too. What these instances have is in nobody's way:
// it is ours, or from a dead run.
func taken(h *netlink.Handle, p *Plan, device bool, mine ...int) error {
	for _, family := range families {
		rules, err := listRules(h, family)
		if err != nil {
			return err
		}
		for _, r := range rules {
			if r.Protocol == Protocol && slices.Contains(mine, numberOf(&r, rules)) {
				continue
			}
			if err := ruleInTheWay(p, &r); err != nil {
				return err
			}
		}
		routes, err := listRoutes(h, family, p.Table)
		if err != nil {
			return err
		}
		if slices.Contains(mine, p.Table) {
			routes = slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Protocol == Protocol })
		}
		if len(routes) > 0 {
			return &TakenError{What: fmt.Sprintf("table %d", p.Table), Holder: tableHolder(h, routes)}
		}
	}
	if !device || !p.byTun() {
		return nil
	}
	l, err := h.LinkByName(p.Device)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for device %s: %w", p.Device, err)
	}
	return &TakenError{What: "device " + p.Device, Holder: deviceHolder(l)}
}

// ruleInTheWay says what an ip rule has that the plan wants. Inverted marks
// ("not fwmark") match nearly everything, and are no claim on a mark.
func ruleInTheWay(p *Plan, r *netlink.Rule) error {
	if r.Priority == p.Priority {
		return &TakenError{What: fmt.Sprintf("ip rule priority %d", p.Priority), Holder: ruleHolder(r)}
	}
	mask := maskOf(r)
	if mask == 0 || r.Invert {
		return nil
	}
	mine := p.Mask
	if r.Protocol == Protocol {
		// Another instance: told apart in the ct mark as well.
		mine = p.ctMask()
	}
	if overlaps(r.Mark, mask, p.Mark, mine) {
		return &TakenError{What: fmt.Sprintf("mark %#x/%#x", p.Mark, p.Mask), Holder: ruleHolder(r)}
	}
	return nil
}

func ruleHolder(r *netlink.Rule) string {
	text := fmt.Sprintf("ip rule %q", ruleText(r))
	if r.Protocol == Protocol {
		return fmt.Sprintf("cgtun instance %d (%s)", r.Table, text)
	}
	return text
}

func tableHolder(h *netlink.Handle, routes []netlink.Route) string {
	r := routes[0]
	text := fmt.Sprintf("route %s proto %d", keyOf(&r).dst, r.Protocol)
	if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
		text += " dev " + l.Attrs().Name
	}
	if n := len(routes) - 1; n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	if r.Protocol == Protocol {
		return fmt.Sprintf("cgtun instance %d (%s)", r.Table, text)
	}
	return text
}

func deviceHolder(l netlink.Link) string {
	text := fmt.Sprintf("a %s device", l.Type())
	if alias := l.Attrs().Alias; alias != "" {
		text += fmt.Sprintf(" with alias %q", alias)
	}
	return text
}
