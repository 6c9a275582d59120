// Command cgtun puts the packets of selected processes on paths that a
// configuration names, through a tun device and a network stack of its own.
//
// It owns the process: flags, signals, the wiring of the packages, what is
// printed and the exit code. "cgtun -c FILE" is the daemon; the other commands
// ask a daemon over its control socket, or look at the machine. docs/cli.md is
// the reference; the table of commands in cli.go is what it is checked
// against.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"cgtun/config"
	"cgtun/control"
)

// The exit codes, beside those that a command of the user's sets.
const (
	exitFailed = 1 // at run time
	exitUsage  = 2 // bad usage, or a bad file
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run does what the arguments say and returns the exit code. Results go to
// stdout when they are whole, errors to stderr, once.
func run(args []string, stdout, stderr io.Writer) int {
	c, err := parse(args)
	if err != nil {
		return fail(stderr, err)
	}
	var out bytes.Buffer
	c.stdout, c.stderr = stdout, stderr
	c.out = &out
	err = c.do()
	if _, werr := stdout.Write(out.Bytes()); werr != nil && err == nil {
		err = fmt.Errorf("write result: %w", werr)
	}
	return fail(stderr, err)
}

// do runs the command: what -h asks for, the daemon, or one of the table.
func (c *call) do() error {
	if c.help {
		help(c.out, c.command)
		return nil
	}
	if c.command == nil {
		return c.daemon()
	}
	return c.command.run(context.Background(), c)
}

// daemon runs in the foreground until SIGINT or SIGTERM.
func (c *call) daemon() error {
	if err := hideMemory(); err != nil {
		return err
	}
	env, err := takeOver()
	if err != nil {
		return err
	}
	load := func() (*config.File, error) {
		file, err := config.Load(c.config, env.lookup)
		if err == nil && c.socket != "" {
			file.Control.Socket = c.socket
		}
		return file, err
	}
	file, err := load()
	if err != nil {
		return err
	}
	if err := env.handOn(file); err != nil {
		return err
	}
	log, level := newLogger(file.Log, c.stderr)
	if what, fix := exposed(file); what != "" {
		log.Warn(what, "fix", fix)
	}
	// A reader of the log that goes, such as tee at an interrupt from the
	// keyboard, must not end this process with everything still in force.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := runDaemon(ctx, source{file, load}, log, level); err != nil {
		log.Error("stopped", "err", err)
		return loggedError{err}
	}
	return nil
}

// loggedError has been told already.
type loggedError struct{ error }

func (e loggedError) Unwrap() error { return e.error }

// errUsage is a command line that names no command whose usage could be shown.
var errUsage = errors.New("cgtun -h tells what there is")

// usageError is a command line that does not say what to do.
type usageError struct {
	command *command // whose usage is shown; nil: that of all
	what    string
}

func (e *usageError) Error() string { return e.what }

// fail tells about an error and returns the exit code for it.
func fail(w io.Writer, err error) int {
	var (
		usage   *usageError
		file    config.Errors
		told    loggedError
		refused *control.Error
		status  exitError
	)
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(w, "cgtun: %s\n", usage.what)
		synopsis(w, usage.command)
		return exitUsage
	case errors.Is(err, errUsage):
		fmt.Fprintf(w, "cgtun: %v\n", err)
		return exitUsage
	case errors.As(err, &told):
		return exitFailed
	case errors.As(err, &file):
		fmt.Fprintln(w, file)
		return exitUsage
	case errors.As(err, &status) && status.error == nil:
		return status.code // all was said
	case errors.As(err, &status):
		fmt.Fprintf(w, "cgtun: %v\n", err)
		return status.code
	case errors.As(err, &refused) && refused.Exit == exitUsage:
		fmt.Fprintln(w, refused.Text) // lines with places of their own
		return exitUsage
	}
	fmt.Fprintf(w, "cgtun: %v\n", err)
	return exitFailed
}

// exitError is an error with an exit code of its own.
type exitError struct {
	error
	code int
}

func (e exitError) Unwrap() error { return e.error }
