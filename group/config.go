// Package group makes several outbounds look like one. A Group is itself a
// dialer.Outbound: it asks its members in the order that its type and their
// scores give, the next one before the first has failed, and hides the failures
// of paths as long as one of them works.
//
// It owns what is known of the paths (Scores), from the flows that take them
// and from probes where there are none. It opens no socket itself and knows no
// kind of outbound. router asks a Group as it asks any outbound; cmd makes them
// and calls Scores.Run. The algorithm is that of RFC 8305 (Happy Eyeballs), with
// paths in the place of addresses.
package group

import (
	"fmt"
	"net/url"
	"time"

	"cgtun/dialer"
)

// Config is one [[group]].
type Config struct {
	Name      string        `toml:"name"`
	Type      string        `toml:"type"`
	Outbounds []string      `toml:"outbounds"` // outbounds or groups
	Stagger   time.Duration `toml:"stagger"`   // upper end of the wait before the next member
	Attempt   time.Duration `toml:"attempt"`   // one connect with its proxy handshakes
	Deadline  time.Duration `toml:"deadline"`  // for the flow
	Replay    bool          `toml:"replay"`    // before the first server byte
	Resume    bool          `toml:"resume"`    // of plain-HTTP bodies
	By        string        `toml:"by"`        // for TypeBalance
	Probe     Probe         `toml:"probe"`
}

// Probe is [group.probe]: what is tried where there is no traffic.
type Probe struct {
	URL      string        `toml:"url"`      // "": plain connects to lately good destinations
	Interval time.Duration `toml:"interval"` // 0: never
}

// The values of type and by.
const (
	TypeRace      = "race"     // best score first, next after the stagger
	TypeFallback  = "fallback" // in order
	TypeBalance   = "balance"
	ByDestination = "destination"
	ByLoad        = "load"
)

// DefaultConfig returns a group as an empty table makes it: name and outbounds
// must be written.
func DefaultConfig() Config {
	return Config{
		Type: TypeRace, Stagger: 250 * time.Millisecond, Attempt: 5 * time.Second, Deadline: 30 * time.Second,
		Replay: true, Resume: true, By: ByDestination,
	}
}

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table. Whether the outbounds exist is not known here.
func (c *Config) Validate(bad func(key, what string)) {
	if c.Name == "" {
		bad("name", "is missing; allowed: any text that no other outbound or group has")
	}
	if c.Type != TypeRace && c.Type != TypeFallback && c.Type != TypeBalance {
		bad("type", fmt.Sprintf(`is %q; allowed: "race", "fallback", "balance"`, c.Type))
	}
	if c.By != ByDestination && c.By != ByLoad {
		bad("by", fmt.Sprintf(`is %q; allowed: "destination", "load"`, c.By))
	}
	if len(c.Outbounds) == 0 {
		bad("outbounds", "is missing; allowed: at least one outbound or group")
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{{"stagger", c.Stagger}, {"attempt", c.Attempt}, {"deadline", c.Deadline}} {
		if d.value <= 0 {
			bad(d.key, fmt.Sprintf(`is %s; allowed: more than 0, such as "5s"`, d.value))
		}
	}
	if c.Attempt > c.Deadline && c.Deadline > 0 {
		bad("attempt", fmt.Sprintf("is %s; allowed: at most the deadline of %s", c.Attempt, c.Deadline))
	}
	if c.Probe.Interval < 0 {
		bad("probe.interval", fmt.Sprintf(`is %s; allowed: "0s" (never) or more`, c.Probe.Interval))
	}
	if c.Probe.URL == "" {
		return
	}
	if u, err := url.Parse(c.Probe.URL); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		bad("probe.url", fmt.Sprintf(`%q is not a URL to fetch; allowed: "http://HOST/PATH", "https://HOST/PATH" or ""`, dialer.WithoutAccount(c.Probe.URL)))
	}
}
