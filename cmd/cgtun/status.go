package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"cgtun/config"
	"cgtun/control"
)

// runStatus tells about the daemon, or about one process.
func runStatus(ctx context.Context, c *call) error {
	pid := 0
	if len(c.args) == 1 {
		var err error
		if pid, err = strconv.Atoi(c.args[0]); err != nil || pid < 1 {
			return &usageError{c.command, fmt.Sprintf("%q is no process id", c.args[0])}
		}
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	if pid != 0 {
		st, raw, err := client.PID(ctx, pid)
		return c.print(raw, askError(err), func(w io.Writer) { printPID(w, &st) })
	}
	st, raw, err := client.Status(ctx)
	return c.print(raw, askError(err), func(w io.Writer) { printStatus(w, &st) })
}

// runReload waits until the new configuration is in force, or refused.
const reloadLong = `It waits until the file is in force. Everything is checked first: a bad file
changes nothing, and its mistakes are printed (exit code 2). Flows that live go on as
they are. [tun], [control], log.format, and where a route leads cannot change
while cgtun runs: then nothing is changed (exit code 1).`

func runReload(ctx context.Context, c *call) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	return askError(client.Reload(ctx))
}

// askError adds what to do when nobody answers, and what holds meanwhile.
func askError(err error) error {
	if errors.Is(err, control.ErrNotRunning) {
		if text := blocks(); text != "" {
			return fmt.Errorf("%w%s: %s", err, text, openBlock)
		}
		return fmt.Errorf("%w: start one with cgtun -c %s, or name its socket with -s", err, config.DefaultPath)
	}
	return err
}

func printPID(w io.Writer, p *control.PIDStatus) {
	verdict := "is captured"
	if !p.Captured {
		verdict = "is not captured"
	}
	fmt.Fprintf(w, "process %d %s: %s\n", p.PID, verdict, line(p.Why))
	t := newTable(w)
	t.row("cgroup", plainOrDash(p.Cgroup))
	t.row("attachment", plainOrDash(p.Attachment))
	t.row("network namespace", number(p.NetnsIno))
	t.flush()
}

func printStatus(w io.Writer, s *control.Status) {
	fmt.Fprintf(w, "cgtun %s is %s since %s: pid %d, instance %d, %s\n", s.Version, s.State,
		s.Since.UTC().Format(time.DateTime+" UTC"), s.PID, s.Instance, plain(string(s.Config)))

	t := newTable(w)
	t.head("ROUTE", "MARK", "MASK", "TABLE", "PRIORITY", "VIA", "ON EXIT")
	for _, r := range s.Routes {
		t.row(plain(r.Name), fmt.Sprintf("0x%x", r.Mark), fmt.Sprintf("0x%x", r.Mask), r.Table, r.Priority, via(r.Via), r.OnExit)
	}
	t.head("CGROUP", "PRESENT", "HELD", "ID")
	for _, g := range s.Cgroups {
		t.row(plain(g.Path), yes(g.Present), yes(g.Held), number(g.ID))
	}
	if len(s.Docker) > 0 {
		t.head("DOCKER", "VERSION", "RUNS", "SELECTS", "CGROUP", "ERROR")
	}
	for _, d := range s.Docker {
		t.row(d.PID, orDash(string(d.Version)), yes(d.Running), d.Selects, plain(d.Cgroup), orDash(string(d.Error)))
	}
	t.head("ATTACHMENT", "ROUTE", "CAPTURE", "DEVICE", "ADDRESS", "STATE", "FAMILIES", "FLOWS", "UP", "DOWN", "ERROR")
	for _, a := range s.Attachments {
		t.row(attachmentName(&a), plainOrDash(a.Route), a.Capture, orDash(string(a.Device)), orDash(strings.Join(a.Address, " ")), a.State,
			families(a.V4, a.V6), a.Flows, size(a.UpBytes), size(a.DownBytes), orDash(string(a.Error)))
	}
	t.head("OUTBOUND", "TYPE", "STATE", "SCORE", "CONNECT", "DIALS", "FAILED", "HIDDEN", "UP", "DOWN", "ERROR")
	for _, o := range s.Outbounds {
		t.row(plain(o.Name), o.Type, o.State, decimal(o.Score, ""), decimal(o.ConnectMS, " ms"), o.DialsTotal, o.FailuresTotal,
			o.HiddenTotal, size(o.UpBytes), size(o.DownBytes), orDash(string(o.Error)))
	}
	if len(s.Groups) > 0 {
		t.head("GROUP", "TYPE", "OUTBOUNDS", "ORDER NOW", "NOTE")
	}
	for _, g := range s.Groups {
		t.row(plain(g.Name), g.Type, strings.Join(g.Outbounds, " "), strings.Join(g.Order, " "), orDash(string(g.Note)))
	}
	t.flush()

	n := &s.Counters
	fmt.Fprintf(w, "\nflows: %d live, %d in all, %d refused, %d denied; gate drops: %d\n",
		n.FlowsLive, n.FlowsTotal, n.RefusedTotal, n.DeniedTotal, n.GateDropsTotal)
	h := &n.HiddenTotal
	fmt.Fprintf(w, "hidden failures: dial %d, reset %d, close %d, stall %d, dns %d, resume %d\n",
		h.Dial, h.Reset, h.Close, h.Stall, h.DNS, h.Resume)
	printTurnedAway(w, s.Counters.TurnedAwayTotal)
	fmt.Fprintf(w, "limits: %d descriptors, %s of memory\n", s.Limits.Nofile, size(s.Limits.MemoryBytes))
	for _, m := range s.Missing {
		fmt.Fprintf(w, "the kernel lacks %s (since %s): %s\n", m.Feature, m.Kernel, m.Lost)
	}
}

func families(v4, v6 bool) string {
	switch {
	case v4 && v6:
		return "v4 v6"
	case v4:
		return "v4"
	case v6:
		return "v6"
	}
	return "-"
}

// printTurnedAway shows the counts that are not 0, if there are any.
func printTurnedAway(w io.Writer, counts control.Counts) {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		if n := counts[name]; n > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", name, n))
		}
	}
	if len(parts) > 0 {
		fmt.Fprintf(w, "turned away: %s\n", strings.Join(parts, ", "))
	}
}

// via is the way of a route as it came in JSON: a word, or a table of keys.
func via(v any) string {
	if m, ok := v.(map[string]any); ok {
		var parts []string
		for _, key := range []string{"gateway", "gateway6", "dev", "tproxy", "container"} {
			if s, ok := m[key]; ok && s != "" {
				parts = append(parts, fmt.Sprintf("%s %v", key, s))
			}
		}
		return strings.Join(parts, " ")
	}
	return fmt.Sprint(v)
}

// attachmentName is the id, with the container's beside it where that is another one.
func attachmentName(a *control.Attachment) string {
	if a.Container == "" || string(a.Container) == a.ID {
		return plain(a.ID)
	}
	return plain(a.ID) + " (" + plain(string(a.Container)) + ")"
}
