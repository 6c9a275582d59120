package config

import (
	"encoding"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"
)

// decoder puts what the toml package has read into structs, by their toml
// tags. It does what toml.Decode does not: it goes on after a wrong type,
// takes a single value for a list, and finds unknown keys by place.
type decoder struct {
	report
	defaults map[reflect.Type]reflect.Value // what an element of a list starts with
	written  map[string]reflect.Value       // path to value, of all that was decoded
	oneRoute bool                           // [select], [route] and [tun] rather than [[route]]
}

// unmarshaler is toml.Unmarshaler: a type that takes several TOML types.
type unmarshaler interface{ UnmarshalTOML(any) error }

// decode puts raw into the settable value dst.
func (d *decoder) decode(path string, raw any, dst reflect.Value) {
	if d.scalar(path, raw, dst) {
		return
	}
	switch dst.Kind() {
	case reflect.Struct:
		table, ok := raw.(map[string]any)
		if !ok {
			d.wrongType(path, raw, "a table")
			return
		}
		d.table(path, table, dst)
	case reflect.Slice:
		d.list(path, raw, dst)
		return
	case reflect.Map:
		table, ok := raw.(map[string]any)
		if !ok {
			d.wrongType(path, raw, "a table")
			return
		}
		into := reflect.MakeMap(dst.Type())
		for _, key := range slices.Sorted(maps.Keys(table)) {
			element := reflect.New(dst.Type().Elem()).Elem()
			d.decode(join(path, key), table[key], element)
			into.SetMapIndex(reflect.ValueOf(key), element)
		}
		dst.Set(into)
	default:
		d.bad(path, fmt.Sprintf("cannot be put into a %s", dst.Type()))
		return
	}
	d.written[path] = dst
}

// table decodes the keys of a table, the unknown ones too.
func (d *decoder) table(path string, table map[string]any, dst reflect.Value) {
	known := fields(dst)
	for _, key := range slices.Sorted(maps.Keys(table)) {
		if field, ok := known[key]; ok {
			d.decode(join(path, key), table[key], field)
			continue
		}
		d.unknown(path, key, slices.Sorted(maps.Keys(known)))
	}
}

// unknown reports a key. What it was probably meant for is not reported as
// missing then.
func (d *decoder) unknown(path, key string, known []string) {
	where := "at the top"
	if path != "" {
		where = "in [" + display(path) + "]"
	}
	what := fmt.Sprintf("unknown key %.60q %s; ", key, where)
	meant, homes := nearest(key, known), homesOf(key)
	if len(homes) == 1 && (meant == "" || path == "") {
		d.badKey(join(path, key), what+"it stands in "+homes[0])
		return
	}
	if meant != "" {
		d.meant[join(path, meant)] = true
		d.badKey(join(path, key), what+fmt.Sprintf("the nearest known one is %q", meant))
		return
	}
	d.badKey(join(path, key), what+"allowed: "+strings.Join(known, ", "))
}

// homesOf lists the tables that have a key.
func homesOf(key string) (homes []string) {
	var visit func(t reflect.Type, path string)
	visit = func(t reflect.Type, path string) {
		if t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return
		}
		for name, field := range fields(reflect.New(t).Elem()) {
			if name == key && path != "" {
				homes = append(homes, "["+path+"]")
			}
			if t != reflect.TypeFor[Route]() {
				visit(field.Type(), join(path, name))
			}
		}
	}
	visit(reflect.TypeFor[layout](), "")
	return homes
}

// list decodes a list, or a single value that stands for a list of one.
func (d *decoder) list(path string, raw any, dst reflect.Value) {
	var elements []any
	switch raw := raw.(type) {
	case []any:
		elements = raw
	case []map[string]any:
		for _, table := range raw {
			elements = append(elements, table)
		}
	default:
		elements = []any{raw}
		d.single[path] = true
	}
	into := reflect.MakeSlice(dst.Type(), len(elements), len(elements))
	for i, element := range elements {
		if start, ok := d.defaults[dst.Type().Elem()]; ok {
			into.Index(i).Set(start)
		}
		d.decode(at(path, i), element, into.Index(i))
	}
	dst.Set(into)
	d.written[path] = dst
}

// scalar decodes what is not a table, a list or a map, and tells whether dst
// was such a thing.
func (d *decoder) scalar(path string, raw any, dst reflect.Value) bool {
	var err error
	var allowed string
	text, isText := raw.(string)
	switch into := dst.Addr().Interface().(type) {
	case unmarshaler:
		err = into.UnmarshalTOML(raw)
	case *netip.Prefix:
		*into, err = prefix(text)
		allowed = `a prefix such as "10.0.0.0/8" or "fd00::/8"`
	case *netip.Addr:
		*into, err = netip.ParseAddr(text)
		allowed = `an address such as "192.0.2.1" or "2001:db8::1"`
	case *netip.AddrPort:
		*into, err = netip.ParseAddrPort(text)
		allowed = `an address with a port such as "127.0.0.1:12345"`
	case *time.Duration:
		*into, err = time.ParseDuration(text)
		allowed = `a duration such as "250ms" or "1m30s"`
	case encoding.TextUnmarshaler:
		if table, ok := raw.(map[string]any); ok && dst.Kind() == reflect.Struct && len(fields(dst)) > 0 {
			// The word that it may hold from before goes.
			dst.SetZero()
			d.table(path, table, dst)
			d.written[path] = dst
			return true
		}
		if !isText {
			// Without the value: it can be a password.
			allowed = "text in quotes"
			if dst.Kind() == reflect.Struct && len(fields(dst)) > 0 {
				allowed += ", or a table"
			}
			d.bad(path, "is not text; allowed: "+allowed)
			return true
		}
		err = into.UnmarshalText([]byte(text))
	default:
		return d.plain(path, raw, dst)
	}
	switch {
	case err == nil:
		d.written[path] = dst
	case allowed == "":
		d.bad(path, err.Error())
	case isText:
		d.bad(path, fmt.Sprintf("%.60q cannot be read; allowed: %s", text, allowed))
	default:
		d.wrongType(path, raw, allowed)
	}
	return true
}

// plain decodes text, truth and integers.
func (d *decoder) plain(path string, raw any, dst reflect.Value) bool {
	switch dst.Kind() {
	case reflect.String:
		text, ok := raw.(string)
		if !ok {
			d.wrongType(path, raw, "text in quotes")
			return true
		}
		dst.SetString(text)
	case reflect.Bool:
		truth, ok := raw.(bool)
		if !ok {
			d.wrongType(path, raw, "true, false")
			return true
		}
		dst.SetBool(truth)
	case reflect.Int, reflect.Uint32:
		low, high := int64(math.MinInt), int64(math.MaxInt)
		allowed := "an integer without quotes"
		if dst.Kind() == reflect.Uint32 {
			low, high = 0, math.MaxUint32
			allowed = "an integer from 0 to 4294967295, also hexadecimal, without quotes"
		}
		n, ok := raw.(int64)
		if !ok || n < low || n > high {
			d.wrongType(path, raw, allowed)
			return true
		}
		if dst.CanUint() {
			dst.SetUint(uint64(n))
		} else {
			dst.SetInt(n)
		}
	default:
		return false
	}
	d.written[path] = dst
	return true
}

// prefix reads a prefix, or an address as the prefix of its whole length. An
// IPv4 prefix in the IPv6 form that maps it becomes the IPv4 one.
func prefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if address, errAddr := netip.ParseAddr(text); errAddr == nil && address.Zone() == "" {
		p, err = netip.PrefixFrom(address, address.BitLen()), nil
	}
	if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p, err
}

// wrongType reports a value of another type than the key has.
func (d *decoder) wrongType(path string, raw any, allowed string) {
	var is string
	switch raw := raw.(type) {
	case string:
		is = "the text " + fmt.Sprintf("%.60q", raw)
	case bool:
		is = fmt.Sprintf("the boolean %t", raw)
	case int64:
		is = fmt.Sprintf("the integer %d", raw)
	case float64:
		is = fmt.Sprintf("the float %v", raw)
	case time.Time:
		is = "a date"
	case []any, []map[string]any:
		is = "a list"
	case map[string]any:
		is = "a table"
	}
	d.bad(path, "is "+is+"; allowed: "+allowed)
}

// fields returns the settable fields of a struct by their keys, those of
// embedded structs among them.
func fields(v reflect.Value) map[string]reflect.Value {
	known := map[string]reflect.Value{}
	for i := range v.NumField() {
		field := v.Type().Field(i)
		key := field.Tag.Get("toml")
		switch {
		case field.Anonymous && key == "":
			maps.Copy(known, fields(v.Field(i)))
		case key != "" && key != "-":
			known[key] = v.Field(i)
		}
	}
	return known
}
