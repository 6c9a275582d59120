package rules

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"strings"
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
		raw := lines.Bytes()
		if n == 1 {
			raw = bytes.TrimPrefix(raw, []byte("\ufeff")) // editors on other systems leave it there
		}
		raw, _, _ = bytes.Cut(raw, []byte("#"))
		text := string(bytes.TrimSpace(raw))
		if text == "" {
			continue
		}
		p, err := parsePrefix(text)
		if err != nil {
			bad(n, 1+bytes.Index(lines.Bytes(), []byte(text)), err.Error())
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
	const allowed = `allowed: such as "10.0.0.0/8", "2001:db8::/32" or a single address`
	var p netip.Prefix
	var err error
	if strings.Contains(text, "/") {
		p, err = netip.ParsePrefix(text)
	} else {
		var a netip.Addr
		if a, err = netip.ParseAddr(text); err == nil {
			if a.Zone() != "" {
				return p, fmt.Errorf("%q has a zone; %s", text, allowed)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
	}
	if err != nil {
		return p, fmt.Errorf("%q is not a prefix; %s", text, allowed)
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
