package main_test

import (
	"context"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/internal/labtest"
)

// A reload puts another file in force, all of it or nothing, while flows go on:
// what is bad, or cannot change while cgtun runs, changes nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "nc")
	w.server.Run("ip", "addr", "add", "203.0.113.12/32", "dev", "lo")
	const chunks, chunk = 300, 1000
	w.server.Serve("0.0.0.0:80", func(c *net.TCPConn) error {
		b := make([]byte, chunk)
		_, _ = c.Read(b)
		if _, err := c.Write([]byte("HTTP/1.0 200 OK\r\n\r\n")); err != nil {
			return err
		}
		for range chunks {
			time.Sleep(10 * time.Millisecond)
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
		return nil
	})
	w.server.ServeEcho(":7000")
	bypassed := strings.Replace(w.config(second), "[route]", "bypass = [\"203.0.113.12/32\"]\n[route]", 1)
	cmd := w.daemonCommand(bypassed)
	file := cmd.Args[len(cmd.Args)-1]
	d := w.startCommand(cmd)
	reload := func(text string, code int, want string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, errs, got := w.cgtun("reload")
		if got != code || !strings.Contains(errs, want) {
			t.Fatalf("reload: exit code %d, %q; want %d, %q", got, errs, code, want)
		}
	}
	connects := func(want bool, what string) {
		t.Helper()
		if _, err := w.try(inside, "nc", "-z", "-w", "3", far4, "7000"); (err == nil) != want {
			t.Errorf("%s: connects %t: %v", what, !want, err)
		}
	}

	ctx, cancel := context.WithTimeout(context.Background(), patience())
	defer cancel()
	download := w.command(ctx, inside, "sh", "-c", "curl -sS http://"+far4+"/ | wc -c")
	done := make(chan string, 1)
	go func() {
		out, err := download.CombinedOutput()
		if err != nil {
			out = append(out, err.Error()...)
		}
		done <- strings.TrimSpace(string(out))
	}()
	labtest.Eventually(t, 5*time.Second, func() bool { return len(w.flows()) > 0 }, "no flow")

	rejecting := strings.Replace(bypassed, "[[rule]]", "[[rule]]\nport = 7000\nuse = \"reject\"\n[[rule]]", 1)
	for range 10 {
		reload(rejecting, 0, "")
		connects(false, "a rule that rejects")
		reload(strings.ReplaceAll(rejecting, "second", "other"), 0, "") // another outbound, by the same device
		connects(false, "another outbound")
		reload(bypassed, 0, "")
		connects(true, "without the rule")
	}
	reload(bypassed+"\n[[rule", 2, file+":")
	reload(strings.Replace(bypassed, `use = "second"`, `use = "scond"`, 1), 2, `the nearest known one is "second"`)
	reload(strings.Replace(bypassed, "[tun]", "[tun]\nmtu = 1400", 1), 1, "[tun] cannot change while cgtun runs")
	connects(true, "after bad files")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := w.cgtun("reload"); code != 2 || !strings.Contains(errs, "cannot be read") {
		t.Errorf("a file that is not there: exit code %d, %q", code, errs)
	}

	// What was bypassed leaves by the uplink, until it is not bypassed any more.
	_, _ = w.try(inside, "nc", "-z", "-w", "3", "203.0.113.12", "7000")
	if w.leaks.Packets() == 0 {
		t.Error("what is bypassed was captured")
	}
	reload(w.config(second), 0, "")
	w.leaks.Reset()
	_, _ = w.try(inside, "nc", "-z", "-w", "3", "203.0.113.12", "7000")
	w.noLeak("bypassed no more")

	if err := os.WriteFile(file, []byte(strings.Replace(rejecting, `"debug"`, `"info"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Signal(syscall.SIGHUP)
	labtest.Eventually(t, 5*time.Second, func() bool {
		_, err := w.try(inside, "nc", "-z", "-w", "3", far4, "7000")
		return err != nil
	}, "SIGHUP does not reload")
	if got, want := <-done, "300000"; got != want {
		t.Errorf("the download has %s bytes, want %s", got, want)
	}
}
