package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Options say how to serve. Zero values mean the defaults.
type Options struct {
	Socket     string        // path; DefaultSocket
	Source     Source        // asked for everything; required
	Log        *slog.Logger  // slog.Default
	Group      string        // its members may read; "cgtun"
	MaxClients int           // at once, a quarter of them for root only; 64
	MaxRequest int64         // bytes; 1 MiB
	Timeout    time.Duration // for a request to come, for explain to find its answer, and for each line to be taken; 5 s
}

func (o *Options) setDefaults() {
	if o.Socket == "" {
		o.Socket = DefaultSocket
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Group == "" {
		o.Group = "cgtun"
	}
	if o.MaxClients == 0 {
		o.MaxClients = 64
	}
	if o.MaxRequest == 0 {
		o.MaxRequest = 1 << 20
	}
	if o.Timeout == 0 {
		o.Timeout = 5 * time.Second
	}
}

// Stats count what the server turned away.
type Stats struct {
	Denied  uint64 // wrong user
	Full    uint64 // more clients than MaxClients
	Bad     uint64 // requests that were too large, too slow or no JSON
	Lagging uint64 // watchers that took nothing for Timeout
}

// Server serves one control socket.
type Server struct {
	opt   Options
	l     *net.UnixListener
	gid   int64    // who may read; noGroup
	made  []string // directories to remove again
	close sync.Once

	clients                    atomic.Int64
	denied, full, bad, lagging atomic.Uint64
}

// Listen takes the socket, so that a second instance is found before anything
// else of it is set up. Clients wait until Run. *TakenError: a live instance
// has it. The caller calls Run or Close, or both.
func Listen(o Options) (*Server, error) {
	o.setDefaults()
	dirs, err := makeDir(filepath.Dir(o.Socket))
	if err != nil {
		return nil, err
	}
	s := &Server{opt: o}
	s.l, s.gid, err = listen(o.Socket, o.Group)
	if err != nil {
		removeDirs(dirs)
		return nil, err
	}
	s.made = append(marked(o.Socket), dirs...) // some twice, which harms nothing
	return s, nil
}

// Close removes the socket, and its directory if a Listen made that and nobody
// else put anything there. It does not end the clients: Run does.
func (s *Server) Close() error {
	var err error
	s.close.Do(func() {
		err = s.l.Close()
		removeDirs(s.made)
	})
	return err
}

func removeDirs(made []string) {
	for _, d := range made {
		_ = os.Remove(d) // not empty: it is somebody else's too
	}
}

// Stats returns the counts since Listen.
func (s *Server) Stats() Stats {
	return Stats{Denied: s.denied.Load(), Full: s.full.Load(), Bad: s.bad.Load(), Lagging: s.lagging.Load()}
}

// Run serves clients until ctx ends, then closes the socket and returns nil
// when the last client is gone.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { s.Close() })()
	for {
		conn, err := s.l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			return s.Close()
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			// Out of descriptors, mostly: the flows need those more than we.
			s.opt.Log.Warn("control socket cannot accept", "err", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		if c := s.admit(conn); c != nil {
			clients.Go(func() { s.serve(ctx, c) })
		}
	}
}

// admit decides who is served; nil: the client was told why not. It does not
// block: a refusal fits into the buffer of a new socket.
func (s *Server) admit(conn *net.UnixConn) *client {
	peer, err := peerOf(conn)
	if err != nil {
		s.opt.Log.Debug("control client refused", "err", err)
		conn.Close()
		return nil
	}
	c := &client{s: s, conn: conn, peer: peer}
	if !s.mayRead(peer) {
		s.denied.Add(1)
		c.fail(&Error{Exit: 1, Text: "needs root or group " + s.opt.Group})
		c.close()
		return nil
	}
	limit := int64(s.opt.MaxClients)
	if !peer.root() {
		limit -= limit / 4
	}
	if n := s.clients.Load(); n >= limit {
		s.full.Add(1)
		c.fail(&Error{Exit: 1, Text: fmt.Sprintf("the control socket has its %d clients already: try again", n)})
		c.close()
		return nil
	}
	s.clients.Add(1)
	return c
}

// serve answers one client that was admitted.
func (s *Server) serve(ctx context.Context, c *client) {
	defer s.clients.Add(-1)
	defer c.close()
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	req, err := c.read()
	if err != nil {
		s.bad.Add(1)
		c.fail(err)
		return
	}
	if err := c.answer(ctx, req); err != nil {
		c.fail(err)
	}
}

func (s *Server) mayRead(p *Peer) bool {
	return p.root() || s.gid != noGroup && p.in(uint32(s.gid))
}

// client is one connection that is being served.
type client struct {
	s    *Server
	conn *net.UnixConn
	peer *Peer
}

func (c *client) close() {
	c.conn.Close()
	c.peer.close()
}

// read takes the one request. Nothing of it is kept beyond the limit.
func (c *client) read() (*request, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(c.s.opt.Timeout)); err != nil {
		return nil, err
	}
	body := &io.LimitedReader{R: c.conn, N: c.s.opt.MaxRequest}
	dec := json.NewDecoder(body)
	dec.DisallowUnknownFields()
	req := new(request)
	err := dec.Decode(req)
	switch {
	case err == nil:
		return req, nil
	case body.N == 0:
		return nil, fmt.Errorf("the request is larger than %d bytes", c.s.opt.MaxRequest)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("no request within %v", c.s.opt.Timeout)
	}
	return nil, fmt.Errorf("bad request: %w", err)
}

// answer does what was asked. Its error is the reply.
func (c *client) answer(ctx context.Context, req *request) error {
	src := c.s.opt.Source
	switch req.Command {
	case "status":
		return c.reply(src.Status())
	case "pid":
		st, err := src.PID(req.PID)
		return c.replyOr(st, err)
	case "flows":
		return c.reply(FlowList{Flows: src.Flows()})
	case "watch":
		return c.watch(ctx)
	case "explain":
		if req.Explain == nil {
			return &Error{Exit: 1, Text: "bad request: explain without its question"}
		}
		return c.explain(ctx, *req.Explain)
	case "reload":
		if !c.peer.root() {
			return c.rootOnly("reload")
		}
		return c.replyOr(struct{}{}, src.Reload(ctx))
	case "join":
		if req.Direct && !c.peer.root() {
			return c.rootOnly("run -direct")
		}
		return c.replyOr(struct{}{}, src.Join(c.peer, req.Cgroup, req.Direct))
	}
	return &Error{Exit: 1, Text: fmt.Sprintf("bad request: the daemon does not know %q", req.Command)}
}

// explain asks for as long as the client is there, and not longer than it takes
// others to ask.
func (c *client) explain(ctx context.Context, q ExplainRequest) error {
	ctx, cancel := context.WithTimeout(ctx, c.s.opt.Timeout)
	defer cancel()
	ctx, gone := c.whileThere(ctx)
	defer gone()
	e, err := c.s.opt.Source.Explain(ctx, q)
	return c.replyOr(e, err)
}

func (c *client) rootOnly(what string) error {
	c.s.denied.Add(1)
	return &Error{Exit: 1, Text: what + " needs root"}
}

func (c *client) replyOr(v any, err error) error {
	if err != nil {
		return err
	}
	return c.reply(v)
}

// reply sends the one result. If it cannot be sent it has no reader, who would
// have to be told.
func (c *client) reply(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode reply: %w", err)
	}
	_ = c.send(reply{Result: line})
	return nil
}

// fail sends an error.
func (c *client) fail(err error) {
	out := &Error{Exit: 1, Text: err.Error()}
	var known *Error
	if errors.As(err, &known) {
		out.Exit = known.Exit
	}
	_ = c.send(reply{Error: out})
}

func (c *client) send(r reply) error {
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(r); err != nil {
		return fmt.Errorf("encode reply: %w", err)
	}
	if err := c.conn.SetWriteDeadline(time.Now().Add(c.s.opt.Timeout)); err != nil {
		return err
	}
	_, err := c.conn.Write(b.Bytes())
	return err
}
