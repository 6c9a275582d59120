package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"cgtun/control"
)

// runExplain asks what would become of a flow.
func runExplain(ctx context.Context, c *call) error {
	if len(c.args) == 0 {
		return &usageError{c.command, "there is no HOST"}
	}
	host, port, err := splitHost(c.args[0])
	if err != nil {
		return &usageError{c.command, err.Error()}
	}
	switch c.proto {
	case "tcp", "udp", "icmp":
	default:
		return &usageError{c.command, fmt.Sprintf("%q is no protocol: tcp, udp or icmp", c.proto)}
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	e, raw, err := client.Explain(ctx, control.ExplainRequest{Host: host, Port: port, Proto: c.proto, Cgroup: c.cgroup})
	return c.print(raw, askError(err), func(w io.Writer) { printExplain(w, &e) })
}

// splitHost reads HOST[:PORT]; an IPv6 address has brackets if a port follows.
// Port 0: none was given.
func splitHost(s string) (host string, port uint16, err error) {
	bad := fmt.Errorf("%q is not HOST[:PORT], such as example.org:443 or [2001:db8::1]:443", s)
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil && (a.Is6() || s == a.String()) {
		return a.String(), 0, nil
	}
	host = s
	if strings.Contains(s, ":") {
		var text string
		if host, text, err = net.SplitHostPort(s); err != nil {
			return "", 0, bad
		}
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return "", 0, bad
		}
		port = uint16(n)
	}
	if host == "" || strings.ContainsAny(host, "/[] \t") {
		return "", 0, bad
	}
	return host, port, nil
}

func printExplain(w io.Writer, e *control.Explain) {
	target := plain(e.Host)
	if e.Port != nil {
		target = net.JoinHostPort(e.Host, strconv.Itoa(int(*e.Port)))
	}
	fmt.Fprintf(w, "%s %s from %s\n", e.Proto, target, plainOrDash(e.Cgroup))
	t := newTable(w)
	t.row("captured", yes(e.Captured)+": "+line(e.Why))
	t.row("addresses", orDash(strings.Join(e.Addresses, " ")))
	t.row("rule", rule(e))
	t.row("use", plainOrDash(e.Use))
	t.row("path", path(e.Path))
	if e.Choice != "" {
		t.row("choice", string(e.Choice))
	}
	if e.Needs != "" {
		t.row("needs", fmt.Sprintf("its %s, which is known only when it comes", e.Needs))
	}
	t.flush()
}

func rule(e *control.Explain) string {
	switch {
	case e.Rule == nil:
		return "-"
	case e.Line == nil:
		return strconv.Itoa(*e.Rule)
	}
	return fmt.Sprintf("%d (line %d)", *e.Rule, *e.Line)
}
