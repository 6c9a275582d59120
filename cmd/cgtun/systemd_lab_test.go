package main_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/internal/labtest"
)

// manager stands in for systemd: it gets what sd_notify(3) sends.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
	path string
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, path: filepath.Join(t.TempDir(), "notify")}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m.conn = conn
	return m
}

// until returns all messages up to one, and that.
func (m *manager) until(want string) (got []string) {
	m.t.Helper()
	m.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 4096)
	for !slices.Contains(got, want) {
		n, err := m.conn.Read(b)
		if err != nil {
			m.t.Fatalf("no %s came, but %q: %v", want, got, err)
		}
		got = append(got, strings.TrimSpace(string(b[:n])))
	}
	return got
}

// The manager is told when everything is in force, then again and again that
// all parts answer, and that the end has begun.
func TestSystemdIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := newManager(t)
	cmd := w.daemonCommand(w.config(second))
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.path, "WATCHDOG_USEC=300000")
	d := w.startCommand(cmd)
	// A start that takes long gives signs of life, too.
	if got := slices.Compact(m.until("READY=1")); len(got) > 2 || got[0] != "WATCHDOG=1" && len(got) != 1 {
		t.Errorf("before READY=1 came %q", got)
	}
	for range 3 {
		if got := m.until("WATCHDOG=1"); len(got) != 1 {
			t.Errorf("between two signs of life came %q", got)
		}
	}
	d.stop()
	if got := m.until("STOPPING=1"); slices.Contains(got, "READY=1") {
		t.Errorf("at the end came %q", got)
	}
}

// With nothing but what the unit leaves it, the daemon does all of its work: at
// home, in a namespace that a selected process brings, for a caller of run, and
// at the end.
func TestCapabilitiesOfTheUnitAreEnough(t *testing.T) {
	t.Parallel()
	labtest.Need(t, labtest.Tool("setpriv"))
	text, err := os.ReadFile("../../init/cgtun.service")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nCapabilityBoundingSet=")
	line, _, _ := strings.Cut(rest, "\n")
	few := "-all"
	for _, name := range strings.Fields(line) {
		few += ",+" + strings.ToLower(strings.TrimPrefix(name, "CAP_"))
	}
	w := newWorld(t)
	w.routed()
	w.server.ServeUDPEcho(port(far4, 7000))
	cmd := w.daemonCommand(w.config(second))
	at := slices.Index(cmd.Args, w.program())
	cmd.Args = slices.Insert(cmd.Args, at, "setpriv", "--no-new-privs", "--bounding-set", few)
	w.startCommand(cmd)
	if s := w.status(); s.State != control.Ready || !s.Cgroups[0].Held {
		t.Errorf("status: %+v", s)
	}
	for _, at := range []where{inside, moved} {
		w.run(at, "env", probeArgs(probe{Do: "dial", Network: "udp", To: port(far4, 7000), Say: "x"})...)
	}
	if said, err := w.step(1, port(far4, 7000)); err != nil || said != "answered\n" {
		t.Errorf("a step in a namespace of its own: %q, %v", said, err)
	}
	w.noLeak("with few capabilities")
}

// The unit is one that systemd takes, and as closed as docs/reliability.md says.
func TestUnitIsGood(t *testing.T) {
	labtest.Need(t, labtest.Tool("systemd-analyze"))
	text, err := os.ReadFile("../../init/cgtun.service")
	if err != nil {
		t.Fatal(err)
	}
	const program = "/usr/local/sbin/cgtun"
	if n := strings.Count(string(text), "="+program+" "); n != 3 {
		t.Errorf("%s is started in %d lines, want 3", program, n)
	}
	unit := filepath.Join(t.TempDir(), "cgtun.service")
	// verify wants programs that are there.
	if err := os.WriteFile(unit, []byte(strings.ReplaceAll(string(text), program, "/bin/true")), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", unit).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	const threshold = "50" // 5.0
	if out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--threshold="+threshold, unit).CombinedOutput(); err != nil {
		t.Errorf("more exposed than %s: %v\n%s", threshold, err, out)
	}
}
