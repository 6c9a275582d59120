package config

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"

	"cgtun/rules"
)

// maxList is the largest list file in bytes: some millions of lines.
const maxList = 128 << 20

// lists reads the files of one rule: prefixes and names.
func (r *report) lists(rule, folder string, c *rules.Config) {
	r.each(rule+".cidr_file", folder, c.CIDRFile, "prefix", func(text io.Reader, bad func(line, col int, what string)) error {
		list, err := rules.ReadPrefixes(text, bad)
		c.Listed = append(c.Listed, list...)
		return err
	})
	r.each(rule+".domain_file", folder, c.DomainFile, "name", c.ListedNames.ReadNames)
}

// mostBadLines is how many bad lines of one file are told of: it may be another
// kind of file.
const mostBadLines = 20

// each reads the files of a key; relative paths are from folder. Their mistakes
// have places of their own.
func (r *report) each(key, folder string, files []string, what string, read func(io.Reader, func(line, col int, what string)) error) {
	for i, file := range files {
		if file == "" {
			continue
		}
		if !filepath.IsAbs(file) {
			file = filepath.Join(folder, file)
		}
		data, err := readFile(file, maxList)
		if err != nil {
			r.bad(at(key, i), fmt.Sprintf("%q %v; allowed: a readable file with a %s a line", file, err, what))
			continue
		}
		told := 0
		bad := func(line, col int, what string) {
			if told++; told <= mostBadLines {
				r.errs = append(r.errs, Error{file, line, col, what})
			}
		}
		if err := read(bytes.NewReader(data), bad); err != nil {
			bad(1, 1, fmt.Sprintf("%v; allowed: a %s a line", err, what))
		}
	}
}
