package main

import (
	"context"
	"errors"
	"fmt"
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
