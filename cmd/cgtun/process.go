package main

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
)

// PID implements control.Source.
func (in *instance) PID(pid int) (control.PIDStatus, error) {
	s := control.PIDStatus{PID: pid}
	states, err := in.attachments()
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
	here := capturing(states, st.Ino)
	if len(here) > 0 {
		s.Attachment = control.Text(here[0].ID)
	}
	s.Captured, s.Why = in.captured(cgroup, here)
	return s, nil
}

const whyOwn = "this is cgtun's own cgroup, which is never captured"

// captured says whether a process of a cgroup is captured in a namespace with
// these attachments, and why (not).
func (in *instance) captured(cgroup string, here []attach.State) (bool, string) {
	if self, ok := in.selector.Self(); ok && self.Path == cgroup {
		return false, whyOwn
	}
	selection, selected := in.selector.Selected(cgroup)
	why := fmt.Sprintf("cgroup %q is selected", cgroup)
	if !selected {
		i := slices.IndexFunc(here, func(a attach.State) bool { return a.All })
		if i < 0 {
			return false, fmt.Sprintf("cgroup %q is not selected; see [select] cgroups", cgroup)
		}
		selection = slices.IndexFunc(in.routes(), func(r config.Route) bool { return r.Name == here[i].Route })
		why = fmt.Sprintf("all of network namespace %s is selected", here[i].ID)
	}
	if len(here) == 0 {
		return false, why + ", but its network namespace is not attached"
	}
	route := in.routes()[selection].Name
	for _, a := range here {
		switch {
		case a.State == attach.StateOffline:
			return false, why + ", but its network namespace has no default route: there is nothing to capture"
		case a.Route != route && a.State == attach.StateUp:
		case a.Err != nil:
			return false, fmt.Sprintf("%s, but steering is not in force: %v", why, a.Err)
		case a.State != attach.StateUp:
			return false, why + ", but its network namespace is not attached yet"
		default:
			return true, why
		}
	}
	return false, fmt.Sprintf("%s, but route %q is not attached to its network namespace: its way is in home alone", why, route)
}

// Join implements control.Source.
func (in *instance) Join(peer *control.Peer, cgroup string, direct bool) error {
	states, err := in.attachments()
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
	ino, err := peer.Netns()
	if err != nil {
		return err
	}
	if cgroup == "" {
		if cgroup = in.firstPlain(); cgroup == "" {
			return errors.New("no plain path in [select] cgroups; name a selected cgroup with -cgroup")
		}
	}
	here := capturing(states, ino)
	if len(here) == 0 {
		return fmt.Errorf("the caller's network namespace (inode %d) is not attached", ino)
	}
	if _, selected := in.selector.Selected(cgroup); selected {
		if ok, why := in.captured(cgroup, here); !ok {
			return fmt.Errorf("nothing is captured at the moment: %s", why)
		}
	}
	joined, err := in.selector.Join(cgroup, pidfd)
	if err != nil || joined.Held {
		return err
	}
	return in.awaitSteering(ino, joined)
}

// steeringTime bounds awaitSteering.
const steeringTime = 5 * time.Second

// awaitSteering waits until the steering has a cgroup that was made again: where
// BPF does not mark what its processes send, nft alone does.
func (in *instance) awaitSteering(netnsIno uint64, c cgroupsel.Cgroup) error {
	for end := time.Now().Add(steeringTime); !in.manager.Selects(netnsIno, c.ID); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("cgroup %q is not in force after %v", c.Path, steeringTime)
		}
	}
	return nil
}

// firstPlain is the cgroup that run uses by default, "" if there is none.
func (in *instance) firstPlain() string {
	for _, r := range in.routes() {
		if plain := r.Select.Plain(); len(plain) > 0 {
			return plain[0]
		}
	}
	return ""
}
