package rules

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/netip"
)

// ReadPrefixes reads a cidr_file: one prefix or address a line, blank lines,
// and comments from # to the end of the line. It calls bad for each line that
// is none of these, with its place from 1 and what is wrong, and goes on. The
// prefixes are masked. The error is that of r, or a line of more than 64 KiB.
func ReadPrefixes(r io.Reader, bad func(line, col int, what string)) ([]netip.Prefix, error) {
	var list []netip.Prefix
	lines := bufio.NewScanner(r)
	n := 0
	for lines.Scan() {
		n++
		line := lines.Bytes()
		if n == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff")) // editors on other systems leave it there
		}
		raw, _, _ := bytes.Cut(line, []byte("#"))
		text := string(bytes.TrimSpace(raw))
		if text == "" {
			continue
		}
		p, err := parsePrefix(text)
		if err != nil {
			bad(n, 1+bytes.Index(line, []byte(text)), err.Error())
			continue
		}
		list = append(list, p)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read line %d: %w", n+1, err)
	}
	return list, nil
}

// parsePrefix reads a prefix, or an address as the prefix of it alone. What
// is mapped into v6 means the v4 in it: that is what flows have.
func parsePrefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if a, errAddr := netip.ParseAddr(text); errAddr == nil && a.Zone() == "" {
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil {
		return p, fmt.Errorf(`%.60q cannot be read; allowed: a prefix such as "10.0.0.0/8", one a line`, text)
	}
	return plain(p), nil
}

// plain masks a prefix, and takes v4 out of ::ffff:0:0/96.
func plain(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked()
}
