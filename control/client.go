package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// request is what a client sends.
type request struct {
	Command string          `json:"command"` // status, pid, flows, watch, explain, reload, join
	PID     int             `json:"pid,omitempty"`
	Explain *ExplainRequest `json:"explain,omitempty"`
	Cgroup  string          `json:"cgroup,omitempty"`
	Direct  bool            `json:"direct,omitempty"`
}

// reply is what comes back: one of the two.
type reply struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"`
}

// ErrNotRunning says that no daemon answers at the socket.
var ErrNotRunning = errors.New("no daemon answers")

// Client asks the daemon at a socket, with a connection for each question. It
// needs no closing and is safe for concurrent use. What the daemon refused is
// an *Error; ErrNotRunning: nobody listens there.
type Client struct {
	Socket string // path; DefaultSocket if empty
}

// Status asks for the daemon's status, and returns it as JSON too, as the
// daemon sent it.
func (c Client) Status(ctx context.Context) (Status, json.RawMessage, error) {
	return ask[Status](ctx, c, request{Command: "status"})
}

// PID asks about one process.
func (c Client) PID(ctx context.Context, pid int) (PIDStatus, json.RawMessage, error) {
	return ask[PIDStatus](ctx, c, request{Command: "pid", PID: pid})
}

// Flows asks for the flows.
func (c Client) Flows(ctx context.Context) (FlowList, json.RawMessage, error) {
	return ask[FlowList](ctx, c, request{Command: "flows"})
}

// Explain asks what would become of a flow.
func (c Client) Explain(ctx context.Context, q ExplainRequest) (Explain, json.RawMessage, error) {
	return ask[Explain](ctx, c, request{Command: "explain", Explain: &q})
}

// Reload makes the daemon read its configuration again, and waits for it.
func (c Client) Reload(ctx context.Context) error {
	_, _, err := ask[struct{}](ctx, c, request{Command: "reload"})
	return err
}

// Join has the daemon move the calling process into a selected cgroup, or out
// of all with direct. nil: it is there.
func (c Client) Join(ctx context.Context, cgroup string, direct bool) error {
	_, _, err := ask[struct{}](ctx, c, request{Command: "join", Cgroup: cgroup, Direct: direct})
	return err
}

// Watch calls f for each change of a flow until ctx ends (nil), f fails, or
// the daemon goes.
func (c Client) Watch(ctx context.Context, f func(flow.Event, json.RawMessage) error) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := json.NewEncoder(conn).Encode(request{Command: "watch"}); err != nil {
		return fmt.Errorf("ask daemon: %w", err)
	}
	dec := json.NewDecoder(conn)
	for {
		raw, err := result(dec)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		var e flow.Event
		if err := json.Unmarshal(raw, &e); err != nil {
			return fmt.Errorf("understand daemon: %w", err)
		}
		if err := f(e, raw); err != nil {
			return err
		}
	}
}

// ask puts one question and decodes the answer.
func ask[T any](ctx context.Context, c Client, q request) (answer T, raw json.RawMessage, err error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return answer, nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	// A daemon that turns the client away may do so before it has read the
	// question: the answer is then there although the write failed.
	writeErr := json.NewEncoder(conn).Encode(q)
	raw, err = result(json.NewDecoder(conn))
	switch {
	case ctx.Err() != nil:
		return answer, nil, ctx.Err()
	case err != nil && writeErr != nil:
		var refused *Error
		if !errors.As(err, &refused) {
			err = fmt.Errorf("ask daemon: %w", writeErr)
		}
		return answer, nil, err
	case err != nil:
		return answer, nil, err
	}
	if err := json.Unmarshal(raw, &answer); err != nil {
		return answer, nil, fmt.Errorf("understand daemon: %w", err)
	}
	return answer, raw, nil
}

// result reads one reply.
func result(dec *json.Decoder) (json.RawMessage, error) {
	var r reply
	err := dec.Decode(&r)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET):
		return nil, errors.New("the daemon closed the connection")
	case err != nil:
		return nil, fmt.Errorf("understand daemon: %w", err)
	case r.Error != nil:
		return nil, r.Error
	}
	return r.Result, nil
}

func (c Client) dial(ctx context.Context) (net.Conn, error) {
	path := c.Socket
	if path == "" {
		path = DefaultSocket
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("control socket %s: needs root or group cgtun", path)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%w at %s", ErrNotRunning, path)
	case errors.Is(err, unix.EAGAIN):
		return nil, fmt.Errorf("control socket %s: too many clients, try again", path)
	}
	return nil, fmt.Errorf("ask daemon: %w", err)
}
