package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"cgtun/control"
	"cgtun/flow"
)

// runFlows lists the flows, or follows them.
func runFlows(ctx context.Context, c *call) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	if c.follow {
		return askError(client.Watch(ctx, c.printEvent))
	}
	list, raw, err := client.Flows(ctx)
	return c.print(raw, askError(err), func(w io.Writer) { printFlows(w, &list) })
}

// printEvent prints one change as it comes.
func (c *call) printEvent(e flow.Event, raw json.RawMessage) error {
	line := ascii(raw)
	if !c.json {
		line = fmt.Appendf(nil, "%-6s  %s", e.Event, eventLine(&e.Flow))
	}
	_, err := c.stdout.Write(append(line, '\n'))
	return err
}

// eventLine is a flow in one line, for -f: no columns, for what comes later is
// not known.
func eventLine(f *flow.Info) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s %s > %s", f.ID, f.Proto, addr(f.Src), addr(f.Dst))
	if f.Name != nil {
		fmt.Fprintf(&b, " %s", plain(*f.Name))
	}
	fmt.Fprintf(&b, "  %s  %s via %s  up %s, down %s", state(f), use(f), path(f.Path), size(f.UpBytes), size(f.DownBytes))
	if p := process(f); p != "-" {
		fmt.Fprintf(&b, "  by %s", p)
	}
	return b.String()
}

func printFlows(w io.Writer, list *control.FlowList) {
	t := newTable(w)
	t.row("ID", "PROTO", "FROM", "TO", "NAME", "STATE", "USE", "PATH", "UP", "DOWN", "AGE", "PROCESS", "CGROUP")
	for i := range list.Flows {
		f := &list.Flows[i]
		t.row(f.ID, f.Proto, addr(f.Src), addr(f.Dst), text(f.Name), state(f), use(f), path(f.Path),
			size(f.UpBytes), size(f.DownBytes), age(f.AgeMS), process(f), text(f.Cgroup))
	}
	t.flush()
}

// use says which rule sent the flow where.
func use(f *flow.Info) string {
	switch {
	case f.Use == nil:
		return "-"
	case f.Rule == nil:
		return plain(*f.Use) + " (no rule)"
	}
	return fmt.Sprintf("%s (rule %d)", plain(*f.Use), *f.Rule)
}

func state(f *flow.Info) string {
	if f.Reason == nil || *f.Reason == flow.Closed.String() { // in order: no more to say
		return f.State
	}
	return f.State + ": " + *f.Reason
}

func path(names []string) string {
	if len(names) == 0 {
		return "-"
	}
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = plain(n)
	}
	return strings.Join(quoted, " > ")
}

func process(f *flow.Info) string {
	switch {
	case f.PID == nil:
		return "-"
	case f.Process == nil:
		return fmt.Sprint(*f.PID)
	}
	return fmt.Sprintf("%s (%d)", plain(*f.Process), *f.PID)
}

// addr is an end of a flow; the far one of a source with many peers is open.
func addr(a netip.AddrPort) string {
	if !a.IsValid() {
		return "*"
	}
	return a.String()
}

// text is text from the wire that may not be known.
func text(s *string) string {
	if s == nil {
		return "-"
	}
	return plain(*s)
}

// age is short: what matters of an old flow is not its milliseconds.
func age(ms int64) string {
	d := time.Duration(ms) * time.Millisecond
	switch {
	case d < time.Second:
		return d.String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
