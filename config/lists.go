package config

import (
	"bytes"
	"fmt"
	"net/netip"
	"path/filepath"

	"cgtun/rules"
)

// maxList is the largest list file in bytes: a million prefixes or so.
const maxList = 32 << 20

// lists reads the files of one rule's cidr_file: a prefix or an address a
// line; empty lines and what follows a # are nothing.
func (r *report) lists(rule, folder string, files []string) []netip.Prefix {
	var all []netip.Prefix
	for i, file := range files {
		if file == "" {
			continue
		}
		if !filepath.IsAbs(file) {
			file = filepath.Join(folder, file)
		}
		data, err := readFile(file, maxList)
		if err != nil {
			r.bad(at(rule+".cidr_file", i), fmt.Sprintf("%q %v; allowed: a readable file with a prefix a line", file, err))
			continue
		}
		all = append(all, r.list(file, data)...)
	}
	return all
}

// list reads the text of one file; its mistakes have places of their own.
func (r *report) list(file string, data []byte) []netip.Prefix {
	bad := func(line, col int, what string) { r.errs = append(r.errs, Error{file, line, col, what}) }
	all, err := rules.ReadPrefixes(bytes.NewReader(data), bad)
	if err != nil {
		bad(1, 1, fmt.Sprintf("%v; allowed: a prefix a line", err))
	}
	return all
}
