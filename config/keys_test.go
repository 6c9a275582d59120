package config_test

import (
	"reflect"
	"strings"

	"cgtun/config"
	"cgtun/group"
)

// key is a key of the file, found in the structs by reflection.
type key struct {
	path   string       // "rule.cidr", "route.via.dev"
	name   string       // the last part
	field  reflect.Type // the type of its value
	value  any          // its default
	tables map[string]bool
}

// keys lists the keys of all tables, those of [[route]]'s own [route.select]
// and [route.tun] once, as [select] and [tun].
func keys() []key {
	tables := map[string]bool{} // "[rule]" stands for several
	var all []key
	var visit func(v reflect.Value, path string)
	visit = func(v reflect.Value, path string) {
		for i := range v.NumField() {
			field := v.Type().Field(i)
			tag := field.Tag.Get("toml")
			if field.Anonymous && tag == "" {
				visit(v.Field(i), path)
				continue
			}
			if tag == "" || tag == "-" || path == "route" && (tag == "select" || tag == "tun") {
				continue
			}
			here := strings.TrimPrefix(path+"."+tag, ".")
			element := field.Type
			if element.Kind() == reflect.Slice && element.Elem().Kind() == reflect.Struct && hasKeys(element.Elem()) {
				tables[here] = true
				visit(defaultOf(element.Elem()), here)
				continue
			}
			if path != "" {
				all = append(all, key{here, tag, field.Type, v.Field(i).Interface(), tables})
			}
			if element.Kind() == reflect.Struct && hasKeys(element) {
				if path != "" && tag != "via" {
					all = all[:len(all)-1]
				}
				visit(v.Field(i), here)
			}
		}
	}
	layout := config.DefaultLayout()
	visit(reflect.ValueOf(layout), "")
	return all
}

// hasKeys tells whether a type is a table.
func hasKeys(t reflect.Type) bool {
	for i := range t.NumField() {
		if t.Field(i).Tag.Get("toml") != "" || t.Field(i).Anonymous {
			return true
		}
	}
	return false
}

// table is the path of the table that holds the key.
func (k key) table() string { return strings.TrimSuffix(k.path, "."+k.name) }

// header opens the table of a key; line is the one behind it.
func (k key) header() (text string, line int) {
	parts := strings.Split(k.table(), ".")
	for i := range parts {
		path := strings.Join(parts[:i+1], ".")
		line++
		if k.tables[path] && path != "route" {
			text += "[[" + path + "]]\n"
		} else {
			text += "[" + path + "]\n"
		}
	}
	return text, line + 1
}

// defaultOf is an element of a list of tables as an empty table makes it.
func defaultOf(t reflect.Type) reflect.Value {
	switch t {
	case reflect.TypeFor[config.Route]():
		return reflect.ValueOf(config.Default().Routes()[0])
	case reflect.TypeFor[group.Config]():
		return reflect.ValueOf(group.DefaultConfig())
	}
	return reflect.New(t).Elem()
}
