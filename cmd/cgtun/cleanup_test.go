package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/config"
	"cgtun/internal/labtest"
)

// One namespace, with what a killed instance 4242 left in it and something of
// the user's own; a cgroup namespace, so that the cgroups of the machine's
// other instances are out of sight.
func TestCleanupTakesOnlyOurs(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("unshare"))
	labtest.Alone(t)
	lab := labtest.New(t)
	host, cg := lab.Host("left"), lab.Cgroup("top")
	made := filepath.Join(cg.Dir, "made")
	foreign := filepath.Join(cg.Dir, "foreign")
	for _, dir := range []string{made, foreign} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.Remove(foreign); os.Remove(made) })
	if err := unix.Setxattr(made, "user.cgtun", []byte("4242"), 0); err != nil {
		t.Fatal(err)
	}
	host.Run("ip", "rule", "add", "fwmark", "0x1092", "lookup", "4242", "priority", "14242", "proto", "197")
	host.Run("ip", "-6", "rule", "add", "fwmark", "0x1092", "lookup", "4242", "priority", "14242", "proto", "197")
	host.Run("ip", "route", "add", "throw", "192.0.2.0/24", "table", "4242", "proto", "197")
	host.Run("ip", "rule", "add", "fwmark", "0x1093", "lookup", "4243", "priority", "14243")
	sock := staleSocket(t)

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Tests of other packages leave dead things at the same time: only what is of
	// this one counts.
	var all string
	cleanup := func() (ours string) {
		cmd := cg.Command(host.Command(t.Context(), "unshare", "--cgroup", self, "cleanup", "-s", sock))
		cmd.Env = append(os.Environ(), asProgram+"=1")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("cleanup: %v\n%s", err, &stderr)
		}
		all = string(out)
		for line := range strings.Lines(all) {
			if strings.Contains(line, "4242") || strings.Contains(line, "/made") || strings.Contains(line, sock) {
				ours += line
			}
		}
		return ours
	}
	first := cleanup()
	for _, want := range []string{"removed ip rule 14242:", "removed ip -6 rule 14242:", "removed route table 4242\n", "removed cgroup /made\n", "removed socket " + sock + "\n"} {
		if !strings.Contains(first, want) {
			t.Errorf("%q is missing in:\n%s", want, first)
		}
	}
	if n := strings.Count(first, "\n"); n != 5 {
		t.Errorf("%d lines, want 5:\n%s", n, first)
	}
	for _, path := range []string{sock, made} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("a cgroup that is not ours: %v", err)
	}
	rules := host.Run("ip", "rule") + host.Run("ip", "-6", "rule")
	if strings.Contains(rules, "14242:") || !strings.Contains(rules, "14243:") {
		t.Errorf("rules afterwards:\n%s", rules)
	}
	if second := cleanup(); second != "" || !strings.Contains(all, "removed") && all != "nothing was left\n" {
		t.Errorf("the second time: %q", all)
	}
	host.Run("ip", "rule", "del", "priority", "14243")
}

// staleSocket makes what a killed daemon leaves: a socket nobody listens at.
func staleSocket(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	return path
}

func TestInitWritesOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etc", "cgtun", "config.toml")
	c := &call{out: new(bytes.Buffer)}
	if err := writeExample(path, c); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != config.Example {
		t.Errorf("what was written is not the example (%v)", err)
	}
	if _, err := config.Load(path, nil); err != nil {
		t.Errorf("the example is not good: %v", err)
	}
	if err := os.WriteFile(path, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeExample(path, c); err == nil || fail(new(bytes.Buffer), err) != exitFailed {
		t.Errorf("a file that was there: %v", err)
	}
	if data, _ := os.ReadFile(path); string(data) != "mine" {
		t.Error("the file that was there is not what it was")
	}
}
