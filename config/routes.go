package config

import (
	"fmt"
	"strings"

	"cgtun/cgroupsel"
	"cgtun/steer"
)

// part returns the path of a route's "select" or "tun": a table of its own
// where there is one route.
func (d *decoder) part(route int, key string) string {
	if d.oneRoute {
		return key
	}
	return at("route", route) + "." + key
}

// routes puts [select] and [tun] into the one [route], or checks that each
// [[route]] has its own.
func (d *decoder) routes(l *layout) {
	if d.oneRoute {
		if len(l.Route) == 0 {
			l.Route = []Route{defaultRoute()}
		}
		for _, key := range []string{"select", "tun"} {
			if _, ok := d.written["route[0]."+key]; ok {
				d.badKey("route[0]."+key, fmt.Sprintf("[route.%s] does not go with [route]; allowed: [%s], or [[route]]", key, key))
			}
		}
		l.Route[0].Select, l.Route[0].Tun = l.Select, l.Tun
		l.File.routes = l.Route
		return
	}
	for _, key := range []string{"select", "tun"} {
		if _, ok := d.written[key]; ok {
			d.badKey(key, fmt.Sprintf("[%s] does not go with [[route]]; allowed: [route.%s] in each of them", key, key))
		}
	}
	if len(l.Route) == 0 {
		d.bad("route", "has no element; allowed: one [route] or several [[route]]")
	}
	for i := range l.Route {
		for _, key := range []string{"name", "mark", "table", "priority", "select", "tun.name"} {
			if _, ok := d.written[at("route", i)+"."+key]; ok || (key == "tun.name" && l.Route[i].Via.Mode != steer.ViaTun) {
				continue
			}
			d.bad(at("route", i)+"."+key, "is missing; allowed: each [[route]] has its own name, mark, table, priority, select and tun.name")
		}
	}
	l.File.routes = l.Route
}

// clashes reports routes that would take each other's packets.
func (d *decoder) clashes(routes []Route) {
	for i := range routes {
		for j := range i {
			d.clash(routes, j, i)
		}
	}
}

// clash compares two routes; the later one is told.
func (d *decoder) clash(routes []Route, first, second int) {
	a, b := &routes[first], &routes[second]
	tell := func(path, what, allowed string) {
		if !d.isBroken(strings.Replace(path, at("route", second), at("route", first), 1)) {
			d.bad(path, fmt.Sprintf("%s of route %q already; allowed: %s", what, a.Name, allowed))
		}
	}
	path := at("route", second)
	if a.Name == b.Name {
		tell(path+".name", fmt.Sprintf("%q is the name", b.Name), "a name of its own")
	}
	if a.Table == b.Table {
		tell(path+".table", fmt.Sprintf("%d is the table", b.Table), "a table of its own")
	}
	if a.Priority == b.Priority {
		tell(path+".priority", fmt.Sprintf("%d is the priority", b.Priority), "a priority of its own")
	}
	if a.Overlaps(&b.Config) {
		tell(path+".mark", fmt.Sprintf("%#x/%#x overlaps the mark %#x/%#x", b.Mark, b.Mask, a.Mark, a.Mask), "marks that differ in a bit of both masks")
	}
	if a.Tun.Name == b.Tun.Name && a.Via.Mode == steer.ViaTun && b.Via.Mode == steer.ViaTun {
		tell(path+".tun.name", fmt.Sprintf("%q is the device", b.Tun.Name), "a device of its own")
	}
	for k, mine := range b.Select.Cgroups {
		for _, other := range a.Select.Cgroups {
			if nested(mine, other) {
				tell(at(path+".select.cgroups", k), fmt.Sprintf("%q meets the cgroup %q", mine, other), "cgroups that are neither equal nor nested")
			}
		}
	}
}

// nested tells whether two entries of select.cgroups are equal, or one plain
// path lies in the other. What globs meet is known at run time only.
func nested(a, b string) bool {
	if a == b {
		return true
	}
	if cgroupsel.IsUnit(a) || cgroupsel.IsUnit(b) || cgroupsel.IsGlob(a) || cgroupsel.IsGlob(b) {
		return false
	}
	return strings.HasPrefix(a, b+"/") || strings.HasPrefix(b, a+"/")
}
