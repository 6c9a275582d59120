package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
	"cgtun/docker"
	"cgtun/doctor"
	"cgtun/internal/netns"
	"cgtun/steer"
	"cgtun/tun"
)

const doctorLong = `It looks at the kernel, cgroup2, BPF, the tun driver, the firewall, limits, the
configuration and what dead instances left, with and without a daemon. What can
be tried is tried, and taken away again at once. With an error it ends with 1,
with warnings alone with 0.`

// runDoctor looks at the machine and prints what is wrong with it.
func runDoctor(ctx context.Context, c *call) error {
	results := doctor.Run(ctx, doctor.Options{}, c.checks(ctx)...)
	if c.json {
		text, err := json.Marshal(struct {
			Checks []doctor.Result `json:"checks"`
		}{results})
		if err != nil {
			return fmt.Errorf("encode result: %w", err)
		}
		fmt.Fprintf(c.out, "%s\n", text)
	} else {
		doctor.Print(c.out, results)
	}
	if doctor.Worst(results) == doctor.Error {
		return loggedError{errors.New("doctor found an error")}
	}
	return nil
}

// checks lists all checks, for the configuration that a daemon would have. A
// configuration that is not good is a result, and that of an empty file takes
// its place.
func (c *call) checks(ctx context.Context) []doctor.Named {
	p := c.newPatient(ctx)
	all := []doctor.Named{
		{Name: "configuration", Check: p.configuration},
		{Name: "daemon", Check: p.daemon},
		{Name: "kernel", Check: checkKernel},
	}
	var devices []tun.Options
	for _, r := range p.file.Routes() {
		if r.Via.Mode == steer.ViaTun {
			devices = append(devices, tun.Options{Name: r.Tun.Name, Table: uint32(r.Table), Addresses: r.Tun.Address})
		}
	}
	all = append(all, cgroupsel.Checks(selections(p.file.Routes())...)...)
	all = append(all, docker.Checks(dockerMode(p.file.Routes()), selections(p.file.Routes())...)...)
	all = append(all, tun.Checks(p.home, devices...)...)
	var plans []steer.Plan
	for _, r := range attachRoutes(p.file.Routes()) {
		r.Plan.Device = r.Tun.Name
		plans = append(plans, r.Plan)
	}
	all = append(all, steer.Checks(p.home, plans...)...)
	return append(all,
		doctor.Named{Name: "ping", Check: checkPing},
		doctor.Named{Name: "names", Check: checkNames},
		doctor.Named{Name: "leftovers", Check: p.leftovers},
		doctor.Named{Name: "limits", Check: p.limits},
	)
}

// patient is the machine that is looked at, with the cgtun on it.
type patient struct {
	client control.Client
	status *control.Status // nil: no daemon answers
	refuse error           // why
	path   string          // of the configuration; "": there is none
	file   *config.File    // never nil
	bad    error           // why the file at path is not in it
	home   netns.Ref
}

// patienceWithDaemon is how long one that runs may take to say how it is.
const patienceWithDaemon = 5 * time.Second

// newPatient finds daemon and configuration: the file of -c, else that of the
// daemon that answers, else the default one if it is there.
func (c *call) newPatient(ctx context.Context) *patient {
	p := &patient{file: config.Default(), path: c.config}
	if home, err := netns.Home(); err == nil {
		p.home = home
	}
	p.load()
	p.client.Socket = p.file.Control.Socket
	if c.socket != "" {
		p.client.Socket = c.socket
	}
	ctx, cancel := context.WithTimeout(ctx, patienceWithDaemon)
	defer cancel()
	st, _, err := p.client.Status(ctx)
	if err != nil {
		p.refuse = err
	} else {
		p.status = &st
	}
	if p.path != "" {
		return p
	}
	if _, err := os.Stat(config.DefaultPath); !errors.Is(err, fs.ErrNotExist) {
		p.path = config.DefaultPath
	}
	if p.status != nil && p.status.Config != "" {
		p.path = string(p.status.Config)
	}
	p.load()
	return p
}

// load reads the file at path.
func (p *patient) load() {
	if p.path == "" {
		return
	}
	if file, err := config.Load(p.path, nil); err != nil {
		p.bad = err
	} else {
		p.file = file
	}
}

func one(name string, state doctor.State, what, fix string) []doctor.Result {
	return []doctor.Result{{Name: name, State: state, What: what, Fix: fix}}
}

// configuration says whether the file is good. Each mistake is a result.
func (p *patient) configuration(context.Context) []doctor.Result {
	const name = "configuration"
	var mistakes config.Errors
	switch {
	case p.path == "":
		return one(name, doctor.OK, "there is none at "+config.DefaultPath+"; looked at is that of an empty file", "")
	case p.bad == nil:
		if what, fix := exposed(p.file); what != "" {
			return one(name, doctor.Warn, what, fix)
		}
		return one(name, doctor.OK, p.path+" is good", "")
	case errors.As(p.bad, &mistakes):
		var results []doctor.Result
		for _, m := range mistakes {
			results = append(results, one(name, doctor.Error, m.Error(), "mend that line; cgtun check -c "+p.path+" tells when it is good")...)
		}
		return results
	}
	return one(name, doctor.Error, p.bad.Error(), "cgtun check -c "+p.path)
}

// daemon says whether one runs and whether all that is configured is in force.
func (p *patient) daemon(context.Context) []doctor.Result {
	const name = "daemon"
	switch {
	case errors.Is(p.refuse, control.ErrNotRunning):
		return one(name, doctor.OK, fmt.Sprintf("none answers at %s: what follows is about the next start", p.client.Socket), "")
	case errors.Is(p.refuse, context.DeadlineExceeded):
		return one(name, doctor.Error, fmt.Sprintf("somebody listens at %s and says nothing for %v: it hangs, or is stopped", p.client.Socket, patienceWithDaemon),
			"look at its process (ss -xlp), and restart it")
	case p.refuse != nil:
		return one(name, doctor.Warn, p.refuse.Error(), "sudo cgtun doctor, or join the group cgtun")
	}
	s := p.status
	results := one(name, doctor.OK, fmt.Sprintf("instance %d is %s (process %d)", s.Instance, s.State, s.PID), "")
	if s.State == control.Degraded {
		results[0].State = doctor.Warn
		results[0].What += ": something that is configured is not in force"
		results[0].Fix = "see the lines below, and cgtun status"
	}
	for _, a := range s.Attachments {
		if a.State == "failed" || a.State == "gated" || a.Error != "" {
			results = append(results, one("attachment "+a.ID, doctor.Error, fmt.Sprintf("%s: %s", a.State, cmp.Or(string(a.Error), "what is selected there reaches nothing")),
				"mend what is named; the log of the daemon has more")...)
		}
	}
	if n := s.Counters.GateDropsTotal; n > 0 {
		results = append(results, one("gate", doctor.Warn, fmt.Sprintf("%d packets were dropped because their network namespace was not attached: programs in it saw errors", n),
			"see the log of the daemon for what kept it; a machine that is busy all the time needs more CPU")...)
	}
	for _, g := range s.Cgroups {
		if g.Present && !g.Held {
			results = append(results, one("cgroup "+g.Path, doctor.Warn, "it is not held: when it is made again its first packets can pass uncaptured",
				"see what is said of BPF, mend that and restart cgtun")...)
		}
	}
	for _, o := range s.Outbounds {
		if o.State == "down" || o.Error != "" {
			results = append(results, one("outbound "+o.Name, doctor.Warn, strings.TrimSuffix(fmt.Sprintf("it is %s: %s", o.State, o.Error), ": "),
				"see its lines in the configuration: the device and routes, or the account, that they name")...)
		}
	}
	return results
}

// leftovers says what dead instances left in home.
func (p *patient) leftovers(context.Context) []doctor.Result {
	const name = "leftovers"
	if os.Geteuid() != 0 {
		return one(name, doctor.Warn, "not looked at: that needs root", "sudo cgtun doctor")
	}
	dead, err := deadInstances(p.home, p.instance())
	if err != nil {
		return one(name, doctor.Warn, err.Error(), "sudo cgtun doctor")
	}
	var results []doctor.Result
	for _, d := range dead {
		if d.closed {
			results = append(results, one(name, doctor.Error, d.block(), openBlock)...)
			continue
		}
		results = append(results, one(name, doctor.Warn, fmt.Sprintf("instance %s is dead and left %s", d.instance, strings.Join(d.objects, ", ")), "cgtun cleanup")...)
	}
	if len(results) == 0 {
		return one(name, doctor.OK, "no dead instance left anything in this namespace", "")
	}
	return results
}

// instance is the one that answers, "" if none does.
func (p *patient) instance() string {
	if p.status == nil {
		return ""
	}
	return strconv.Itoa(p.status.Instance)
}
