package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"cgtun/config"
	"cgtun/control"
)

// options are the values of all flags. A flag means the same with each command
// that has it.
type options struct {
	config string
	socket string
	help   bool
	json   bool
	follow bool
	cgroup string
	direct bool
	proto  string
	since  time.Duration
}

// flags has every flag there is. The first three go with every command.
var flags = []struct {
	name, value, help string
	bind              func(*flag.FlagSet, *options)
}{
	{"c", "FILE", "the configuration; without a command: run the daemon with it", func(fs *flag.FlagSet, o *options) { fs.StringVar(&o.config, "c", "", "") }},
	{"s", "SOCKET", "the daemon's control socket", func(fs *flag.FlagSet, o *options) { fs.StringVar(&o.socket, "s", "", "") }},
	{"h", "", "print this help", func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.help, "h", false, "")
		fs.BoolVar(&o.help, "help", false, "")
	}},
	{"json", "", "print one JSON object", func(fs *flag.FlagSet, o *options) { fs.BoolVar(&o.json, "json", false, "") }},
	{"f", "", "follow: print each change, until interrupted", func(fs *flag.FlagSet, o *options) { fs.BoolVar(&o.follow, "f", false, "") }},
	{"cgroup", "PATH", "the cgroup; default: the first plain one that is selected", func(fs *flag.FlagSet, o *options) { fs.StringVar(&o.cgroup, "cgroup", "", "") }},
	{"direct", "", "outside of all selected cgroups; needs root", func(fs *flag.FlagSet, o *options) { fs.BoolVar(&o.direct, "direct", false, "") }},
	{"proto", "PROTO", "tcp, udp or icmp; default: tcp", func(fs *flag.FlagSet, o *options) { fs.StringVar(&o.proto, "proto", "tcp", "") }},
	{"since", "DUR", `how far back, such as "10m"`, func(fs *flag.FlagSet, o *options) {
		fs.Func("since", "", func(text string) (err error) {
			if o.since, err = time.ParseDuration(text); err != nil || o.since < 0 {
				return errors.New(`allowed: a duration such as "10m"`)
			}
			return nil
		})
	}},
}

var everywhere = []string{"c", "s", "h", "help"}

// command is one line of the table.
type command struct {
	name  string
	usage []string // what follows "cgtun", one for each form
	short string
	long  string   // paragraphs for -h; may be empty
	flags []string // beside those of every command
	most  int      // operands at most
	rest  bool     // takes "-- CMD…"
	run   func(context.Context, *call) error
}

// commands is the table. It is filled in by init, for help reads it.
var commands []*command

func init() {
	commands = []*command{
		{name: "run", usage: []string{"run [-cgroup PATH] [-direct] -- CMD…"}, flags: []string{"cgroup", "direct"}, rest: true, run: runRun,
			short: "run CMD in a selected cgroup",
			long:  runLong},
		{name: "check", usage: []string{"check [-c FILE]"}, run: runCheck,
			short: "validate the configuration; silent when good",
			long:  "Without -c it is " + config.DefaultPath + "."},
		{name: "reload", usage: []string{"reload"}, run: runReload,
			short: "have the daemon read its configuration again",
			long:  reloadLong},
		{name: "status", usage: []string{"status [--json] [PID]"}, flags: []string{"json"}, most: 1, run: runStatus,
			short: "state, attachments, outbounds; with PID: is that process captured",
			long:  "With PID, an id in the daemon's pid namespace, it says whether that process is captured, and why (not)."},
		{name: "flows", usage: []string{"flows [--json] [-f]"}, flags: []string{"json", "f"}, run: runFlows,
			short: "live flows and those closed in the last 60 s",
			long:  "With -f each change of a flow is one line: open, update or close."},
		{name: "explain", usage: []string{"explain [--json] HOST[:PORT] [-cgroup PATH] [-proto PROTO]"}, flags: []string{"json", "cgroup", "proto"}, most: 1, run: runExplain,
			short: "what would become of a flow: captured or not, which rule, outbound, path",
			long:  "It speaks of a process in the cgroup that \"cgtun run\" uses, if -cgroup names no other."},
		{name: "report", usage: []string{"report [--json] [-since DUR] [CGROUP-GLOB]", "report -- CMD…"}, flags: []string{"json", "since"}, most: 1, rest: true, run: runReport,
			short: "per cgroup: hosts, bytes, paths, failures",
			long:  reportLong},
		{name: "doctor", usage: []string{"doctor [--json]"}, flags: []string{"json"}, run: runDoctor,
			short: "what on this machine stops or weakens it, and what mends it",
			long:  doctorLong},
		{name: "cleanup", usage: []string{"cleanup"}, run: runCleanup,
			short: "remove what a dead instance left",
			long:  cleanupLong},
		{name: "init", usage: []string{"init"}, run: runInit,
			short: "write the commented example to " + config.DefaultPath + ", if there is none"},
		{name: "version", usage: []string{"version"}, run: runVersion,
			short: "print the versions of cgtun, of Go and of its network stack"},
	}
}

const daemonUsage = "-c FILE"

// call is one run of the program.
type call struct {
	options
	command *command // nil: the daemon
	args    []string // operands
	rest    []string // what followed "--"
	hasRest bool
	out     *bytes.Buffer // gets the result, printed when it is whole
	stdout  io.Writer     // for what is printed as it comes
	stderr  io.Writer
}

// parse reads a command line. Flags may stand before or after the command and
// its operands, up to "--".
func parse(args []string) (*call, error) {
	c := new(call)
	if i := slices.Index(args, "--"); i >= 0 {
		args, c.rest, c.hasRest = args[:i], args[i+1:], true
	}
	given, err := c.parseFlags(args)
	if err != nil {
		return nil, err
	}
	if len(c.args) > 0 {
		name := c.args[0]
		i := slices.IndexFunc(commands, func(k *command) bool { return k.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no command %q: %w", name, errUsage)
		}
		c.command, c.args = commands[i], c.args[1:]
	}
	if c.help {
		return c, nil
	}
	return c, c.check(given)
}

// parseFlags takes the flags out of args, leaves the others in c.args, and
// returns the names of the flags that were given.
func (c *call) parseFlags(args []string) (given []string, err error) {
	fs := flag.NewFlagSet("cgtun", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	for _, f := range flags {
		f.bind(fs, &c.options)
	}
	for len(args) > 0 {
		if err := fs.Parse(args); err != nil {
			return nil, fmt.Errorf("%w: %w", err, errUsage)
		}
		if args = fs.Args(); len(args) > 0 {
			c.args, args = append(c.args, args[0]), args[1:]
		}
	}
	fs.Visit(func(f *flag.Flag) { given = append(given, f.Name) })
	return given, nil
}

// check refuses what does not go together.
func (c *call) check(given []string) error {
	k := c.command
	for _, name := range given {
		if !slices.Contains(everywhere, name) && (k == nil || !slices.Contains(k.flags, name)) {
			if k == nil {
				return fmt.Errorf("flag -%s goes with a command: %w", name, errUsage)
			}
			return &usageError{k, fmt.Sprintf("flag -%s does not go with %s", name, k.name)}
		}
	}
	switch {
	case k == nil && c.hasRest:
		return fmt.Errorf("there is no command before \"--\": %w", errUsage)
	case k == nil && c.config == "":
		return &usageError{nil, "say what to do"}
	case k == nil:
		return nil
	case c.cgroup != "" && !strings.HasPrefix(c.cgroup, "/"):
		return &usageError{k, fmt.Sprintf(`cgroup %q is no path from the root of cgroup2, such as "/cgtun"`, c.cgroup)}
	case len(c.args) > k.most && k.rest:
		return &usageError{k, fmt.Sprintf(`%q is one argument too many: put "--" before CMD`, c.args[k.most])}
	case len(c.args) > k.most:
		return &usageError{k, fmt.Sprintf("%q is one argument too many", c.args[k.most])}
	case c.hasRest && !k.rest && len(c.rest) > 0:
		return &usageError{k, fmt.Sprintf("%q is one argument too many", c.rest[0])}
	}
	return nil
}

// synopsis prints the usage lines of one command, or of all.
func synopsis(w io.Writer, k *command) {
	lines := []string{daemonUsage}
	if k != nil {
		lines = k.usage
	} else {
		for _, k := range commands {
			lines = append(lines, k.usage...)
		}
	}
	for i, line := range lines {
		lead := "usage: "
		if i > 0 {
			lead = "       "
		}
		fmt.Fprintf(w, "%scgtun %s\n", lead, line)
	}
}

// help prints all there is to say about one command, or about all.
func help(w io.Writer, k *command) {
	synopsis(w, k)
	names := everywhere
	if k == nil {
		fmt.Fprintf(w, "\nWithout a command it runs in the foreground until SIGINT or SIGTERM.\n\n")
		list := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		for _, k := range commands {
			fmt.Fprintf(list, "  %s\t%s\n", k.name, k.short)
		}
		list.Flush()
	} else {
		names = append(slices.Clone(k.flags), everywhere...)
		fmt.Fprintf(w, "\n%s.\n", strings.ToUpper(k.short[:1])+k.short[1:])
		if k.long != "" {
			fmt.Fprintln(w, k.long)
		}
	}
	fmt.Fprintln(w)
	list := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, f := range flags {
		if slices.Contains(names, f.name) {
			fmt.Fprintf(list, "  %s\t%s\n", strings.TrimSpace("-"+f.name+" "+f.value), f.help)
		}
	}
	list.Flush()
	if k == nil {
		fmt.Fprintln(w, "\n\"cgtun COMMAND -h\" tells more about one.")
	}
}

// client returns the way to the daemon: -s, else the socket that the file of
// -c names, else the default one.
func (c *call) client() (control.Client, error) {
	switch {
	case c.socket != "":
		return control.Client{Socket: c.socket}, nil
	case c.config != "":
		file, err := config.Read(c.config)
		if err != nil {
			return control.Client{}, err
		}
		return control.Client{Socket: file.Control.Socket}, nil
	}
	return control.Client{Socket: control.DefaultSocket}, nil
}
