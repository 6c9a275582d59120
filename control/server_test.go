package control_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	labtest.Main(m)
}

// fake is a daemon that has nothing to do.
type fake struct {
	mu     sync.Mutex
	peer   control.Peer // of the last Join
	reload error
	emit   chan func(flow.Event) // gets the watcher's callback
	slow   chan struct{}         // gets one when a slow Explain begins, and one when it ends
}

func (f *fake) Status() control.Status { return control.Status{Version: "v0", PID: os.Getpid()} }

func (f *fake) PID(pid int) (control.PIDStatus, error) {
	if pid == 0 {
		return control.PIDStatus{}, &control.Error{Exit: 2, Text: "no pid is 0"}
	}
	return control.PIDStatus{PID: pid, Why: "asked"}, nil
}

func (f *fake) Flows() []flow.Info { return nil }

func (f *fake) Watch(ctx context.Context, emit func(flow.Event)) error {
	f.emit <- emit
	<-ctx.Done()
	return nil
}

func (f *fake) Explain(ctx context.Context, q control.ExplainRequest) (control.Explain, error) {
	if q.Host == "slow" {
		f.slow <- struct{}{}
		<-ctx.Done()
		f.slow <- struct{}{}
		return control.Explain{}, ctx.Err()
	}
	return control.Explain{Host: q.Host, Proto: q.Proto}, nil
}

func (f *fake) Reload(context.Context) error { return f.reload }

func (f *fake) Join(p *control.Peer, cgroup string, direct bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.peer = *p
	return nil
}

// short makes a directory whose path leaves room in sun_path.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// serve runs a server until the test ends.
func serve(t *testing.T, o control.Options) (*control.Server, control.Client) {
	t.Helper()
	if o.Socket == "" {
		o.Socket = filepath.Join(short(t), "s")
	}
	if o.Source == nil {
		o.Source = &fake{emit: make(chan func(flow.Event), 100)}
	}
	o.Log = slog.New(slog.DiscardHandler)
	s, err := control.Listen(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s, control.Client{Socket: o.Socket}
}

func dial(t *testing.T, c control.Client) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func errorText(t *testing.T, r io.Reader) string {
	t.Helper()
	var reply struct{ Error *control.Error }
	if err := json.NewDecoder(r).Decode(&reply); err != nil {
		t.Fatalf("read reply: %v", err)
	}
	if reply.Error == nil {
		t.Fatal("the reply is no error")
	}
	return reply.Error.Text
}

func TestCommandsAreAnswered(t *testing.T) {
	f := &fake{reload: &control.Error{Exit: 2, Text: "a.toml:1:1: bad\na.toml:2:1: worse"}}
	_, c := serve(t, control.Options{Source: f})
	ctx := t.Context()

	st, raw, err := c.Status(ctx)
	if err != nil || st.Version != "v0" || st.PID != os.Getpid() {
		t.Errorf("Status = %+v, %v", st, err)
	}
	if !strings.Contains(string(raw), `"routes":[]`) {
		t.Errorf("an empty list is not []: %s", raw)
	}
	if p, _, err := c.PID(ctx, 7); err != nil || p.PID != 7 || p.Why != "asked" {
		t.Errorf("PID = %+v, %v", p, err)
	}
	var refused *control.Error
	if _, _, err := c.PID(ctx, 0); !errors.As(err, &refused) || refused.Exit != 2 {
		t.Errorf("PID 0: %v", err)
	}
	if _, raw, err := c.Flows(ctx); err != nil || string(raw) != `{"flows":[]}` {
		t.Errorf("Flows = %s, %v", raw, err)
	}
	if e, _, err := c.Explain(ctx, control.ExplainRequest{Host: "a.example", Proto: "udp"}); err != nil || e.Host != "a.example" || e.Proto != "udp" {
		t.Errorf("Explain = %+v, %v", e, err)
	}
	if err := c.Reload(ctx); !errors.As(err, &refused) || refused.Exit != 2 || !strings.Contains(refused.Text, "worse") {
		t.Errorf("Reload: %v", err)
	}
	if err := c.Join(ctx, "/x", false); err != nil || f.peer.PID != os.Getpid() {
		t.Errorf("Join of process %d: %v", f.peer.PID, err)
	}
}

// A look-up that takes long ends with the time-out, and with who asked.
func TestExplainTakesNoLongerThanItIsWaitedFor(t *testing.T) {
	f := &fake{slow: make(chan struct{}, 2)}
	_, c := serve(t, control.Options{Source: f, Timeout: 100 * time.Millisecond})
	if _, _, err := c.Explain(t.Context(), control.ExplainRequest{Host: "slow"}); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("Explain: %v, want its deadline", err)
	}
	<-f.slow
	<-f.slow
	_, c = serve(t, control.Options{Source: f, Timeout: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, _, err := c.Explain(ctx, control.ExplainRequest{Host: "slow"})
		done <- err
	}()
	<-f.slow
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Explain that its caller ended: %v", err)
	}
	<-f.slow
}

func TestWatchEndsWithEitherSide(t *testing.T) {
	f := &fake{emit: make(chan func(flow.Event), 1)}
	_, c := serve(t, control.Options{Source: f})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan flow.Event, 2)
	done := make(chan error, 1)
	go func() {
		done <- c.Watch(ctx, func(e flow.Event, _ json.RawMessage) error { got <- e; return nil })
	}()
	emit := <-f.emit
	emit(flow.Event{Event: flow.EventOpen, Flow: flow.Info{ID: 3}})
	emit(flow.Event{Event: flow.EventClose, Flow: flow.Info{ID: 3}})
	if e := <-got; e.Event != flow.EventOpen || e.Flow.ID != 3 {
		t.Errorf("first event: %+v", e)
	}
	if e := <-got; e.Event != flow.EventClose {
		t.Errorf("second event: %+v", e)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch that its caller ended: %v", err)
	}
}

// A watcher that stops reading is held, within the time-out, and then sent
// away; its source gets its goroutine back.
func TestWatcherThatDoesNotReadIsSentAway(t *testing.T) {
	f := &fake{emit: make(chan func(flow.Event), 1)}
	s, c := serve(t, control.Options{Source: f, Timeout: 100 * time.Millisecond})
	conn := dial(t, c)
	fmt.Fprintln(conn, `{"command":"watch"}`)
	emit := <-f.emit
	name := strings.Repeat("n", 4000)
	for range 10_000 { // far more than a socket holds
		emit(flow.Event{Event: flow.EventUpdate, Flow: flow.Info{Name: &name}})
	}
	if n := s.Stats().Lagging; n != 1 {
		t.Errorf("%d watchers counted as sent away", n)
	}
	if n, err := io.Copy(io.Discard, conn); err != nil || n > 10<<20 {
		t.Errorf("%d bytes came, and then %v", n, err)
	}
}

// All of many flows come, however slowly they are read.
func TestWatcherGetsAllFlows(t *testing.T) {
	const flows = 20_000
	f := &fake{emit: make(chan func(flow.Event), 1)}
	_, c := serve(t, control.Options{Source: f})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		emit := <-f.emit
		for i := range flows {
			emit(flow.Event{Event: flow.EventOpen, Flow: flow.Info{ID: uint64(i)}})
		}
	}()
	var next uint64
	err := c.Watch(ctx, func(e flow.Event, _ json.RawMessage) error {
		if e.Flow.ID != next {
			return fmt.Errorf("flow %d came instead of %d", e.Flow.ID, next)
		}
		if next++; next == flows {
			cancel()
		}
		return nil
	})
	if err != nil || next != flows {
		t.Errorf("after %d flows: %v", next, err)
	}
}

func TestRequestsAreBounded(t *testing.T) {
	const limit = 200 * time.Millisecond
	tests := []struct {
		name string
		send func(net.Conn)
		want string
	}{
		{"nothing", func(net.Conn) {}, "no request within"},
		{"half", func(c net.Conn) { io.WriteString(c, `{"command":"sta`) }, "no request within"},
		{"half and closed", func(c net.Conn) {
			io.WriteString(c, `{"command":"sta`)
			c.(*net.UnixConn).CloseWrite()
		}, "bad request: unexpected EOF"},
		{"no JSON", func(c net.Conn) { io.WriteString(c, "GET / HTTP/1.1\r\n\r\n") }, "bad request: invalid character"},
		{"unknown key", func(c net.Conn) { io.WriteString(c, `{"command":"status","x":1}`) }, `unknown field "x"`},
		{"unknown command", func(c net.Conn) { io.WriteString(c, `{"command":"halt"}`) }, `does not know "halt"`},
		{"no question", func(c net.Conn) { io.WriteString(c, `{"command":"explain"}`) }, "without its question"},
		{"dripping", func(c net.Conn) {
			for { // a byte now and then does not prolong it
				if _, err := io.WriteString(c, " "); err != nil {
					return
				}
				time.Sleep(limit / 10)
			}
		}, "no request within"},
	}
	_, c := serve(t, control.Options{Timeout: limit})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn := dial(t, c)
			var sender sync.WaitGroup
			defer sender.Wait()
			defer conn.Close()
			sender.Go(func() { tt.send(conn) })
			if got := errorText(t, conn); !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	if _, _, err := c.Status(t.Context()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// A request of 1 GB is refused at 1 MiB, and costs no more memory than that.
func TestHugeRequestIsRefused(t *testing.T) {
	_, c := serve(t, control.Options{})
	conn := dial(t, c)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	chunk := []byte(strings.Repeat("a", 1<<16))
	var sent int
	io.WriteString(conn, `{"command":"`)
	for range 1 << 14 {
		n, err := conn.Write(chunk)
		sent += n
		if err != nil {
			break
		}
	}
	runtime.ReadMemStats(&after)
	if sent > 4<<20 {
		t.Errorf("the server took %d bytes", sent)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("%d bytes were allocated", used)
	}
	if got := errorText(t, conn); !strings.Contains(got, "larger than 1048576 bytes") {
		t.Errorf("got %q", got)
	}
}

func TestClientsAreBounded(t *testing.T) {
	s, c := serve(t, control.Options{MaxClients: 8, Timeout: time.Minute})
	for range 8 {
		dial(t, c)
	}
	// They are taken in the order in which they came.
	if got := errorText(t, dial(t, c)); !strings.Contains(got, "has its 8 clients") {
		t.Errorf("got %q", got)
	}
	if n := s.Stats().Full; n != 1 {
		t.Errorf("%d clients counted as turned away", n)
	}
	if _, _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("Client is told %v", err)
	}
}

// Ten thousand clients at once leave a server that answers, and no goroutines.
func TestFloodOfClientsPasses(t *testing.T) {
	_, c := serve(t, control.Options{Timeout: 2 * time.Second})
	var flood sync.WaitGroup
	for range 20 {
		flood.Go(func() {
			for range 500 {
				if conn, err := net.Dial("unix", c.Socket); err == nil {
					conn.Close()
				}
			}
		})
	}
	flood.Wait()
	labtest.Eventually(t, 10*time.Second, func() bool {
		_, _, err := c.Status(t.Context())
		return err == nil
	})
}

func TestStopDoesNotWaitForClients(t *testing.T) {
	sock := filepath.Join(short(t), "made", "here", "s")
	s, err := control.Listen(control.Options{Socket: sock, Source: &fake{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	dial(t, control.Client{Socket: sock})
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(2 * time.Second):
		t.Fatal("Run waits for a client that says nothing")
	}
	if _, err := os.Stat(filepath.Dir(filepath.Dir(sock))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory that Listen made is still there: %v", err)
	}
}

func TestSocketIsPrivate(t *testing.T) {
	dir := filepath.Join(short(t), "run")
	_, c := serve(t, control.Options{Socket: filepath.Join(dir, "s"), Group: "no-such-group"})
	for path, want := range map[string]os.FileMode{dir: os.ModeDir | 0o755, c.Socket: os.ModeSocket | 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode() != want {
			t.Errorf("%s has mode %v, want %v (%v)", path, st.Mode(), want, err)
		}
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	sock := filepath.Join(short(t), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	_, c := serve(t, control.Options{Socket: sock})
	if _, _, err := c.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// What a killed daemon made goes with the next one's stop, and with cleanup. A
// directory that others made stays.
func TestDirectoriesOfAKilledDaemonGo(t *testing.T) {
	labtest.Need(t, labtest.Root)
	for _, how := range []string{"the next one's stop", "cleanup"} {
		t.Run(how, func(t *testing.T) {
			foreign := short(t)
			sock := filepath.Join(foreign, "a", "b", "s")
			dead, err := control.Listen(control.Options{Socket: sock})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(sock, sock+"-kept"); err != nil { // Close would remove it
				t.Fatal(err)
			}
			if err := dead.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(sock+"-kept", sock); err != nil {
				t.Fatal(err)
			}
			if how == "cleanup" {
				if removed, err := control.RemoveStale(sock); !removed || err != nil {
					t.Fatalf("RemoveStale: %v, %v", removed, err)
				}
				control.RemoveDirs(sock)
			} else {
				next, err := control.Listen(control.Options{Socket: sock})
				if err != nil {
					t.Fatal(err)
				}
				if err := next.Close(); err != nil {
					t.Error(err)
				}
			}
			if left, err := os.ReadDir(foreign); err != nil || len(left) != 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func TestLiveSocketIsTaken(t *testing.T) {
	_, c := serve(t, control.Options{})
	var taken *control.TakenError
	if _, err := control.Listen(control.Options{Socket: c.Socket}); !errors.As(err, &taken) {
		t.Fatalf("second Listen: %v", err)
	}
	if taken.PID != os.Getpid() {
		t.Errorf("the holder is said to be %d, want %d", taken.PID, os.Getpid())
	}
	if removed, err := control.RemoveStale(c.Socket); removed || !errors.As(err, &taken) {
		t.Errorf("RemoveStale of a live socket: %v, %v", removed, err)
	}
	if _, _, err := c.Status(t.Context()); err != nil {
		t.Errorf("the first one no longer answers: %v", err)
	}
}

func TestForeignFileIsLeftAlone(t *testing.T) {
	file := filepath.Join(short(t), "s")
	if err := os.WriteFile(file, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := control.Listen(control.Options{Socket: file}); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("Listen: %v", err)
	}
	if data, _ := os.ReadFile(file); string(data) != "mine" {
		t.Error("the file is not what it was")
	}
}

func TestNoDaemonIsSaid(t *testing.T) {
	c := control.Client{Socket: filepath.Join(short(t), "s")}
	if _, _, err := c.Status(t.Context()); !errors.Is(err, control.ErrNotRunning) {
		t.Errorf("Status: %v", err)
	}
}
