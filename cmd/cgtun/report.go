package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/report"
	"cgtun/rules"
)

const reportLong = `Without CMD it is of the flows that live and of those that closed lately, as
"cgtun flows" has them: "since" says from when on that is all. With CMD it is of
the time that CMD runs, goes to stderr, and the exit code is that of CMD.`

// kept is for how long the daemon shows flows that have closed.
const kept = time.Minute

// runReport sums flows up.
func runReport(ctx context.Context, c *call) error {
	matches := func(string) bool { return true }
	if len(c.args) == 1 {
		m, err := rules.CgroupGlob(c.args[0])
		if err != nil {
			return &usageError{c.command, err.Error()}
		}
		matches = m
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	if c.hasRest {
		return c.reportOn(ctx, client, matches)
	}
	until := time.Now()
	list, _, err := client.Flows(ctx)
	if err != nil {
		return askError(err)
	}
	since := until.Add(-kept)
	if c.since > 0 && c.since < kept {
		since = until.Add(-c.since)
	}
	var sum report.Sum
	addSince(&sum, &list, since, matches)
	return c.printReport(c.out, sum.Report(since, until))
}

// addSince adds the flows that lived after a time.
func addSince(sum *report.Sum, list *control.FlowList, since time.Time, matches func(string) bool) {
	for i := range list.Flows {
		f := &list.Flows[i]
		if f.State == flow.StateClosed && f.Start.Add(time.Duration(f.AgeMS)*time.Millisecond).Before(since) {
			continue
		}
		addMatching(sum, f, matches)
	}
}

func addMatching(sum *report.Sum, f *flow.Info, matches func(string) bool) {
	cgroup := ""
	if f.Cgroup != nil {
		cgroup = *f.Cgroup
	}
	if matches(cgroup) {
		sum.Add(f)
	}
}

// reportOn reports on the time that a command runs.
func (c *call) reportOn(ctx context.Context, client control.Client, matches func(string) bool) error {
	switch {
	case len(c.rest) == 0:
		return &usageError{c.command, `there is no CMD after "--"`}
	case c.since != 0:
		return &usageError{c.command, "-since and CMD exclude each other"}
	}
	if _, _, err := client.Status(ctx); err != nil {
		return fmt.Errorf("%q was not run: %w", c.rest[0], askError(err))
	}
	var sum report.Sum
	since := time.Now()
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	watched := make(chan error, 1)
	go func() {
		watched <- client.Watch(watching, func(e flow.Event, _ json.RawMessage) error {
			if e.Event == flow.EventClose {
				addMatching(&sum, &e.Flow, matches)
			}
			return nil
		})
	}()
	code, err := runCommand(c.rest)
	until := time.Now()
	stop()
	lost := <-watched
	if err != nil {
		return err
	}
	list, _, errFlows := client.Flows(context.WithoutCancel(ctx))
	if lost = errors.Join(lost, errFlows); lost != nil {
		fmt.Fprintf(c.stderr, "cgtun: the report is not whole: %v\n", lost)
	}
	addSince(&sum, &list, since, matches)
	if err := c.printReport(c.stderr, sum.Report(since, until)); err != nil {
		return err
	}
	if code != 0 {
		return exitError{nil, code}
	}
	return nil
}

// runCommand runs a command with what this process has, and returns its exit code
// as a shell does. Signals from the terminal reach it by themselves.
func runCommand(argv []string) (code int, err error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if errors.Is(cmd.Err, exec.ErrDot) {
		cmd.Err = nil // a shell takes what PATH finds here, too
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)
	err = cmd.Start()
	switch {
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist):
		return 0, exitError{fmt.Errorf("%q: command not found", argv[0]), exitNotFound}
	case err != nil:
		return 0, exitError{fmt.Errorf("run: %w", err), exitNotExecutable}
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			_ = cmd.Process.Signal(s)
		case <-done:
			status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
			if ok && status.Signaled() {
				return 128 + int(status.Signal()), nil
			}
			return cmd.ProcessState.ExitCode(), nil
		}
	}
}

func (c *call) printReport(w io.Writer, r *report.Report) error {
	if c.json {
		raw, err := json.Marshal(r)
		if err != nil {
			return err
		}
		_, err = w.Write(append(ascii(raw), '\n'))
		return err
	}
	fmt.Fprintf(w, "from %s to %s\n", r.Since.Format(time.DateTime+" UTC"), r.Until.Format(time.DateTime+" UTC"))
	for i := range r.Units {
		u := &r.Units[i]
		flows := fmt.Sprintf("%d flows", u.FlowsTotal)
		if u.FlowsTotal == 1 {
			flows = "1 flow"
		}
		fmt.Fprintf(w, "\n%s: %s, up %s, down %s\n", text(u.Cgroup), flows, size(u.UpBytes), size(u.DownBytes))
		t := newTable(w)
		t.row("  HOST", "FLOWS", "UP", "DOWN", "PATHS")
		for _, h := range u.Hosts {
			var paths []string
			for _, name := range slices.Sorted(maps.Keys(h.Paths)) {
				paths = append(paths, fmt.Sprintf("%s %d", plain(name), h.Paths[name]))
			}
			t.row("  "+plain(h.Host), h.FlowsTotal, size(h.UpBytes), size(h.DownBytes), orDash(strings.Join(paths, ", ")))
		}
		t.flush()
		for _, f := range u.Failures {
			what := "failed"
			if f.Hidden {
				what = "hidden"
			}
			fmt.Fprintf(w, "  %s: %d × %s by %s\n", what, f.Count, line(f.Kind), text(f.Outbound))
		}
	}
	return nil
}
