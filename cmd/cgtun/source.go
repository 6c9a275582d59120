package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/cgroupsel"
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
		Version: version(), PID: os.Getpid(), Instance: in.route.Table, Config: control.Text(in.file.Name),
		State: in.state.Load().(control.State), Since: control.Time{Time: in.since},
		Routes: control.List[control.Route]{{
			Name: in.route.Name, Mark: in.route.Mark, Mask: in.route.Mask, Table: in.route.Table,
			Priority: in.route.Priority, Via: in.route.Via.String(), OnExit: in.route.OnExit,
		}},
		Counters: control.Counters{
			FlowsTotal: counters.FlowsTotal, FlowsLive: counters.FlowsLive,
			RefusedTotal: counters.RefusedTotal, DeniedTotal: counters.DeniedTotal,
		},
		Limits: in.limits,
	}
	stats := in.router.Outbounds()
	var up, down uint64
	for _, o := range in.outbounds {
		state := "up"
		if ok, _ := o.State(); !ok {
			state = "down"
		}
		n := stats[o.Name()]
		up, down = up+n.UpBytes, down+n.DownBytes
		s.Outbounds = append(s.Outbounds, control.Outbound{
			Name: o.Name(), Type: o.kind, State: state, ConnectMS: n.ConnectMS,
			DialsTotal: n.DialsTotal, FailuresTotal: n.FailuresTotal, UpBytes: n.UpBytes, DownBytes: n.DownBytes,
		})
	}
	if in.selector == nil || in.manager == nil {
		return s
	}
	degraded := false
	for _, c := range in.selector.Snapshot().Cgroups {
		degraded = degraded || !c.Present
		s.Cgroups = append(s.Cgroups, control.CgroupStatus{Path: c.Path, ID: control.ID(c.ID), Present: c.Present, Held: c.Held})
	}
	if a := in.manager.State(); a != nil {
		degraded = degraded || a.Err != nil
		s.Counters.TurnedAwayTotal = in.turnedAway(a, counters)
		s.Attachments = append(s.Attachments, in.attachment(a, int(counters.FlowsLive), up, down))
	}
	if degraded && s.State == control.Ready {
		s.State = control.Degraded
	}
	return s
}

func (in *instance) attachment(a *attach.State, live int, up, down uint64) control.Attachment {
	c := control.Attachment{
		ID: a.ID, NetnsIno: control.ID(a.NetnsIno), Route: in.route.Name, Device: control.Text(a.Device),
		Capture: "tun", State: "up", V4: true, V6: a.V6,
		Flows: live, UpBytes: up, DownBytes: down, Since: control.Time{Time: a.Since},
	}
	for _, p := range a.Addresses {
		c.Address = append(c.Address, p.String())
	}
	if a.Err != nil {
		c.State, c.Error = "failed", control.Text(a.Err.Error())
	}
	return c
}

// turnedAway gathers what the parts count of what they did not serve. The names
// are in docs/cli.md.
func (in *instance) turnedAway(a *attach.State, flows router.Counters) control.Counts {
	cgroups := in.selector.Counters()
	c := control.Counts{
		"guard": a.Dropped.Guard, "not_local": a.Dropped.Spoof, "stray": a.Dropped.Stray,
		"udp_peers": flows.PeersEvicted, "events": flows.EventsLost, "closed_flows": flows.ClosedForgotten, "panics": flows.PanicsTotal,
		"cgroups": cgroups.Full + cgroups.Unread, "marks": cgroups.Refused,
	}
	clients := in.server.Stats()
	c["clients"] = clients.Denied + clients.Full + clients.Bad + clients.Lagging
	s := in.stack.Load()
	if s == nil {
		return c
	}
	n := s.Stats()
	c["not_local"] += n.NotLocal
	c["malformed"], c["bad_checksum"] = n.Malformed+n.UDP.Malformed, n.BadChecksum+n.UDP.BadSum
	c["multicast"], c["other_protocol"], c["icmp"] = n.Multicast, n.OtherProtocol, n.ICMP
	c["unwritten"], c["icmp_rate"] = n.Unwritten+n.UDP.Unwritten, n.ICMPErrorsLimited+n.UDP.ICMPLimit
	c["late_syn"], c["receive_cut"] = n.LateSYN, n.Cut
	c["odd_syn"], c["udp_queue"], c["udp_sessions"] = n.OddSYN, n.UDP.QueueFull, n.UDP.Evicted
	c["pending"], c["pending_source"], c["pending_destination"] = n.Evicted, n.EvictedSource, n.EvictedDest
	return c
}

// Flows implements control.Source.
func (in *instance) Flows() []flow.Info { return in.router.Flows() }

// Watch implements control.Source.
func (in *instance) Watch(ctx context.Context, f func(flow.Event)) error {
	in.router.Watch(ctx, f)
	return nil
}

// Reload implements control.Source.
func (in *instance) Reload(context.Context) error {
	return &control.Error{Exit: 1, Text: "reload: not in this version; restart cgtun to apply a changed file"}
}

// errNotUp is the answer before everything is in force and after it.
var errNotUp = &control.Error{Exit: 1, Text: "cgtun is starting or stopping; try again when it is ready"}

// home returns the state of home's attachment when processes are captured.
func (in *instance) home() (*attach.State, error) {
	if in.state.Load() != control.Ready {
		return nil, errNotUp
	}
	a := in.manager.State()
	if a == nil {
		return nil, errNotUp
	}
	return a, nil
}

const whyOwn = "this is cgtun's own cgroup, which is never captured"

// PID implements control.Source.
func (in *instance) PID(pid int) (control.PIDStatus, error) {
	s := control.PIDStatus{PID: pid}
	home, err := in.home()
	if err != nil {
		return s, err
	}
	cgroup, err := cgroupsel.CgroupOf(pid)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return s, fmt.Errorf("there is no process %d", pid)
	}
	if err != nil {
		return s, err
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &st); err != nil {
		return s, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	s.Cgroup, s.NetnsIno = control.Text(cgroup), control.ID(st.Ino)
	self, haveSelf := in.selector.Self()
	switch {
	case st.Ino == home.NetnsIno:
		s.Attachment = attach.Home
	case in.selects(cgroup):
		s.Why = fmt.Sprintf("cgroup %q is selected, but the process is in another network namespace than cgtun, and this version attaches to its own alone", cgroup)
		return s, nil
	}
	switch {
	case haveSelf && self.Path == cgroup:
		s.Why = whyOwn
	case !in.selects(cgroup):
		s.Why = fmt.Sprintf("cgroup %q is not selected; see [select] cgroups", cgroup)
	case home.Err != nil:
		s.Why = fmt.Sprintf("cgroup %q is selected, but steering is not in force: %v", cgroup, home.Err)
	default:
		s.Captured, s.Why = true, fmt.Sprintf("cgroup %q is selected", cgroup)
	}
	return s, nil
}

// Join implements control.Source.
func (in *instance) Join(peer *control.Peer, cgroup string, direct bool) error {
	home, err := in.home()
	if err != nil {
		return err
	}
	pidfd, err := peer.Pidfd()
	if err != nil {
		return err
	}
	defer pidfd.Close()
	if direct {
		return in.selector.Leave(pidfd)
	}
	if home.Err != nil {
		return fmt.Errorf("nothing is captured at the moment: %w", home.Err)
	}
	ino, err := peer.Netns()
	if err != nil {
		return err
	}
	if ino != home.NetnsIno {
		return fmt.Errorf("the caller's network namespace (inode %d) is not attached; cgtun runs in that with inode %d", ino, home.NetnsIno)
	}
	if cgroup == "" {
		plain := in.route.Select.Plain()
		if len(plain) == 0 {
			return errors.New("no plain path in [select] cgroups; name a selected cgroup with -cgroup")
		}
		cgroup = plain[0]
	}
	_, err = in.selector.Join(cgroup, pidfd)
	return err
}

func (in *instance) selects(cgroup string) bool {
	_, ok := in.selector.Selected(cgroup)
	return ok
}

// Explain implements control.Source.
func (in *instance) Explain(ctx context.Context, q control.ExplainRequest) (control.Explain, error) {
	e := control.Explain{Host: q.Host, Proto: q.Proto, Cgroup: control.Text(q.Cgroup)}
	home, err := in.home()
	if err != nil {
		return e, err
	}
	if plain := in.route.Select.Plain(); q.Cgroup == "" && len(plain) > 0 {
		e.Cgroup = control.Text(plain[0])
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
	if !in.selects(string(e.Cgroup)) {
		e.Why = fmt.Sprintf("cgroup %q is not selected; see [select] cgroups", string(e.Cgroup))
		return e, nil
	}
	// The first address is the one that a client tries first.
	for _, p := range home.Bypass {
		if p.Contains(addrs[0]) {
			e.Why = fmt.Sprintf("%s is in %s, which is bypassed: loopback, link-local, multicast, connected, or in [select] bypass", addrs[0], p)
			return e, nil
		}
	}
	e.Captured, e.Why = true, fmt.Sprintf("cgroup %q is selected, and %s is not bypassed", string(e.Cgroup), addrs[0])
	in.explainRule(&e, proto, netip.AddrPortFrom(addrs[0], q.Port))
	return e, nil
}

func (in *instance) explainRule(e *control.Explain, proto flow.Proto, dst netip.AddrPort) {
	facts := &rules.Facts{
		Flow:  &flow.Flow{Proto: proto, Src: in.sourceTo(dst.Addr()), Dst: dst, Attachment: attach.Home},
		Owner: &flow.Owner{Cgroup: string(e.Cgroup)}, Known: rules.FactCgroup,
	}
	verdict, missing, path := in.router.Explain(facts)
	if missing != 0 {
		owner := control.Text("owner")
		e.Needs = owner
		return
	}
	e.Use, e.Path = control.Text(verdict.Use), path
	if verdict.Rule > 0 {
		e.Rule, e.Line = &verdict.Rule, &verdict.Line
	}
}

// sourceTo is the address that the kernel gives to a captured socket that
// connects to dst and was not bound before; the zero value: it has none. No
// packet is sent.
func (in *instance) sourceTo(dst netip.Addr) netip.AddrPort {
	mark := func(_, _ string, c syscall.RawConn) (err error) {
		errControl := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(in.route.Mark&in.route.Mask))
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
