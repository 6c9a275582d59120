package config

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"cgtun/group"
	"cgtun/steer"
)

// notYet is a key of the contract with values that this version does not
// serve.
type notYet struct {
	// key is the path with every index as []; [select] and [tun] of a
	// [[route]] are looked up as those of the one route.
	key string
	// unserved tells whether a written value is not served.
	unserved func(v any) bool
	allowed  string
}

// notServed is the whole list of what this version does not serve. A version
// that serves a key deletes its row, here and in docs/config.md.
var notServed = []notYet{
	{"route.via", ownProgram, `"tun", {gateway, gateway6, dev}, {dev}, {tproxy}`},
	{"outbound[].mptcp", filled, "false"},
	{"group[].resume", filled, "false, or to leave the key out"},
}

// groupStandIns are the defaults of each [[group]] among the values that are not
// served: what acts in their place, and what is said of it.
var groupStandIns = []struct {
	key  string
	act  func(*group.Config)
	says string
}{
	{"resume", func(c *group.Config) { c.Resume = false },
		"group.resume is not written and its default true is not in this version: downloads that break are not resumed"},
}

// ownProgram: a transparent listener of ours, or a container as a router.
func ownProgram(v any) bool {
	via := v.(steer.Via)
	return via.Mode == steer.ViaTProxy || via.Container != ""
}

func filled(v any) bool { return !empty(reflect.ValueOf(v)) }

func empty(v reflect.Value) bool {
	if v.Kind() == reflect.Slice || v.Kind() == reflect.Map {
		return v.Len() == 0
	}
	return v.IsZero()
}

// served reports each written value that is not served, and puts stand-ins in
// the place of unwritten ones.
func (d *decoder) served(l *layout) {
	for _, path := range slices.Sorted(maps.Keys(d.written)) {
		key := indices.ReplaceAllString(path, "[]")
		for _, part := range []string{"select", "tun"} {
			if rest, ok := strings.CutPrefix(key, "route[]."+part+"."); ok {
				key = part + "." + rest
			}
		}
		key = strings.Replace(key, "route[].", "route.", 1)
		for _, row := range notServed {
			if v := d.written[path]; row.key == key && row.unserved(v.Interface()) {
				d.bad(path, shown(v)+"is not in this version; allowed: "+row.allowed)
			}
		}
	}
	d.groupsServed(l)
}

// groupsServed puts the stand-ins of groups in the place of unwritten keys.
func (d *decoder) groupsServed(l *layout) {
	for _, s := range groupStandIns {
		for i := range l.Groups {
			if _, written := d.written[at("group", i)+"."+s.key]; !written {
				s.act(&l.Groups[i])
				if !slices.Contains(l.File.notServed, s.says) {
					l.File.notServed = append(l.File.notServed, s.says)
				}
			}
		}
	}
}

// shown is a value for a message with a space behind it; lists and tables have
// their key alone.
func shown(v reflect.Value) string {
	switch v.Kind() {
	case reflect.String:
		return fmt.Sprintf("%.60q ", v.Interface())
	case reflect.Bool, reflect.Int:
		return fmt.Sprintf("%v ", v.Interface())
	case reflect.Struct:
		return fmt.Sprintf("{%s} ", v.Interface())
	}
	return ""
}
