package rules

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"strconv"
	"strings"

	"cgtun/flow"
)

// Config is one [[rule]]. Its keys are and-ed, the values of one key or-ed; a
// key without values is no condition. A rule without conditions matches all.
type Config struct {
	Domain        []string       `toml:"domain"`         // names, exactly
	DomainSuffix  []string       `toml:"domain_suffix"`  // a name and everything below it
	DomainKeyword []string       `toml:"domain_keyword"` // text anywhere in the name
	DomainRegex   []string       `toml:"domain_regex"`   // RE2 anywhere in the name, in any case
	DomainFile    []string       `toml:"domain_file"`    // files with a suffix a line, or hosts files
	CIDR          []netip.Prefix `toml:"cidr"`           // destination; masked
	CIDRFile      []string       `toml:"cidr_file"`      // files with a prefix a line; destination
	Src           []netip.Prefix `toml:"src"`            // source; masked
	Port          []PortRange    `toml:"port"`           // destination port
	Proto         []string       `toml:"proto"`          // "tcp", "udp", "icmp"
	Cgroup        []string       `toml:"cgroup"`         // paths or globs, of the flow's process
	Process       []string       `toml:"process"`        // base name, or absolute path of the executable
	User          []string       `toml:"user"`           // name or number
	Netns         []string       `toml:"netns"`          // attachment id
	Use           string         `toml:"use"`            // an outbound, a group, or one of the reserved names

	// Line is where the rule begins in its file, from 1; 0: not from a file.
	Line int `toml:"-"`
	// Listed are the prefixes that the files of CIDRFile held, ListedNames the
	// names of those of DomainFile.
	Listed      []netip.Prefix `toml:"-"`
	ListedNames Names          `toml:"-"`
}

// The reserved names of use, which neither an outbound nor a group can have.
const (
	UseDirect = "direct" // the main table
	UseReject = "reject" // RST, or ICMP administratively prohibited
	UseDrop   = "drop"   // silence
)

// Reserved tells whether name is one of the reserved names of use.
func Reserved(name string) bool {
	return name == UseDirect || name == UseReject || name == UseDrop
}

// Destinations returns the destination prefixes of the rule, and whether it
// has such a condition at all: an empty cidr_file is one that nothing meets.
func (c *Config) Destinations() (list []netip.Prefix, condition bool) {
	list = append(c.CIDR[:len(c.CIDR):len(c.CIDR)], c.Listed...)
	return list, len(c.CIDR) > 0 || len(c.CIDRFile) > 0
}

// PortRange is the ports From to To, both included. In a file it is an
// integer, "443" or "8000-8100".
type PortRange struct{ From, To uint16 }

// UnmarshalTOML takes an integer or text.
func (p *PortRange) UnmarshalTOML(v any) error {
	const allowed = `allowed: 1 to 65535, as a number, as "443" or as "8000-8100"`
	text := fmt.Sprint(v)
	switch v.(type) {
	case int64, string:
	default:
		return fmt.Errorf("is neither a number nor text; %s", allowed)
	}
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	low, err := strconv.ParseUint(from, 10, 16)
	high, err2 := strconv.ParseUint(to, 10, 16)
	switch {
	case err != nil || err2 != nil || low == 0:
		return fmt.Errorf("%q is not a port; %s", text, allowed)
	case high < low:
		return fmt.Errorf(`%q is the wrong way round; allowed: "%d-%d"`, text, high, low)
	}
	*p = PortRange{uint16(low), uint16(high)}
	return nil
}

// String returns "443" or "8000-8100".
func (p PortRange) String() string {
	if p.From == p.To {
		return strconv.Itoa(int(p.From))
	}
	return fmt.Sprintf("%d-%d", p.From, p.To)
}

// MarshalText is String: a file can be written as it was read.
func (p PortRange) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table. Whether Use exists is not known here.
func (c *Config) Validate(bad func(key, what string)) {
	if c.Use == "" {
		bad("use", `is missing; allowed: an outbound, a group, "direct", "reject", "drop"`)
	}
	for i, proto := range c.Proto {
		if proto != "tcp" && proto != "udp" && proto != "icmp" {
			bad(index("proto", i), fmt.Sprintf(`is %q; allowed: "tcp", "udp", "icmp"`, proto))
		}
	}
	for i, cgroup := range c.Cgroup {
		if !strings.HasPrefix(cgroup, "/") || path.Clean(cgroup) != cgroup {
			bad(index("cgroup", i), fmt.Sprintf(`%q is not a cgroup; allowed: a path from the root of cgroup2 such as "/docker/**"`, cgroup))
		}
	}
	for i, expression := range c.DomainRegex {
		if _, err := regexp.Compile(expression); err != nil {
			bad(index("domain_regex", i), fmt.Sprintf("%q is no expression: %s; allowed: the syntax of RE2", expression, strings.TrimPrefix(err.Error(), "error parsing regexp: ")))
		}
	}
	for i, text := range c.Domain {
		if _, err := flow.PlainName(text); err != nil && text != "" {
			bad(index("domain", i), fmt.Sprintf(`%.60q %v; allowed: one name, exactly, such as "example.org" (domain_suffix has all below it too)`, text, err))
		}
	}
	for i, text := range c.DomainSuffix {
		if _, err := flow.PlainSuffix(text); err != nil && text != "" {
			bad(index("domain_suffix", i), fmt.Sprintf(`%.60q %v; allowed: a name such as "example.org"`, text, err))
		}
	}
	for i, process := range c.Process {
		if !isProcess(process) {
			bad(index("process", i), fmt.Sprintf(`%q is neither; allowed: a name such as "apt" or an absolute path`, process))
		}
	}
	for key, list := range map[string][]string{
		"domain": c.Domain, "domain_suffix": c.DomainSuffix, "domain_keyword": c.DomainKeyword, "domain_file": c.DomainFile,
		"cidr_file": c.CIDRFile, "process": c.Process, "user": c.User, "netns": c.Netns,
	} {
		for i, text := range list {
			if text == "" {
				bad(index(key, i), "is empty; allowed: any text, or leave the key out")
			}
		}
	}
}

func index(key string, i int) string { return fmt.Sprintf("%s[%d]", key, i) }
