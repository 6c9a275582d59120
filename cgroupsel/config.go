package cgroupsel

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"strings"
)

// Config is the [select] table: who is captured. Paths of cgroups count from
// the root of cgroup2, "/a/b", wherever that is mounted.
type Config struct {
	Cgroups    []string       `toml:"cgroups"`    // plain paths, globs or "unit:NAME.service"; children included
	Create     bool           `toml:"create"`     // make missing plain paths, and remove what we made and is empty
	Docker     Docker         `toml:"docker"`     // what of a docker daemon on this machine is selected
	Netns      []string       `toml:"netns"`      // names in /run/netns or absolute paths
	Interfaces []string       `toml:"interfaces"` // packets forwarded in through these are captured
	Bypass     []netip.Prefix `toml:"bypass"`     // left alone, besides the built-in list; masked
}

// Docker says what of a docker daemon is selected.
type Docker string

// The values of docker: the file has the first two as booleans.
const (
	DockerOff    Docker = "false"
	DockerAll    Docker = "true"   // the daemon and all its containers
	DockerBuilds Docker = "builds" // the daemon and the steps of BuildKit
	DockerAuto   Docker = "auto"   // DockerBuilds, or DockerAll for a daemon older than 23
)

// UnmarshalTOML takes a boolean, "auto" or "builds".
func (d *Docker) UnmarshalTOML(v any) error {
	switch v := v.(type) {
	case bool:
		*d = Docker(fmt.Sprint(v))
		return nil
	case string:
		if v == string(DockerAuto) || v == string(DockerBuilds) {
			*d = Docker(v)
			return nil
		}
		return fmt.Errorf(`is %q; allowed: "auto", "builds", true, false`, v)
	}
	return errors.New(`is neither text nor a boolean; allowed: "auto", "builds", true, false`)
}

// DefaultConfig returns the settings of an empty file.
func DefaultConfig() Config {
	return Config{Cgroups: []string{"/cgtun"}, Create: true, Docker: DockerAuto}
}

// unitPrefix marks an entry of Cgroups that names a systemd unit.
const unitPrefix = "unit:"

// IsUnit tells whether an entry of Cgroups names a systemd unit.
func IsUnit(entry string) bool { return strings.HasPrefix(entry, unitPrefix) }

// IsGlob tells whether an entry of Cgroups has wildcards: * stands for
// anything in one component, ** for any number of components.
func IsGlob(entry string) bool { return !IsUnit(entry) && strings.Contains(entry, "*") }

// Plain returns the entries of Cgroups that are plain paths.
func (c *Config) Plain() []string {
	var plain []string
	for _, entry := range c.Cgroups {
		if !IsUnit(entry) && !IsGlob(entry) {
			plain = append(plain, entry)
		}
	}
	return plain
}

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table.
func (c *Config) Validate(bad func(key, what string)) {
	broken := false
	for i, entry := range c.Cgroups {
		if what := badCgroup(entry); what != "" {
			bad(fmt.Sprintf("cgroups[%d]", i), what)
			broken = true
		}
	}
	if !broken {
		if _, err := newPicker(Options{Selections: []Selection{{Cgroups: c.Cgroups}}, Follows: c.Docker != DockerOff}); err != nil {
			bad("cgroups", err.Error())
		}
	}
	for i, name := range c.Netns {
		if name == "" || name == "." || name == ".." || strings.ContainsRune(name, 0) || (name[0] != '/' && strings.Contains(name, "/")) {
			bad(fmt.Sprintf("netns[%d]", i), fmt.Sprintf("%q is not a namespace; allowed: a name in /run/netns or an absolute path", name))
		}
	}
	for i, name := range c.Interfaces {
		if name == "" || len(name) > 15 || strings.ContainsAny(name, "/ \t\n") {
			bad(fmt.Sprintf("interfaces[%d]", i), fmt.Sprintf("%q is not an interface name; allowed: 1 to 15 characters without space and slash", name))
		}
	}
}

// badCgroup says what is wrong with an entry of Cgroups, "" if nothing.
func badCgroup(entry string) string {
	if unit, ok := strings.CutPrefix(entry, unitPrefix); ok {
		suffix := path.Ext(unit)
		if strings.ContainsAny(unit, "/* ") || strings.TrimSuffix(unit, suffix) == "" ||
			(suffix != ".service" && suffix != ".slice" && suffix != ".scope") {
			return fmt.Sprintf(`%q is not a unit; allowed: "unit:NAME.service", ".slice" or ".scope"`, entry)
		}
		return ""
	}
	switch {
	case entry == "/":
		return `"/" is the root, which is the whole machine; allowed: cgroups below it, such as "/cgtun"`
	case !strings.HasPrefix(entry, "/"):
		return fmt.Sprintf(`%q does not start with a slash; allowed: a path from the root of cgroup2 such as "/cgtun", or "unit:NAME.service"`, entry)
	case path.Clean(entry) != entry:
		return fmt.Sprintf("%q is not a plain path; allowed: %q", entry, path.Clean(entry))
	case strings.ContainsRune(entry, 0) || len(entry) > maxPathLen && !IsGlob(entry):
		return fmt.Sprintf("%.40q cannot be selected; allowed: up to %d bytes without NUL", entry, maxPathLen)
	}
	return ""
}
