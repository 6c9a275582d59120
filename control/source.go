package control

import (
	"context"

	"cgtun/flow"
)

// Source is the daemon, as the socket shows it. All methods are safe for
// concurrent use. An error that is or wraps an *Error sets the exit code of
// the command that asked; any other one means 1.
type Source interface {
	// Status is called for each status request; it does not block for long.
	Status() Status
	// PID tells about one process, by its id in the daemon's pid namespace.
	PID(pid int) (PIDStatus, error)
	// Flows lists the live flows and those that closed lately.
	Flows() []flow.Info
	// Watch calls f for each live flow and then for each change of one, until
	// ctx ends, and returns then. f blocks while its client does not read: no
	// flow may wait for it, and what cannot be kept for it is lost to it.
	Watch(ctx context.Context, f func(flow.Event)) error
	// Explain tells what would become of a flow.
	Explain(context.Context, ExplainRequest) (Explain, error)
	// Reload reads the configuration again, and returns when it is in force
	// or refused.
	Reload(context.Context) error
	// Join moves the peer into a selected cgroup: cgroup, or the first plain
	// one if it is empty. With direct it moves it to where nothing captures
	// it; only root asks for that. When Join returns nil the peer is
	// captured (or is not, with direct): in an attached namespace and in
	// that cgroup.
	Join(peer *Peer, cgroup string, direct bool) error
}

// Error is an error with the exit code of the command that it ends: 1, or 2
// for bad usage and bad configuration.
type Error struct {
	Exit int    `json:"exit"`
	Text string `json:"text"` // may have several lines
}

func (e *Error) Error() string { return e.Text }
