package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// owners asks the manager, which is made after the router.
type owners struct{ *instance }

func (o owners) Owner(ctx context.Context, f *flow.Flow) (*flow.Owner, error) {
	return o.manager.Owner(ctx, f)
}

// Status implements control.Source.
func (in *instance) Status() control.Status {
	counters := in.router.Counters()
	s := control.Status{
		Version: version(), PID: os.Getpid(), Instance: in.routes()[0].Table, Config: control.Text(in.first.Name),
		State: in.state.Load().(control.State), Since: control.Time{Time: in.since},
		Counters: control.Counters{
			FlowsTotal: counters.FlowsTotal, FlowsLive: counters.FlowsLive,
			RefusedTotal: counters.RefusedTotal, DeniedTotal: counters.DeniedTotal, AcceptedFirstTotal: counters.AcceptedFirst, HiddenTotal: in.hiddenStatus(),
		},
		Limits: control.Limits{Nofile: in.nofile, MemoryBytes: uint64(in.file().Limits.Memory)},
	}
	for _, r := range in.routes() {
		s.Routes = append(s.Routes, control.Route{
			Name: r.Name, Mark: r.Mark, Mask: r.Mask, Table: r.Table,
			Priority: r.Priority, Via: r.Via.String(), OnExit: r.OnExit,
		})
	}
	s.Outbounds, s.Groups = in.outboundStatus(), in.groupStatus()
	if in.selector == nil || in.manager == nil {
		return s
	}
	degraded := false
	for _, c := range in.selector.Snapshot().Cgroups {
		degraded = degraded || !c.Present
		s.Cgroups = append(s.Cgroups, control.CgroupStatus{Path: c.Path, ID: control.ID(c.ID), Present: c.Present, Held: c.Held})
	}
	for _, f := range in.selector.Features() {
		if f.Err != nil {
			s.Missing = append(s.Missing, control.Missing{Feature: f.Name, Kernel: f.Err.Kernel, Lost: f.Err.Lost, Error: control.Text(fmt.Sprint(f.Err.Err))})
		}
	}
	s.Docker = in.dockerStatus()
	for _, d := range s.Docker {
		degraded = degraded || d.Error != ""
	}
	states, flows, selected := in.manager.States(), in.router.Attachments(), in.selector.Counters()
	s.Counters.GateDropsTotal = selected.GateDrops
	s.Counters.TurnedAwayTotal = in.turnedAway(states, counters, selected)
	for _, a := range states {
		degraded = degraded || a.Err != nil
		s.Attachments = append(s.Attachments, attachmentStatus(&a, flows[a.ID]))
	}
	if degraded && s.State == control.Ready {
		s.State = control.Degraded
	}
	return s
}

// attachmentStatus shows one attachment. Where a namespace has several, the
// flows of all are counted together; where the kernel routes there are none of
// ours.
func attachmentStatus(a *attach.State, flows router.AttachmentStats) control.Attachment {
	if a.Kernel {
		flows = router.AttachmentStats{}
	}
	c := control.Attachment{
		ID: a.ID, NetnsIno: control.ID(a.NetnsIno), Netns: control.Text(a.Netns), Container: control.Text(a.Container),
		Route: control.Text(a.Route), Device: control.Text(a.Device), Capture: "tun", State: a.State, V4: a.V4, V6: a.V6,
		Flows: flows.FlowsLive, UpBytes: flows.UpBytes, DownBytes: flows.DownBytes, Since: control.Time{Time: a.Since},
	}
	if a.Kernel {
		c.Capture = "kernel"
	}
	for _, p := range a.Addresses {
		c.Address = append(c.Address, p.String())
	}
	if a.Err != nil {
		c.Error = control.Text(a.Err.Error())
	}
	return c
}

// turnedAway gathers what the parts count of what they did not serve. The names
// are in docs/cli.md.
func (in *instance) turnedAway(states []attach.State, flows router.Counters, selected cgroupsel.Counters) control.Counts {
	c := control.Counts{
		"udp_peers": flows.PeersEvicted, "dials": flows.DialsEvicted, "idle": flows.StreamsShed, "owners": flows.OwnersFailed, "events": flows.EventsLost, "closed_flows": flows.ClosedForgotten, "panics": flows.PanicsTotal,
		"cgroups": selected.Full + selected.Unread, "marks": selected.Refused, "guard": selected.GuardDrops, "frames": selected.Frames,
		"namespaces": selected.Late + selected.Excess, "tasks": selected.Lost,
	}
	for kind, n := range in.router.Denials() {
		if kind != "rule" {
			c["policy"] += n
		}
	}
	queries := in.resolver.Counters()
	c["queries"], c["answers"] = queries.Dropped, queries.Strange
	in.stacks.addTo(c)
	for _, a := range states {
		c["guard"] += a.Dropped.Guard
		c["not_local"] += a.Dropped.Spoof
		c["stray"] += a.Dropped.Stray
	}
	clients := in.server.Stats()
	c["clients"] = clients.Denied + clients.Full + clients.Bad + clients.Lagging
	return c
}

// Flows implements control.Source.
func (in *instance) Flows() []flow.Info { return in.router.Flows() }

// Watch implements control.Source.
func (in *instance) Watch(ctx context.Context, f func(flow.Event)) error {
	in.router.Watch(ctx, f)
	return nil
}

// errNotUp is the answer before everything is in force and after it.
var errNotUp = &control.Error{Exit: 1, Text: "cgtun is starting or stopping; try again when it is ready"}

// attachments returns the states of all attachments when processes are captured.
func (in *instance) attachments() ([]attach.State, error) {
	if in.state.Load() != control.Ready {
		return nil, errNotUp
	}
	states := in.manager.States()
	if len(states) == 0 {
		return nil, errNotUp
	}
	return states, nil
}

// Explain implements control.Source.
func (in *instance) Explain(ctx context.Context, q control.ExplainRequest) (control.Explain, error) {
	e := control.Explain{Host: q.Host, Proto: q.Proto, Cgroup: control.Text(q.Cgroup)}
	states, err := in.attachments()
	if err != nil {
		return e, err
	}
	if q.Cgroup == "" {
		e.Cgroup = control.Text(in.firstPlain())
	}
	if q.Port != 0 {
		e.Port = &q.Port
	}
	proto, err := protoOf(q.Proto)
	if err != nil {
		return e, err
	}
	e.Proto = proto.String()
	addrs, err := lookUp(ctx, q.Host)
	if err != nil {
		return e, err
	}
	for _, a := range addrs {
		e.Addresses = append(e.Addresses, a.String())
	}
	if self, ok := in.selector.Self(); ok && self.Path == string(e.Cgroup) {
		e.Why = whyOwn
		return e, nil
	}
	selection, selected := in.selector.Selected(string(e.Cgroup))
	from, what := attach.Home, fmt.Sprintf("cgroup %q", string(e.Cgroup))
	if e.Cgroup == "" {
		selection, from, what = in.withoutCgroup()
		selected = what != ""
	}
	switch {
	case !selected && e.Cgroup == "":
		e.Why = "[select] cgroups has no plain path to speak of; name a cgroup with -cgroup"
		return e, nil
	case !selected:
		e.Why = what + " is not selected; see [select] cgroups"
		return e, nil
	}
	// The first address is the one that a client tries first.
	home := states[selection]
	for _, p := range home.Bypass {
		if p.Contains(addrs[0]) {
			e.Why = fmt.Sprintf("%s is in %s, which is bypassed: loopback, link-local, multicast, connected, or in [select] bypass", addrs[0], p)
			return e, nil
		}
	}
	e.Captured, e.Why = true, fmt.Sprintf("%s is selected, and %s is not bypassed", what, addrs[0])
	f := &flow.Flow{Proto: proto, Dst: netip.AddrPortFrom(addrs[0], q.Port), Attachment: from}
	if e.Cgroup != "" {
		f.Src = sourceTo(&in.routes()[selection], addrs[0])
	}
	in.explainRule(&e, f)
	return e, nil
}

// withoutCgroup says what is selected, by which route and as which attachment's,
// where it is no cgroup; "" is nothing.
func (in *instance) withoutCgroup() (selection int, from, what string) {
	for i, r := range in.routes() {
		switch {
		case len(r.Select.Netns) > 0:
			return i, filepath.Base(r.Select.Netns[0]), fmt.Sprintf("all of network namespace %q", r.Select.Netns[0])
		case len(r.Select.Interfaces) > 0:
			return i, attach.Home, fmt.Sprintf("what comes in through %q", r.Select.Interfaces[0])
		}
	}
	return 0, "", ""
}

func (in *instance) explainRule(e *control.Explain, f *flow.Flow) {
	facts := &rules.Facts{Flow: f}
	if e.Cgroup != "" {
		facts.Owner, facts.Known = &flow.Owner{Cgroup: string(e.Cgroup)}, rules.FactCgroup
	}
	if f.Proto == flow.ICMP {
		facts.Owner, facts.Known = nil, rules.FactOwner // nobody knows whose a ping is
	}
	if _, err := netip.ParseAddr(e.Host); err != nil {
		facts.Name, facts.Known = strings.ToLower(strings.TrimSuffix(e.Host, ".")), facts.Known|rules.FactName
	}
	verdict, missing, path, err := in.router.Explain(facts)
	switch {
	case missing == rules.FactName:
		e.Needs = "name"
		return
	case missing != 0:
		e.Needs = "owner"
		return
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		e.Why += fmt.Sprintf("; refused: %v", err)
	case err != nil:
		e.Why += fmt.Sprintf("; refused: %v; see [policy] allow", err)
	}
	if from := *f; err == nil && from.Attachment == attach.Home {
		// What home's own processes may, those of containers may not.
		from.Attachment = ""
		if _, _, _, err := in.router.Explain(&rules.Facts{Flow: &from, Owner: facts.Owner, Name: facts.Name, Known: facts.Known}); err != nil {
			e.Why += fmt.Sprintf("; refused from other namespaces than home: %v", err)
		}
	}
	e.Use, e.Path = control.Text(verdict.Use), path
	if err == nil {
		in.explainGroup(e, f)
	}
	if verdict.Rule > 0 {
		e.Rule, e.Line = &verdict.Rule, &verdict.Line
	}
}

// sourceTo is the address that the kernel gives to a captured socket that
// connects to dst and was not bound before; the zero value: it has none. No
// packet is sent.
func sourceTo(route *config.Route, dst netip.Addr) netip.AddrPort {
	mark := func(_, _ string, c syscall.RawConn) (err error) {
		errControl := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(route.Mark&route.Mask))
		})
		return errors.Join(err, errControl)
	}
	const discard = 9 // connect(2) wants a port
	d := net.Dialer{Control: mark}
	c, err := d.Dial("udp", netip.AddrPortFrom(dst, discard).String())
	if err != nil {
		return netip.AddrPort{}
	}
	defer c.Close()
	return netip.AddrPortFrom(c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), 0)
}

func protoOf(name string) (flow.Proto, error) {
	for _, p := range []flow.Proto{flow.TCP, flow.UDP, flow.ICMP} {
		if p.String() == name {
			return p, nil
		}
	}
	if name == "" {
		return flow.TCP, nil
	}
	return 0, &control.Error{Exit: 2, Text: fmt.Sprintf("protocol %q is unknown; allowed: tcp, udp, icmp", name)}
}

// lookUp resolves as the host does; the result is never empty.
func lookUp(ctx context.Context, name string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{a.Unmap().WithZone("")}, nil // no prefix contains one with a zone
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return nil, fmt.Errorf("look up %q: %w", name, err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, nil
}
