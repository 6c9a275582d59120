package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// asProgram in the environment makes the test binary the program itself.
const asProgram = "CGTUN_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	labtest.Main(m)
}

// TestScripts runs testdata/script: what a user types, and all that is
// answered. Two commands are added to those of testscript:
//
//	exits CODE PROGRAM ARG…    the program ends with exactly this code
//	daemon SOCKET              something that answers as a daemon would
func TestScripts(t *testing.T) {
	labtest.Alone(t) // without a daemon the commands say what dead instances block here
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:           "testdata/script",
		UpdateScripts: os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(env *testscript.Env) error {
			bin := filepath.Join(env.WorkDir, "bin")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			env.Setenv("PATH", bin+string(os.PathListSeparator)+env.Getenv("PATH"))
			env.Setenv(asProgram, "1")
			return os.Symlink(self, filepath.Join(bin, "cgtun"))
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "daemon": startDaemon},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG…")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	var status *exec.ExitError
	switch {
	case errors.As(err, &status):
		code = status.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

func startDaemon(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: daemon SOCKET")
	}
	s, err := control.Listen(control.Options{
		Socket: ts.MkAbs(args[0]), Source: painted{}, Log: slog.New(slog.DiscardHandler),
	})
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ts.Defer(func() {
		cancel()
		ts.Check(<-done)
	})
}

// painted is a daemon of which everything is known beforehand.
type painted struct{}

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func (painted) Status() control.Status {
	return control.Status{
		Version: "v1.2.3", PID: 42, Instance: 101, Config: "/etc/cgtun/config.toml", State: control.Ready,
		Since:   control.Time{Time: noon},
		Routes:  []control.Route{{Name: "default", Mark: 101, Mask: 0xffffffff, Table: 101, Priority: 10101, Via: "tun", OnExit: "open"}},
		Cgroups: []control.CgroupStatus{{Path: "/cgtun", ID: 77, Present: true, Held: true}, {Path: "/late"}},
		Attachments: []control.Attachment{{
			ID: "home", NetnsIno: 4026531840, Route: "default", Device: "tun0", Address: []string{"198.18.0.1/32", "fd00:101::1/128"},
			Capture: "tun", State: "up", V4: true, V6: true, Flows: 1, UpBytes: 1500, DownBytes: 3 << 20, Since: control.Time{Time: noon},
		}},
		Outbounds: []control.Outbound{{Name: "direct", Type: "direct", State: "up", DialsTotal: 3, FailuresTotal: 1, UpBytes: 1500, DownBytes: 3 << 20}},
		Counters:  control.Counters{FlowsTotal: 3, FlowsLive: 1, RefusedTotal: 1},
		Limits:    control.Limits{Nofile: 1024, MemoryBytes: 256 << 20},
		Missing:   control.List[control.Missing]{{Feature: "pinned programs", Kernel: "5.8", Lost: "what they are for", Error: "not permitted"}},
	}
}

func (painted) PID(pid int) (control.PIDStatus, error) {
	switch pid {
	case 42:
		return control.PIDStatus{PID: pid, Cgroup: "/cgtun", NetnsIno: 4026531840, Attachment: "home", Captured: true, Why: "its cgroup is selected"}, nil
	case 43:
		return control.PIDStatus{PID: pid, Cgroup: "/", Why: "its cgroup is not selected"}, nil
	}
	return control.PIDStatus{}, fmt.Errorf("there is no process %d", pid)
}

// hostile is a name as a client may send it.
const hostile = "a\x1b[31m.example"

func (painted) Flows() []flow.Info {
	name, from, cgroup, process, use, reason := hostile, "sni", "/cgtun", "curl", "direct", "refused"
	pid, uid, rule := 42, uint32(1000), 2
	src := netip.MustParseAddrPort("198.18.0.1:40000")
	return []flow.Info{
		{
			ID: 7, Proto: "tcp", Src: src, Dst: netip.MustParseAddrPort("192.0.2.1:443"), Name: &name, NameFrom: &from, Attachment: "home",
			Cgroup: &cgroup, PID: &pid, Process: &process, UID: &uid, Rule: &rule, Use: &use, Path: []string{"direct"}, State: flow.StateOpen,
			UpBytes: 1500, DownBytes: 3 << 20, Start: noon, AgeMS: 61_234,
		},
		{
			ID: 8, Proto: "udp", Src: src, Dst: netip.MustParseAddrPort("[2001:db8::1]:53"), Attachment: "home", Path: []string{},
			State: flow.StateClosed, Reason: &reason, Start: noon, AgeMS: 12,
		},
	}
}

func (p painted) Watch(ctx context.Context, emit func(flow.Event)) error {
	for i, f := range p.Flows() {
		emit(flow.Event{Event: []string{flow.EventOpen, flow.EventClose}[i], Flow: f})
	}
	<-ctx.Done()
	return nil
}

func (painted) Explain(_ context.Context, q control.ExplainRequest) (control.Explain, error) {
	if strings.HasPrefix(q.Host, "nowhere") {
		return control.Explain{}, fmt.Errorf("%s has no address", q.Host)
	}
	e := control.Explain{Host: q.Host, Proto: q.Proto, Cgroup: "/cgtun", Addresses: []string{"192.0.2.1"}, Captured: true, Why: "the cgroup is selected"}
	if q.Cgroup != "" {
		e.Cgroup = control.Text(q.Cgroup)
	}
	if q.Port == 0 {
		e.Needs = "name"
		return e, nil
	}
	rule, line := 2, 17
	e.Port, e.Rule, e.Line, e.Use, e.Path = &q.Port, &rule, &line, "auto", []string{"uplink-a", "relay"}
	return e, nil
}

func (painted) Reload(context.Context) error { return errors.New("reload: nothing is changed") }

// Join moves nobody: what run does afterwards is what is looked at here.
func (painted) Join(_ *control.Peer, cgroup string, _ bool) error {
	if cgroup == "/unselected" {
		return fmt.Errorf("cgroup %s is not selected", cgroup)
	}
	return nil
}
