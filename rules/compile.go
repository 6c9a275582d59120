package rules

import (
	"errors"
	"fmt"
	"net/netip"

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
}

// Compile compiles valid rules, in the order in which they are tried. It
// reads no files: Listed has what those of CIDRFile held. The error names each
// rule that has a condition which this version does not serve: to leave it
// out would widen the rule.
func Compile(rules []Config) (*Set, error) {
	s := &Set{words: len(newBitmap(len(rules)))}
	var (
		dst, src = make([][]netip.Prefix, len(rules)), make([][]netip.Prefix, len(rules))
		ports    = make([][]PortRange, len(rules))
		protos   = make([][]flow.Proto, len(rules))
		netns    = make([][]string, len(rules))
		bad      []error
	)
	for n := range rules {
		c := &rules[n]
		owner, err := ownerOf(c)
		protos[n], err = protosOf(c.Proto, err)
		if err = errors.Join(err, unserved(c)); err != nil {
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

func unserved(c *Config) error {
	var bad []error
	for _, key := range []struct {
		name   string
		values []string
	}{
		{"domain", c.Domain}, {"domain_suffix", c.DomainSuffix}, {"domain_keyword", c.DomainKeyword},
		{"domain_regex", c.DomainRegex}, {"domain_file", c.DomainFile},
	} {
		if len(key.values) > 0 {
			bad = append(bad, fmt.Errorf("%s is not in this version", key.name))
		}
	}
	return errors.Join(bad...)
}
