package dns

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"cgtun/dialer"
	"cgtun/flow"
)

// Config is the [dns] table.
type Config struct {
	Mode      string                  `toml:"mode"`
	Upstreams []string                `toml:"upstreams"` // URLs; none: the server that was asked
	Outbound  string                  `toml:"outbound"`  // "": as the rules say for the upstream
	Cache     int                     `toml:"cache"`     // entries
	Hosts     map[string][]netip.Addr `toml:"hosts"`     // name to addresses
	Route     []Route                 `toml:"route"`     // first match wins
}

// Route is one [[dns.route]]: names that other servers know.
type Route struct {
	DomainSuffix []string `toml:"domain_suffix"`
	Upstreams    []string `toml:"upstreams"`
	Outbound     string   `toml:"outbound"`
}

// The values of mode.
const (
	ModeForward = "forward" // queries of captured processes are answered by cgtun
	ModeOff     = "off"     // they are ordinary flows
)

// DefaultConfig returns the settings of an empty file.
func DefaultConfig() Config { return Config{Mode: ModeForward, Cache: 10000} }

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table. Whether the outbounds exist is not known here.
func (c *Config) Validate(bad func(key, what string)) {
	if c.Mode != ModeForward && c.Mode != ModeOff {
		bad("mode", fmt.Sprintf(`is %q; allowed: "forward", "off"`, c.Mode))
	}
	if c.Cache < 0 || c.Cache > 10_000_000 {
		bad("cache", fmt.Sprintf("is %d; allowed: 0 to 10000000 entries", c.Cache))
	}
	validateUpstreams("upstreams", c.Upstreams, bad)
	c.validateHosts(bad)
	for i, route := range c.Route {
		key := fmt.Sprintf("route[%d]", i)
		if len(route.DomainSuffix) == 0 {
			bad(key+".domain_suffix", "is missing; allowed: at least one name")
		}
		for j, text := range route.DomainSuffix {
			if _, err := flow.PlainSuffix(text); err != nil {
				bad(fmt.Sprintf("%s.domain_suffix[%d]", key, j), fmt.Sprintf(`%.60q %v; allowed: a name such as "example.org"`, text, err))
			}
		}
		if len(route.Upstreams) == 0 {
			bad(key+".upstreams", "is missing; allowed: at least one server")
		}
		validateUpstreams(key+".upstreams", route.Upstreams, bad)
	}
}

// validateHosts sees to it that each name can be asked for, and has one entry.
func (c *Config) validateHosts(bad func(key, what string)) {
	seen := map[string]string{}
	for _, text := range slices.Sorted(maps.Keys(c.Hosts)) {
		name, err := flow.PlainName(text)
		switch other, twice := seen[name]; {
		case err != nil:
			bad(fmt.Sprintf("hosts.%q", text), fmt.Sprintf(`%v; allowed: one name, exactly, such as "mirror.example"`, err))
		case twice:
			bad(fmt.Sprintf("hosts.%q", text), fmt.Sprintf("is %q again; allowed: each name once", other))
		default:
			seen[name] = text
		}
	}
}

func validateUpstreams(key string, upstreams []string, bad func(key, what string)) {
	for i, upstream := range upstreams {
		if !goodUpstream(upstream) {
			bad(fmt.Sprintf("%s[%d]", key, i), fmt.Sprintf(`%q is not a server; allowed: "udp://ADDRESS[:PORT]", "tcp://ADDRESS[:PORT]", "tls://ADDRESS[:PORT]#NAME", "https://HOST/dns-query"`, dialer.WithoutAccount(upstream)))
		}
	}
}

// goodUpstream tells whether an upstream is one of the four forms. An IPv6
// address stands in brackets, as in every URL.
func goodUpstream(upstream string) bool {
	u, err := url.Parse(upstream)
	if err != nil || u.Host == "" || u.User != nil {
		return false
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
	}
	if u.Scheme == "https" {
		return u.Hostname() != ""
	}
	_, err = netip.ParseAddr(u.Hostname())
	noPath := strings.Trim(u.Path, "/") == "" && u.RawQuery == ""
	switch u.Scheme {
	case "udp", "tcp":
		return err == nil && noPath && u.Fragment == ""
	case "tls":
		return err == nil && noPath
	}
	return false
}
