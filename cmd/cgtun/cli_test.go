package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/config"
)

func TestFlagsStandAnywhere(t *testing.T) {
	const want = "explain host json cgroup=/x proto=udp socket=/s"
	for _, line := range []string{
		"explain host -json -cgroup /x -proto udp -s /s",
		"-s /s --json explain -cgroup=/x host --proto=udp",
		"--cgroup /x -proto udp -s=/s -json explain host",
		"explain -proto=udp -cgroup /x -json -s /s host --",
	} {
		c, err := parse(strings.Fields(line))
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		got := c.command.name + " " + strings.Join(c.args, " ")
		if c.json {
			got += " json"
		}
		got += " cgroup=" + c.cgroup + " proto=" + c.proto + " socket=" + c.socket
		if got != want {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}

func TestCommandKeepsItsOwnFlags(t *testing.T) {
	c, err := parse([]string{"run", "-cgroup", "/x", "--", "ls", "-h", "--", "-direct"})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.rest, " "); got != "ls -h -- -direct" || c.help || c.direct || c.cgroup != "/x" {
		t.Errorf("got %q, %+v", got, c.options)
	}
}

func TestHostsAreRead(t *testing.T) {
	tests := []struct {
		in, host string
		port     uint16
		ok       bool
	}{
		{"a.example", "a.example", 0, true},
		{"a.example:443", "a.example", 443, true},
		{"192.0.2.1", "192.0.2.1", 0, true},
		{"192.0.2.1:80", "192.0.2.1", 80, true},
		{"2001:db8::1", "2001:db8::1", 0, true},
		{"[2001:db8::1]", "2001:db8::1", 0, true},
		{"[2001:db8::1]:53", "2001:db8::1", 53, true},
		{"[192.0.2.1]", "", 0, false},
		{"a.example:", "", 0, false},
		{"a.example:0", "", 0, false},
		{"a.example:65536", "", 0, false},
		{"a.example:https", "", 0, false},
		{":443", "", 0, false},
		{"", "", 0, false},
		{"https://a.example/", "", 0, false},
		{"a b", "", 0, false},
	}
	for _, tt := range tests {
		host, port, err := splitHost(tt.in)
		if (err == nil) != tt.ok || host != tt.host || port != tt.port {
			t.Errorf("%q: got %q, %d, %v", tt.in, host, port, err)
		}
	}
}

func TestSizesAreShort(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1 << 20: "1.0 MiB", 3 << 40: "3.0 TiB", 1<<64 - 1: "16.0 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("%d: got %q, want %q", n, got, want)
		}
	}
}

// What waits for a daemon reads its log: the record is there at every level.
func TestReadyIsLoggedAtEveryLevel(t *testing.T) {
	for _, level := range []string{"debug", "info", "warn", "error"} {
		for _, format := range []string{config.FormatText, config.FormatJSON} {
			var b bytes.Buffer
			log, _ := newLogger(config.Log{Level: level, Format: format}, &b)
			log = log.With("a", 1)
			log.Info("noise")
			log.Info(readyMessage, "pid", 1)
			if got := b.String(); strings.Count(got, "ready") != 1 || !strings.Contains(got, "pid") {
				t.Errorf("%s, %s: %q", level, format, got)
			}
			if got := strings.Contains(b.String(), "noise"); got != (log.Enabled(t.Context(), slog.LevelInfo) && (level == "debug" || level == "info")) {
				t.Errorf("%s: an ordinary record is there: %v", level, got)
			}
		}
	}
}

// What a captured process can bring about again and again fills no disk.
func TestTheSameIsNotLoggedWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		log, _ := newLogger(config.Log{Level: "debug", Format: config.FormatText}, &b)
		lines := func(message string) int { return strings.Count(b.String(), "msg="+message) }
		for i := range 1000 {
			log.With("netns", i).Warn("late")
			log.Debug("flow")
		}
		log.Warn("other")
		log.Info(readyMessage)
		if late, flow := lines("late"), lines("flow"); late != mostAlike || flow != 1000 || lines("other") != 1 || lines(readyMessage) != 1 {
			t.Errorf("%d warnings, %d records of debug:\n%s", late, flow, b.String())
		}
		b.Reset()
		time.Sleep(alikeTime)
		log.Warn("late")
		log.Warn("late")
		if got := b.String(); lines("late") != 2 || strings.Count(got, fmt.Sprintf("untold=%d\n", 1000-mostAlike)) != 1 {
			t.Errorf("a minute later:\n%s", got)
		}
	})
}

// docs/cli.md has each form of each command, each flag and what they mean, in
// the words of the program, and no command that the program does not have.
func TestDocumentationIsComplete(t *testing.T) {
	data, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(data)
	known := map[string]bool{}
	for _, k := range commands {
		known[k.name] = true
		_, section, ok := strings.Cut(doc, "\n### "+k.name+"\n")
		if !ok {
			t.Errorf("no section of %q", k.name)
			continue
		}
		section, _, _ = strings.Cut(section, "\n### ")
		for _, u := range k.usage {
			if !strings.Contains(section, "\n    cgtun "+u+"\n") {
				t.Errorf("%s: the usage %q is missing", k.name, u)
			}
		}
		for _, f := range k.flags {
			if !strings.Contains(section, "`-"+f) {
				t.Errorf("%s: flag -%s is not explained", k.name, f)
			}
		}
	}
	for line := range strings.Lines(doc) {
		if name, ok := strings.CutPrefix(line, "### "); ok && !known[strings.TrimSpace(name)] {
			t.Errorf("%q is no command", strings.TrimSpace(name))
		}
	}
	for _, f := range flags {
		if row := strings.TrimSpace("-"+f.name+" "+f.value) + "` | " + f.help; !strings.Contains(doc, row) {
			t.Errorf("the table of flags has no row with %q", row)
		}
	}
}

// The recipes of the README are good configurations of at most eight lines.
func TestRecipesAreGood(t *testing.T) {
	data, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(data), "```toml\n")[1:]
	if len(blocks) != 4 {
		t.Errorf("%d recipes, want 4", len(blocks))
	}
	for _, b := range blocks {
		recipe, _, _ := strings.Cut(b, "```")
		if _, err := config.Parse("recipe", []byte(recipe)); err != nil {
			t.Errorf("%v in:\n%s", err, recipe)
		}
		if n := strings.Count(recipe, "\n"); n > 8 {
			t.Errorf("%d lines:\n%s", n, recipe)
		}
	}
}
