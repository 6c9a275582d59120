package main_test

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

func init() { probes["linger"] = linger }

// linger connects, and stays so for a while.
func linger(q probe) error {
	c, err := probeDialer(q).Dial("tcp", q.To)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = os.Stdout.WriteString("ready\n")
	time.Sleep(10 * time.Minute)
	return err
}

// TestNamesOfHostileProgramsAreShownSafely: what a program calls itself and its
// cgroup reaches the terminal of whoever looks, and the log.
func TestNamesOfHostileProgramsAreShownSafely(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	d := w.start(w.config(second))
	const nasty = "x😀\x1b[2J\x1b]0;owned\x07%s%n\\\"\u202e\u009b31m"
	cgroup := filepath.Join(w.sel.Dir, nasty)
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	// A kernel takes no newline in the name of a cgroup; of a file it does.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 200), strings.Repeat("e", 200))
	program := filepath.Join(dir, nasty+"\nforged line")
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	copied, err := os.OpenFile(program, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(copied, self); err != nil {
		t.Fatal(err)
	}
	if err := copied.Close(); err != nil {
		t.Fatal(err)
	}
	args := probeArgs(probe{Do: "linger", To: port(far4, 7000), Wait: 10 * time.Second})
	cmd := w.command(t.Context(), inside, "sh", "-c", `echo $$ > "$0/cgroup.procs" && exec env "$@"`, cgroup, args[0], program)
	p := w.lab.StartCommand(cmd)
	p.WaitOutput("ready", patience())

	var found *flow.Info
	for _, f := range w.flows() {
		if f.Dst.String() == port(far4, 7000) {
			found = &f
		}
	}
	if found == nil || found.Process == nil || *found.Process != program || found.Cgroup == nil || filepath.Base(*found.Cgroup) != nasty {
		t.Fatalf("the flow, and whose it is: %+v", found)
	}
	if s := ask[control.PIDStatus](w, "status", strconv.Itoa(*found.PID)); !strings.Contains(string(s.Cgroup), nasty) {
		t.Errorf("status of the process: %+v", s)
	}
	safe := func(what, text string) {
		t.Helper()
		if text == "" {
			t.Errorf("%s is empty", what)
		}
		for i, r := range text {
			if r != '\n' && (r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u202e') {
				t.Errorf("%s has %q: %q", what, r, text[max(0, i-40):min(len(text), i+40)])
				break
			}
		}
		if strings.Contains(text, "\nforged line") {
			t.Errorf("%s has a forged line", what)
		}
	}
	for _, command := range []string{"flows", "status", "status " + strconv.Itoa(*found.PID), "explain " + far4} {
		out, errs, _ := w.cgtun(strings.Fields(command)...)
		safe(command, out+errs)
		out, errs, _ = w.cgtun(append(strings.Fields(command), "--json")...)
		safe(command+" --json", out+errs)
	}
	follow := w.lab.StartCommand(w.machine.Command(t.Context(), w.program(), "-s", w.socket, "flows", "-f"))
	follow.WaitOutput("7000", patience())
	safe("flows -f", follow.Output())
	p.Signal(syscall.SIGKILL)
	_ = p.Wait()
	labtest.Eventually(t, 10*time.Second, func() bool { return strings.Contains(d.Output(), "flow ended") }, "the end is in the log")
	safe("the log", d.Output())
	if err := os.Remove(cgroup); err != nil {
		t.Error(err)
	}
}
