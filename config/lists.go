package config

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
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
		all = append(all, r.list(file, string(data))...)
	}
	return all
}

func (r *report) list(file, data string) []netip.Prefix {
	var all []netip.Prefix
	line := 0
	for text := range strings.Lines(strings.TrimPrefix(data, "\ufeff")) {
		line++
		text, _, _ = strings.Cut(text, "#")
		word := strings.TrimSpace(text)
		if word == "" {
			continue
		}
		p, err := prefix(word)
		if err != nil {
			r.errs = append(r.errs, Error{file, line, strings.Index(text, word) + 1,
				fmt.Sprintf(`%.60q cannot be read; allowed: a prefix such as "10.0.0.0/8", one a line`, word)})
			continue
		}
		all = append(all, p.Masked())
	}
	return all
}
