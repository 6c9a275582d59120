// Package config reads the file that says what cgtun does: it decodes the
// file, fills in the defaults, checks ranges and references, and reports all
// mistakes at once, each with its place.
//
// It owns what concerns the file as a whole: positions, cross references, the
// list of what this version serves, and the tables that no other package
// serves ([limits], [log]). Every other table is decoded into the
// Config struct of the package that serves it, which has the keys, defaults
// and ranges. Only cmd/cgtun calls it.
//
// The language is TOML 1.0 (https://toml.io/en/v1.0.0).
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/BurntSushi/toml"

	"cgtun"
	"cgtun/cgroupsel"
	"cgtun/control"
	"cgtun/dialer"
	"cgtun/dns"
	"cgtun/group"
	"cgtun/policy"
	"cgtun/rules"
	"cgtun/steer"
	"cgtun/tun"
)

// DefaultPath is the file that commands without -c read.
const DefaultPath = "/etc/cgtun/config.toml"

// maxFile is the largest file in bytes. Long lists of prefixes have files of
// their own.
const maxFile = 1 << 20

// Example is the commented file that "cgtun init" writes.
var Example = cgtun.Example

// File is a file without mistakes. Values that are not written have their
// defaults, or what acts in their place in this version (see NotServed).
type File struct {
	Name      string          `toml:"-"` // as it was given to Load or Parse
	DNS       dns.Config      `toml:"dns"`
	Outbounds []dialer.Config `toml:"outbound"`
	Groups    []group.Config  `toml:"group"`
	Rules     []rules.Config  `toml:"rule"`
	Policy    policy.Config   `toml:"policy"`
	Control   control.Config  `toml:"control"`
	Limits    Limits          `toml:"limits"`
	Log       Log             `toml:"log"`

	routes    []Route
	notServed []string
}

// Route is one way for selected packets: [route] with [select] and [tun], or
// one [[route]].
type Route struct {
	steer.Config
	Select cgroupsel.Config `toml:"select"`
	Tun    tun.Config       `toml:"tun"`
}

// Limits is the [limits] table.
type Limits struct {
	Memory Size `toml:"memory"` // above the start; new flows are refused before it is passed
}

// Log is the [log] table.
type Log struct {
	Level  string `toml:"level"`
	Format string `toml:"format"` // FormatText or FormatJSON
}

// The values of log.format.
const (
	FormatText = "text"
	FormatJSON = "json"
)

// SlogLevel returns the level for log/slog.
func (l Log) SlogLevel() slog.Level {
	switch l.Level {
	case "debug":
		return slog.LevelDebug
	case "warn":
		return slog.LevelWarn
	case "error":
		return slog.LevelError
	}
	return slog.LevelInfo
}

// layout is the file as it is written.
type layout struct {
	Select cgroupsel.Config `toml:"select"`
	Route  []Route          `toml:"route"`
	Tun    tun.Config       `toml:"tun"`
	File
}

// Routes returns the routes, at least one. The first one's table number is the
// instance.
func (f *File) Routes() []Route { return f.routes }

// NotServed returns a sentence for each default that this version does not
// serve and that the file leaves unwritten, to be said once at start.
func (f *File) NotServed() []string { return f.notServed }

// Default returns what an empty file says.
func Default() *File {
	// An empty file has no mistakes: a test sees to it.
	f, _, _ := parse("default", nil)
	return f
}

// Load reads a file, the lists that its rules name and the passwords and
// certificates of its outbounds, relative paths from the folder of the file. A nil env leaves the
// passwords out that stand in the environment. The error is of type Errors.
func Load(path string, env Env) (*File, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	f, rep, err := parse(path, data)
	if err != nil {
		return nil, err
	}
	folder := filepath.Dir(path)
	for i := range f.Rules {
		rep.lists(at("rule", i), folder, &f.Rules[i])
	}
	rep.secrets(folder, f.Outbounds, env)
	rep.authorities(folder, f.Outbounds)
	return f.unless(rep)
}

// Read is Load without any other file and without passwords, for who wants to
// know the tables alone, and may be nobody who can read those.
func Read(path string) (*File, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

func read(path string) ([]byte, error) {
	data, err := readFile(path, maxFile)
	if err != nil {
		return nil, Errors{{File: path, Msg: fmt.Sprintf("%v; allowed: a readable TOML file (cgtun init writes an example)", err)}}
	}
	return data, nil
}

// Parse is Read on what was read already; name stands in its errors. It reads
// no other file: rules.Config.Listed stays empty, and so does the Password that
// stands elsewhere.
func Parse(name string, data []byte) (*File, error) {
	f, rep, err := parse(name, data)
	if err != nil {
		return nil, err
	}
	return f.unless(rep)
}

// unless returns the file if nothing was reported.
func (f *File) unless(rep *report) (*File, error) {
	if len(rep.errs) == 0 {
		return f, nil
	}
	rep.errs.sort(f.Name)
	return nil, rep.errs
}

// parse returns an error if the file is no TOML; all else is in the report.
func parse(name string, data []byte) (*File, *report, error) {
	raw := map[string]any{}
	if _, err := toml.Decode(string(data), &raw); err != nil {
		return nil, nil, Errors{syntaxError(name, string(data), err)}
	}
	d := &decoder{
		report: report{
			file: name, places: scan(string(data)),
			broken: map[string]bool{}, around: map[string]bool{}, meant: map[string]bool{}, single: map[string]bool{},
		},
		defaults: map[reflect.Type]reflect.Value{
			reflect.TypeFor[Route]():         reflect.ValueOf(defaultRoute()),
			reflect.TypeFor[dialer.Config](): reflect.ValueOf(dialer.DefaultConfig()),
			reflect.TypeFor[group.Config]():  reflect.ValueOf(group.DefaultConfig()),
		},
		written: map[string]reflect.Value{},
	}
	l := defaultLayout()
	l.Name = name
	d.table("", raw, reflect.ValueOf(&l).Elem())
	d.oneRoute = d.single["route"] || raw["route"] == nil
	d.routes(&l)
	d.check(&l)
	d.served(&l)
	for i := range l.Rules {
		l.Rules[i].Line, _ = d.places.keyAt(d.asWritten(at("rule", i)))
	}
	return &l.File, &d.report, nil
}

// syntaxError turns an error of the toml package into ours. Of its place the
// offset alone is right: the column is not where a line begins.
func syntaxError(name, data string, err error) Error {
	var syntax toml.ParseError
	if !errors.As(err, &syntax) {
		return Error{File: name, Msg: err.Error()}
	}
	what := strings.TrimSuffix(syntax.Message, ".")
	allowed := "TOML 1.0 (https://toml.io)"
	switch {
	case strings.HasSuffix(syntax.LastKey, "password"):
		// What cannot be read can be the password, without its quotes.
		what, allowed = syntax.LastKey+" cannot be read", "text in quotes"
	case strings.HasPrefix(what, "expected value"):
		allowed = "text in quotes, a number, true, false, a [list] or a {table}"
	case strings.HasSuffix(what, "has already been defined"):
		allowed = "each key and table once"
	case strings.HasSuffix(what, "cannot be used as an array"):
		allowed = "either one [table] or several [[table]]"
	}
	line, col := linesOf(data).at(max(syntax.Position.Start, 0))
	return Error{name, line, col, what + "; allowed: " + allowed}
}

func defaultRoute() Route {
	return Route{Config: steer.DefaultConfig(), Select: cgroupsel.DefaultConfig(), Tun: tun.DefaultConfig()}
}

func defaultLayout() layout {
	return layout{
		Select: cgroupsel.DefaultConfig(),
		Tun:    tun.DefaultConfig(),
		File: File{
			DNS:     dns.DefaultConfig(),
			Control: control.DefaultConfig(),
			Limits:  Limits{Memory: 256 << 20},
			Log:     Log{Level: "info", Format: FormatText},
		},
	}
}

// readFile reads a file, a pipe too, that is not larger than most.
func readFile(path string, most int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", cause(err))
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, most+1))
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", cause(err))
	}
	if int64(len(data)) > most {
		return nil, fmt.Errorf("is larger than %s", Size(most))
	}
	return data, nil
}

// cause takes the name of the file off an error: it is told beside it.
func cause(err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return at.Err
	}
	return err
}
