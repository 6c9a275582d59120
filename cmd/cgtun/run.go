package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

const runLong = `The daemon moves the caller into the cgroup and CMD takes its place: it keeps
user, environment, directory and terminal, and its exit code is the one that is
seen. If the daemon does not answer, or the caller's network namespace is not
attached, CMD is not run and the exit code is 1.
Root and the group cgtun may run; -direct is root's.`

// The exit codes of a shell for a command that cannot be run.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// runRun has the daemon move this process, then becomes CMD.
func runRun(ctx context.Context, c *call) error {
	switch {
	case len(c.rest) == 0:
		return &usageError{c.command, `there is no CMD after "--"`}
	case c.direct && c.cgroup != "":
		return &usageError{c.command, "-direct and -cgroup exclude each other"}
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	if err := client.Join(ctx, c.cgroup, c.direct); err != nil {
		return fmt.Errorf("%q was not run: %w", c.rest[0], askError(err))
	}
	return become(c.rest)
}

// become replaces this process by a command. It returns only if it cannot.
func become(argv []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil && !errors.Is(err, exec.ErrDot) { // a shell takes what PATH finds here, too
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return exitError{fmt.Errorf("%q: command not found", argv[0]), exitNotFound}
		}
		return exitError{fmt.Errorf("run: %w", err), exitNotExecutable}
	}
	// Exec gives the limit of descriptors back that the runtime raised at
	// start: CMD has that of its caller.
	err = unix.Exec(path, argv, os.Environ())
	if errors.Is(err, unix.ENOEXEC) {
		// A script without a first line that names its shell.
		err = unix.Exec("/bin/sh", append([]string{"sh", path}, argv[1:]...), os.Environ())
	}
	return exitError{fmt.Errorf("run %q: %w", path, err), exitNotExecutable}
}
