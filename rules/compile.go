package rules

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"cgtun/flow"
)

// Set is a compiled list of rules: immutable.
type Set struct {
	rules      []compiled
	words      int // of each bitmap
	needsOwner bool

	dst, src *prefixIndex
	port     *portIndex
	proto    *keyIndex[flow.Proto]
	netns    *keyIndex[string]
	name     *nameIndex
}

// Compile compiles valid rules, in the order in which they are tried. It
// reads no files: Listed and ListedNames have what those of CIDRFile and
// DomainFile held, and are not needed after it. The error names each rule that
// has a condition which cannot be compiled: to leave it out would widen the rule.
func Compile(rules []Config) (*Set, error) {
	s := &Set{words: len(newBitmap(len(rules)))}
	var (
		dst, src = make([][]netip.Prefix, len(rules)), make([][]netip.Prefix, len(rules))
		ports    = make([][]PortRange, len(rules))
		protos   = make([][]flow.Proto, len(rules))
		netns    = make([][]string, len(rules))
		names    = make([]*Names, len(rules))
		looks    = make([]*patterns, len(rules))
		bad      []error
	)
	for n := range rules {
		c := &rules[n]
		owner, err := ownerOf(c)
		protos[n], err = protosOf(c.Proto, err)
		names[n], looks[n], err = namesOf(c, err)
		if err != nil {
			bad = append(bad, fmt.Errorf("compile rule %d: %w", n+1, err))
			continue
		}
		s.rules = append(s.rules, compiled{owner, Verdict{Rule: n + 1, Line: c.Line, Use: c.Use}})
		s.needsOwner = s.needsOwner || owner != nil
		if list, condition := c.Destinations(); condition {
			dst[n] = append([]netip.Prefix{}, list...)
		}
		src[n], ports[n], netns[n] = c.Src, c.Port, c.Netns
	}
	if len(bad) > 0 {
		return nil, errors.Join(bad...)
	}
	s.dst, s.src = newPrefixIndex(dst), newPrefixIndex(src)
	s.name = newNameIndex(names, looks)
	s.port, s.proto, s.netns = newPortIndex(ports), newKeyIndex(protos), newKeyIndex(netns)
	return s, nil
}

// Empty returns a Set without rules: everything goes direct.
func Empty() *Set {
	s, _ := Compile(nil)
	return s
}

// protosOf turns names into numbers; it passes on an error from before.
func protosOf(names []string, before error) ([]flow.Proto, error) {
	known := map[string]flow.Proto{"tcp": flow.TCP, "udp": flow.UDP, "icmp": flow.ICMP}
	var list []flow.Proto
	for _, name := range names {
		p, ok := known[name]
		if !ok {
			return nil, errors.Join(before, fmt.Errorf(`proto %q is not known; allowed: "tcp", "udp", "icmp"`, name))
		}
		list = append(list, p)
	}
	return list, before
}

// namesOf returns what a rule wants of the name, nil if nothing; it passes on an
// error from before.
func namesOf(c *Config, before error) (list *Names, looks *patterns, err error) {
	err = before
	if len(c.Domain)+len(c.DomainSuffix)+len(c.DomainFile) > 0 {
		list = &Names{text: bytes.Clone(c.ListedNames.text)}
	}
	add := func(texts []string, plain func(string) (string, error), exact bool) {
		for _, text := range texts {
			name, bad := plain(text)
			if bad != nil {
				err = errors.Join(err, fmt.Errorf("%q %w", text, bad))
				continue
			}
			list.add(name, exact)
		}
	}
	add(c.Domain, flow.PlainName, true)
	add(c.DomainSuffix, flow.PlainSuffix, false)
	if len(c.DomainKeyword)+len(c.DomainRegex) == 0 {
		return list, nil, err
	}
	looks = new(patterns)
	for _, k := range c.DomainKeyword {
		looks.keywords = append(looks.keywords, strings.ToLower(k))
	}
	for _, text := range c.DomainRegex {
		r, bad := regexp.Compile("(?i)" + text)
		if bad != nil {
			err = errors.Join(err, bad)
			continue
		}
		looks.regexes = append(looks.regexes, r)
	}
	return list, looks, err
}
