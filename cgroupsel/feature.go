package cgroupsel

import (
	"errors"
	"fmt"
	"slices"
)

// The parts of the kernel that selection uses, best first. Their names are for
// Options.Without, logs and doctor.
const (
	FeatureMkdir     = "cgroup_mkdir program"
	FeatureRoot      = "socket programs at the root of cgroup2"
	FeaturePerCgroup = "socket programs on each selected cgroup"
	FeatureInotify   = "inotify on cgroups"
	FeatureProcess   = "the process in socket programs"
	FeatureNetns     = "the network namespace in socket programs"
	FeatureTasks     = "records of new tasks"
	FeatureHold      = "stopping a task in the kernel"
	FeatureGate      = "egress gate at the root of cgroup2"
	FeaturePin       = "pinned programs"
	FeatureCookie    = "the network namespace in egress programs"
	FeatureFrames    = "egress programs on devices"
	FeatureOptions   = "socket option programs at the root of cgroup2"
	// Without this one (6.13), who is held when cgtun is killed waits for its
	// next start. It is too rare to be told of.
	featureLetGo = "letting go in the kernel"
)

// facts is what a user is told about a feature that is missing.
var facts = map[string]struct{ kernel, lost string }{
	FeatureMkdir:     {"5.5", "a selected cgroup that is made later or again is found by inotify: its first packets can pass uncaptured, and of nested cgroups of two routes the outer one's has both"},
	FeatureRoot:      {"5.8", "a selected cgroup that is made later or again is found by inotify: its first packets can pass uncaptured, and of nested cgroups of two routes the outer one's has both"},
	FeaturePerCgroup: {"5.8", "the firewall alone marks: capture needs a default route, MPTCP subflows and sockets older than their process's move are missed"},
	FeatureInotify:   {"5.15", "selected cgroups that are made later or again, and names of select.netns, are looked for every two seconds"},
	FeatureNetns:     {"5.8", "the firewall alone marks in the namespaces of select.netns: capture needs a default route there"},
	FeatureProcess:   {"6.10", "flows do not tell their process, and rules with `process` do not match"},
	FeatureTasks:     {"5.15", "selected processes in other network namespaces than home and select.netns are not found: what they send is not captured"},
	FeatureHold:      {"5.15", "a selected process can be earlier than the attachment of its network namespace: its first packets are dropped by the gate"},
	FeaturePin:       {"5.8", "with on_exit = \"closed\" nothing is shut in other namespaces than home when cgtun is gone"},
	FeatureFrames:    {"6.6", "selected processes with CAP_NET_RAW can send frames of their own (AF_PACKET) beside cgtun"},
	FeatureOptions:   {"5.3", "selected processes with CAP_NET_RAW can send frames of their own (AF_PACKET with PACKET_QDISC_BYPASS, AF_XDP) beside cgtun"},
	FeatureCookie:    {"6.15", "a socket of a selected process that is older than cgtun is not held back by the gate until it connects"},
	FeatureGate:      {"5.15", "what a selected process sends from a network namespace that is not attached is not dropped"},
}

// errSwitchedOff is why a feature in Options.Without is not used.
var errSwitchedOff = errors.New("switched off")

// FeatureError says which part of the kernel was refused, which version has it
// and what is lost without it. errors.Is sees the kernel's own error.
type FeatureError struct {
	Name   string // one of the Feature constants
	Kernel string // the first version that has it
	Lost   string
	Err    error
}

func (e *FeatureError) Error() string {
	return fmt.Sprintf("%s refused (kernels have it since %s): %v; %s", e.Name, e.Kernel, e.Err, e.Lost)
}

func (e *FeatureError) Unwrap() error { return e.Err }

func featureError(name string, err error) *FeatureError {
	return &FeatureError{Name: name, Kernel: facts[name].kernel, Lost: facts[name].lost, Err: err}
}

// Feature is a part of the kernel that was tried.
type Feature struct {
	Name string
	Err  *FeatureError // nil: it works here
}

// Features lists what was tried, in the order in which it was. A feature that
// a better one made needless is not tried.
func (s *Selector) Features() []Feature {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Feature(nil), s.features...)
}

// missing notes a feature and returns why it is not there, or nil.
func (s *Selector) missing(name string, err error) error {
	if s.note(name, err) {
		return nil
	}
	return featureError(name, err)
}

// note records how the try of a feature ended, and says so if it is news. It
// reports whether the feature is there.
func (s *Selector) note(name string, err error) bool {
	f := Feature{Name: name}
	if err != nil {
		f.Err = featureError(name, err)
	}
	s.mu.Lock()
	i := slices.IndexFunc(s.features, func(old Feature) bool { return old.Name == name })
	news := i < 0 || (s.features[i].Err == nil) != (err == nil)
	if i < 0 {
		s.features = append(s.features, f)
	} else {
		s.features[i] = f
	}
	s.mu.Unlock()
	if err != nil && news {
		s.log.Warn("kernel feature missing", "feature", name, "kernel", f.Err.Kernel, "lost", f.Err.Lost, "err", err)
	}
	return err == nil
}
