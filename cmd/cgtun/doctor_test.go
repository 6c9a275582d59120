package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cgtun/control"
	"cgtun/doctor"
)

// What a daemon says of itself becomes results, the bad ones with their fix.
func TestDoctorTellsWhatTheDaemonSays(t *testing.T) {
	status := painted{}.Status()
	status.State = control.Degraded
	status.Attachments = append(status.Attachments,
		control.Attachment{ID: "lab1", State: "failed", Error: "mark 0x65 is taken"}, control.Attachment{ID: "lab2", State: "gated"}, control.Attachment{ID: "lab3", State: "offline"})
	status.Cgroups = append(status.Cgroups, control.CgroupStatus{Path: "/loose", ID: 78, Present: true})
	status.Outbounds = append(status.Outbounds, control.Outbound{Name: "b", State: "down"})
	status.Counters.GateDropsTotal = 7
	p := &patient{status: &status}
	var got []string
	for _, r := range p.daemon(t.Context()) {
		got = append(got, fmt.Sprintf("%s %s", r.State, r.Name))
		if (r.State == doctor.OK) != (r.Fix == "") {
			t.Errorf("a result that is well has no fix, and another one has: %+v", r)
		}
	}
	const want = "warn daemon; error attachment lab1; error attachment lab2; warn gate; warn cgroup /loose; warn outbound b"
	if all := strings.Join(got, "; "); all != want {
		t.Errorf("got %s, want %s", all, want)
	}
	for state, err := range map[doctor.State]error{
		doctor.OK:    fmt.Errorf("%w at /s", control.ErrNotRunning),
		doctor.Warn:  errors.New("needs root or group cgtun"),
		doctor.Error: fmt.Errorf("ask: %w", context.DeadlineExceeded),
	} {
		p := &patient{refuse: err}
		if r := p.daemon(t.Context()); len(r) != 1 || r[0].State != state {
			t.Errorf("%v: %+v", err, r)
		}
	}
}

// A file that others can change, or with a password that they can read, is a warning,
// and the password is not repeated.
func TestDoctorSeesWhatOthersCanReadOrChange(t *testing.T) {
	const outbound = "[[outbound]]\nname = 'a'\ntype = 'http'\nserver = '192.0.2.1:3128'\nusername = 'u'\n"
	for _, tt := range []struct {
		line string
		mode os.FileMode
		want doctor.State
	}{
		{"password = 'hunter2'", 0o644, doctor.Warn},
		{"password = 'hunter2'", 0o640, doctor.Warn},
		{"password = 'hunter2'", 0o600, doctor.OK},
		{"password_env = 'X'", 0o644, doctor.OK},
		{"password_env = 'X'", 0o646, doctor.Warn},
	} {
		p := &patient{path: filepath.Join(t.TempDir(), "f.toml")}
		if err := errors.Join(os.WriteFile(p.path, []byte(outbound+tt.line), 0o600), os.Chmod(p.path, tt.mode)); err != nil {
			t.Fatal(err)
		}
		p.load()
		r := p.configuration(t.Context())
		if len(r) != 1 || r[0].State != tt.want || strings.Contains(fmt.Sprint(r), "hunter2") {
			t.Errorf("%s with mode %04o: %+v", tt.line, tt.mode, r)
		}
	}
}
