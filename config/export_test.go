package config

import "github.com/BurntSushi/toml"

// Layout is the file as it is written, for the test of docs/config.md.
type Layout = layout

// DefaultLayout has the defaults of every table.
var DefaultLayout = defaultLayout

// Scan returns the keys that scan finds, and the places of a path's key and
// value.
func Scan(data string) (keys []toml.Key, place func(path string) [4]int) {
	p := scan(data)
	return p.keys, func(path string) [4]int {
		a, b := p.keyAt(path)
		c, d := p.valueAt(path)
		return [4]int{a, b, c, d}
	}
}

// NotYet returns the keys of the list of what this version does not serve.
func NotYet() []string {
	var keys []string
	for _, row := range notServed {
		keys = append(keys, row.key)
	}
	return keys
}

// Nearest is nearest.
var Nearest = nearest
