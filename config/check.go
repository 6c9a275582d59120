package config

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"cgtun/dns"
	"cgtun/rules"
	"cgtun/steer"
)

// check looks at ranges, references and clashes, and masks the prefixes.
func (d *decoder) check(l *layout) {
	for i := range l.routes {
		route := &l.routes[i]
		route.Config.Validate(d.under(at("route", i)))
		route.Select.Validate(d.under(d.part(i, "select")))
		route.Tun.Validate(d.under(d.part(i, "tun")))
		mask(route.Select.Bypass)
	}
	l.DNS.Validate(d.under("dns"))
	for i := range l.Outbounds {
		l.Outbounds[i].Validate(d.under(at("outbound", i)))
	}
	for i := range l.Groups {
		l.Groups[i].Validate(d.under(at("group", i)))
	}
	for i := range l.Rules {
		l.Rules[i].Validate(d.under(at("rule", i)))
		mask(l.Rules[i].CIDR)
		mask(l.Rules[i].Src)
	}
	mask(l.Policy.Allow)
	l.Control.Validate(d.under("control"))
	l.Limits.Validate(d.under("limits"))
	l.Log.Validate(d.under("log"))
	d.references(l)
	d.clashes(l.routes)
	d.loops(l)
}

// loops reports what would come back to cgtun: an outbound that marks its
// packets as captured ones are, and a device of ours among the interfaces.
func (d *decoder) loops(l *layout) {
	for i := range l.routes {
		route := &l.routes[i]
		for j, o := range l.Outbounds {
			if o.Mark != 0 && route.Overlaps(&steer.Config{Mark: o.Mark, Mask: math.MaxUint32}) {
				d.bad(at("outbound", j)+".mark", fmt.Sprintf("%#x is one that route %q captures by; allowed: a mark that differs in the bits of its mask %#x", o.Mark, route.Name, route.Mask))
			}
		}
		for j, name := range route.Select.Interfaces {
			if name == route.Tun.Name {
				d.bad(at(d.part(i, "select")+".interfaces", j), fmt.Sprintf("%q is the device of cgtun; allowed: other interfaces", name))
			}
		}
	}
}

// mask clears the bits behind the length of each prefix.
func mask(prefixes []netip.Prefix) {
	for i := range prefixes {
		prefixes[i] = prefixes[i].Masked()
	}
}

// Validate calls bad for every value that is out of range.
func (l *Limits) Validate(bad func(key, what string)) {
	const least = 16 << 20
	if l.Memory < least {
		bad("memory", fmt.Sprintf(`is %s; allowed: %s or more`, l.Memory, Size(least)))
	}
}

// Validate calls bad for every value that is out of range.
func (l *Log) Validate(bad func(key, what string)) {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, l.Level) {
		bad("level", fmt.Sprintf(`is %q; allowed: "debug", "info", "warn", "error"`, l.Level))
	}
	if l.Format != FormatText && l.Format != FormatJSON {
		bad("format", fmt.Sprintf(`is %q; allowed: "text", "json"`, l.Format))
	}
}

// references checks the names of outbounds and groups and everything that
// refers to them.
func (d *decoder) references(l *layout) {
	ways := d.ways(l)
	for i, o := range l.Outbounds {
		if o.Via != "" {
			d.refer(ways, at("outbound", i)+".via", o.Via, rules.UseDirect)
		}
	}
	for i, g := range l.Groups {
		for j, member := range g.Outbounds {
			path := at(at("group", i)+".outbounds", j)
			if slices.Contains(g.Outbounds[:j], member) {
				d.bad(path, fmt.Sprintf("%q is listed twice; allowed: each outbound once", member))
			}
			d.refer(ways, path, member, rules.UseDirect)
		}
	}
	for i, r := range l.Rules {
		d.refer(ways, at("rule", i)+".use", r.Use, rules.UseDirect, rules.UseReject, rules.UseDrop)
	}
	d.referDNS(ways, l.DNS)
	d.cycles(ways)
}

func (d *decoder) referDNS(ways map[string]*way, settings dns.Config) {
	if settings.Outbound != "" {
		d.refer(ways, "dns.outbound", settings.Outbound, rules.UseDirect)
	}
	for i, route := range settings.Route {
		if route.Outbound != "" {
			d.refer(ways, at("dns.route", i)+".outbound", route.Outbound, rules.UseDirect)
		}
	}
}

// way is an outbound or a group, and what it leads to.
type way struct {
	name string
	path string   // of its name
	next []string // names
	at   []string // the path at which each of next stands
	done bool     // cycles has been here
}

// ways lists outbounds and groups by their names, each name once.
func (d *decoder) ways(l *layout) map[string]*way {
	all := map[string]*way{}
	add := func(w *way) {
		path := w.path + ".name"
		switch other := all[w.name]; {
		case w.name == "":
		case rules.Reserved(w.name):
			d.bad(path, fmt.Sprintf(`%q is reserved; allowed: any name but "direct", "reject", "drop"`, w.name))
		case other != nil:
			line, _ := d.places.valueAt(d.asWritten(other.path + ".name"))
			d.bad(path, fmt.Sprintf("%q is the name of the one in line %d already; allowed: a name that no other outbound or group has", w.name, line))
		default:
			all[w.name] = w
		}
	}
	for i, o := range l.Outbounds {
		w := &way{name: o.Name, path: at("outbound", i)}
		if o.Via != "" {
			w.next, w.at = []string{o.Via}, []string{w.path + ".via"}
		}
		add(w)
	}
	for i, g := range l.Groups {
		w := &way{name: g.Name, path: at("group", i), next: g.Outbounds}
		for j := range g.Outbounds {
			w.at = append(w.at, at(w.path+".outbounds", j))
		}
		add(w)
	}
	return all
}

// refer reports a name that is neither a way nor one of the built-in ones.
func (d *decoder) refer(ways map[string]*way, path, name string, builtIn ...string) {
	if ways[name] != nil || slices.Contains(builtIn, name) {
		return
	}
	known := append(slices.Sorted(maps.Keys(ways)), builtIn...)
	what := fmt.Sprintf("%.60q is no outbound and no group; ", name)
	if rules.Reserved(name) {
		what = fmt.Sprintf("%q cannot stand here; ", name)
	} else if meant := nearest(name, known); meant != "" {
		d.bad(path, what+fmt.Sprintf("the nearest known one is %q", meant))
		return
	}
	const most = 12
	list := make([]string, 0, most)
	for _, k := range known[max(0, len(known)-most):] {
		list = append(list, fmt.Sprintf("%q", k))
	}
	d.bad(path, what+"allowed: "+strings.Join(list, ", "))
}

// cycles reports each way that leads back to itself, once, where the circle
// closes.
func (d *decoder) cycles(ways map[string]*way) {
	for _, name := range slices.Sorted(maps.Keys(ways)) {
		d.follow(ways, ways[name], nil)
	}
}

func (d *decoder) follow(ways map[string]*way, w *way, trail []string) {
	if w.done {
		return
	}
	trail = append(trail, w.name)
	for i, next := range w.next {
		if begin := slices.Index(trail, next); begin >= 0 {
			circle := append(slices.Clone(trail[begin:]), next)
			d.bad(w.at[i], fmt.Sprintf("%q closes a circle (%s); allowed: chains that end at an outbound without via", next, strings.Join(circle, " → ")))
			continue
		}
		if ways[next] != nil {
			d.follow(ways, ways[next], trail)
		}
	}
	w.done = true
}
