package router_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/router"
	"cgtun/rules"
)

func TestBytesGoBothWaysAndBothHalvesEnd(t *testing.T) {
	out := serving(t, "up", func(c *memConn) {
		data, err := io.ReadAll(c) // ends with the client's half-close
		if err == nil {
			_, _ = c.Write(append([]byte("got "), data...))
		}
	})
	r := route(t, router.Options{}, out)
	c := newClient("198.51.100.1:80")
	ended := serve(t, r, c)

	if _, err := c.conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c.conn)
	if err != nil || string(answer) != "got hello" {
		t.Fatalf("got %q, %v", answer, err)
	}
	wait(t, "end of the flow", ended)

	infos := r.Flows()
	if len(infos) != 1 {
		t.Fatalf("%d flows in the table, want 1", len(infos))
	}
	i := infos[0]
	if i.State != "closed" || *i.Reason != "closed" || i.UpBytes != 5 || i.DownBytes != 9 || *i.Rule != 1 || *i.Use != "up" || i.Path[0] != "up" {
		t.Errorf("got %+v, reason %v", i, *i.Reason)
	}
	if s := r.Outbounds()["up"]; s.DialsTotal != 1 || s.FailuresTotal != 0 || s.UpBytes != 5 || s.DownBytes != 9 || s.ConnectMS == nil {
		t.Errorf("outbound: got %+v", s)
	}
	if n := r.Counters(); n.FlowsTotal != 1 || n.FlowsLive != 0 || n.RefusedTotal != 0 {
		t.Errorf("counters: got %+v", n)
	}
}

// A flow of which one side has ended is closing until the other has, too.
func TestHalfClosedFlowIsClosing(t *testing.T) {
	for _, first := range []string{"client", "server"} {
		t.Run(first+" ends first", func(t *testing.T) {
			end := make(chan struct{})
			out := serving(t, "up", func(c *memConn) {
				if first == "server" {
					_ = c.CloseWrite()
				}
				_, _ = io.Copy(io.Discard, c)
				<-end
			})
			r := route(t, router.Options{}, out)
			c := newClient("198.51.100.1:80")
			ended := serve(t, r, c)
			if first == "client" {
				_ = c.conn.CloseWrite()
			}
			labtest.Eventually(t, 10*time.Second, func() bool {
				f := r.Flows()
				return len(f) == 1 && f[0].State == "closing" && f[0].Reason == nil
			}, "the flow is closing")
			_ = c.conn.CloseWrite()
			close(end)
			wait(t, "end of the flow", ended)
			if f := r.Flows()[0]; f.State != "closed" || *f.Reason != "closed" {
				t.Errorf("ended as %s, %s", f.State, *f.Reason)
			}
		})
	}
}

func TestClientIsToldTheTruth(t *testing.T) {
	never := func(ctx context.Context, _ dialer.Target) (flow.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	tests := []struct {
		name            string
		out             *outbound
		rule            string
		tell, reason    flow.Reason
		refused, denied uint64
	}{
		{"refused", failing("up", unix.ECONNREFUSED), "up", flow.Refused, flow.Refused, 1, 0},
		{"no route", failing("up", unix.ENETUNREACH), "up", flow.NetUnreachable, flow.NetUnreachable, 1, 0},
		{"host unreachable", failing("up", unix.EHOSTUNREACH), "up", flow.HostUnreachable, flow.HostUnreachable, 1, 0},
		{"prohibited", failing("up", unix.EACCES), "up", flow.Prohibited, flow.Prohibited, 1, 0},
		{"deadline", &outbound{"up", never}, "up", flow.TimedOut, flow.TimedOut, 1, 0},
		{"no word for it", failing("up", errors.New("?")), "up", flow.Unknown, flow.Unknown, 1, 0},
		{"rejected by rule", failing("up", nil), "reject", flow.Refused, flow.Prohibited, 0, 1},
		{"dropped by rule", failing("up", nil), "drop", flow.Dropped, flow.Dropped, 0, 1},
		{"no such outbound", failing("up", nil), "elsewhere", flow.NetUnreachable, flow.NetUnreachable, 1, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := router.New(router.Options{Deadline: 50 * time.Millisecond})
			reload(t, r, []rules.Config{{Use: tt.rule}}, tt.out)
			c := newClient("198.51.100.1:80")
			wait(t, "end of the flow", serve(t, r, c))
			if accepted, why := c.told(t); accepted || why != tt.tell {
				t.Errorf("client was told: accepted %v, %v; want %v", accepted, why, tt.tell)
			}
			if i := r.Flows()[0]; *i.Reason != tt.reason.String() || i.State != "closed" {
				t.Errorf("table says %q, %s; want %q", *i.Reason, i.State, tt.reason)
			}
			if n := r.Counters(); n.RefusedTotal != tt.refused || n.DeniedTotal != tt.denied || n.FlowsLive != 0 {
				t.Errorf("counters: got %+v", n)
			}
		})
	}
}

func TestRouterWithoutRulesRefuses(t *testing.T) {
	r := router.New(router.Options{})
	c := newClient("198.51.100.1:80")
	wait(t, "end of the flow", serve(t, r, c))
	if accepted, why := c.told(t); accepted || why != flow.NetUnreachable {
		t.Errorf("got accepted %v, %v", accepted, why)
	}
}

// Clients cannot take every descriptor that the process has.
func TestSocketsAreBounded(t *testing.T) {
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(io.Discard, c) })
	r := route(t, router.Options{MaxSockets: 1}, out)
	open := func(c *client) func() bool {
		return func() bool { accepted, _ := c.told(t); return accepted }
	}
	first, second, third := newClient("198.51.100.1:80"), newClient("198.51.100.1:80"), newClient("198.51.100.1:80")
	ended := serve(t, r, first)
	labtest.Eventually(t, 5*time.Second, open(first), "the first flow is open")

	wait(t, "end of the flow that has no room", serve(t, r, second))
	if accepted, why := second.told(t); accepted || why != flow.Refused {
		t.Errorf("without room: accepted %v, %v; want refused", accepted, why)
	}
	if n := r.Counters(); n.RefusedTotal != 1 {
		t.Errorf("counters: got %+v", n)
	}
	_ = first.conn.Close()
	wait(t, "end of the first flow", ended)
	serve(t, r, third)
	labtest.Eventually(t, 5*time.Second, open(third), "the third flow has the place of the first")
}

func TestAnsweredOnlyOnceConnected(t *testing.T) {
	connect := make(chan struct{})
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(io.Discard, c) })
	dial := out.dial
	out.dial = func(ctx context.Context, target dialer.Target) (flow.Conn, error) {
		<-connect
		return dial(ctx, target)
	}
	r := route(t, router.Options{}, out)
	c := newClient("198.51.100.1:80")
	serve(t, r, c)

	labtest.Eventually(t, 5*time.Second, func() bool {
		infos := r.Flows()
		return len(infos) == 1 && infos[0].State == "dialing" && infos[0].Use != nil
	}, "the flow is dialled")
	if accepted, _ := c.told(t); accepted {
		t.Error("the client was answered before the outbound had connected")
	}
	close(connect)
	labtest.Eventually(t, 5*time.Second, func() bool { return r.Flows()[0].State == "open" }, "the flow is open")
	if accepted, _ := c.told(t); !accepted {
		t.Error("the client was not answered")
	}
}

func TestServerIsResetIfTheClientLeftMeanwhile(t *testing.T) {
	seen := make(chan error, 1)
	out := serving(t, "up", func(c *memConn) {
		_, err := c.Read(make([]byte, 1))
		seen <- err
	})
	r := route(t, router.Options{}, out)
	c := newClient("198.51.100.1:80")
	c.gone = true
	wait(t, "end of the flow", serve(t, r, c))
	if err := <-seen; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the server saw %v, want a reset", err)
	}
	if i := r.Flows()[0]; *i.Reason != "canceled" {
		t.Errorf("table says %q", *i.Reason)
	}
}

func TestFlowEndsWithItsAttachment(t *testing.T) {
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(io.Discard, c) })
	r := route(t, router.Options{}, out)
	c := newClient("198.51.100.1:80")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); r.ServeStream(ctx, c) }()
	labtest.Eventually(t, 5*time.Second, func() bool { return len(r.Flows()) == 1 && r.Flows()[0].State == "open" }, "open")
	cancel()
	wait(t, "end of the flow", done)
	if i := r.Flows()[0]; *i.Reason != "canceled" {
		t.Errorf("table says %q, want canceled", *i.Reason)
	}
}

func TestOneBrokenFlowEndsAlone(t *testing.T) {
	good := serving(t, "good", func(c *memConn) { _, _ = io.Copy(c, c) })
	bad := &outbound{"bad", func(context.Context, dialer.Target) (flow.Conn, error) { panic("a fault") }}
	var log bytes.Buffer
	r := router.New(router.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	reload(t, r, []rules.Config{
		{CIDR: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}, Use: "bad"}, {Use: "good"},
	}, good, bad)
	lives := newClient("203.0.113.1:80")
	serve(t, r, lives)
	labtest.Eventually(t, 5*time.Second, func() bool { return len(r.Flows()) == 1 && r.Flows()[0].State == "open" }, "open")
	broken := newClient("198.51.100.1:80")
	wait(t, "end of the broken flow", serve(t, r, broken))
	if accepted, why := broken.told(t); accepted || why != flow.Unknown {
		t.Errorf("the client of the broken flow was told: accepted %v, %v", accepted, why)
	}
	if n := r.Counters(); n.PanicsTotal != 1 || n.FlowsLive != 1 {
		t.Errorf("counters: got %+v", n)
	}
	if !strings.Contains(log.String(), "a fault") || !strings.Contains(log.String(), "stack=") {
		t.Errorf("the log does not say what and where: %s", log.String())
	}
	if _, err := lives.conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(lives.conn, make([]byte, 1)); err != nil {
		t.Errorf("the other flow: %v", err)
	}
}

type owners struct {
	find func(context.Context, *flow.Flow) (*flow.Owner, error)
}

func (o owners) Owner(ctx context.Context, f *flow.Flow) (*flow.Owner, error) { return o.find(ctx, f) }

func TestOwnerDecides(t *testing.T) {
	hangs := func(ctx context.Context, _ *flow.Flow) (*flow.Owner, error) { <-ctx.Done(); return nil, ctx.Err() }
	is := func(o *flow.Owner, err error) func(context.Context, *flow.Flow) (*flow.Owner, error) {
		return func(context.Context, *flow.Flow) (*flow.Owner, error) { return o, err }
	}
	tests := []struct {
		name   string
		find   func(context.Context, *flow.Flow) (*flow.Owner, error)
		use    string
		cgroup string
	}{
		{"known", is(&flow.Owner{Cgroup: "/a/b", UID: 0, PID: 7, Process: "curl"}, nil), "reject", "/a/b"},
		{"other", is(&flow.Owner{Cgroup: "/c"}, nil), "drop", "/c"},
		{"nobody", is(nil, nil), "drop", ""},
		{"an error", is(nil, errors.New("no answer")), "reject", ""},
		{"too slow", hangs, "reject", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := router.New(router.Options{Owners: owners{tt.find}, OwnerTimeout: 20 * time.Millisecond})
			reload(t, r, []rules.Config{{Cgroup: []string{"/a"}, Use: "reject"}, {Use: "drop"}})
			wait(t, "end of the flow", serve(t, r, newClient("198.51.100.1:80")))
			i := r.Flows()[0]
			if *i.Use != tt.use {
				t.Errorf("used %s, want %s", *i.Use, tt.use)
			}
			if tt.cgroup == "" {
				if i.Cgroup != nil || i.UID != nil || i.PID != nil {
					t.Errorf("an owner is shown that nobody knows: %+v", i)
				}
			} else if i.Cgroup == nil || *i.Cgroup != tt.cgroup || i.UID == nil {
				t.Errorf("owner is not shown: %+v", i)
			}
		})
	}
}

func TestReloadLeavesLiveFlowsAlone(t *testing.T) {
	out := serving(t, "up", func(c *memConn) { _, _ = io.Copy(c, c) })
	r := route(t, router.Options{}, out)
	c := newClient("198.51.100.1:80")
	serve(t, r, c)
	labtest.Eventually(t, 5*time.Second, func() bool { return len(r.Flows()) == 1 && r.Flows()[0].State == "open" }, "open")
	reload(t, r, []rules.Config{{Use: "reject"}})
	late := newClient("198.51.100.1:80")
	wait(t, "end of the new flow", serve(t, r, late))
	if accepted, why := late.told(t); accepted || why != flow.Refused {
		t.Errorf("the new flow: accepted %v, %v; want it rejected", accepted, why)
	}
	if _, err := c.conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c.conn, make([]byte, 1)); err != nil {
		t.Errorf("the live flow: %v", err)
	}
}

func TestSpellOfFailuresIsSaidOnceEachEnd(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	var fails error
	out := serving(t, "up", func(*memConn) {})
	dial := out.dial
	out.dial = func(ctx context.Context, target dialer.Target) (flow.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		if fails != nil {
			return nil, fails
		}
		return dial(ctx, target)
	}
	r := route(t, router.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, out)
	run := func(n int, err error) {
		mu.Lock()
		fails = err
		mu.Unlock()
		for range n {
			c := newClient("198.51.100.1:80")
			done := serve(t, r, c)
			_ = c.conn.CloseWrite()
			wait(t, "end of the flow", done)
		}
	}
	run(1, unix.ENETUNREACH)
	run(1, nil)
	run(5, unix.ECONNREFUSED) // the destination's word, not the outbound's fault
	if log.Len() > 0 {
		t.Errorf("one failure, and refusals, are no spell: %s", log.String())
	}
	run(9, unix.ENETUNREACH)
	if n := strings.Count(log.String(), "outbound fails"); n != 1 {
		t.Errorf("%d lines at the beginning, want 1: %s", n, log.String())
	}
	run(3, nil)
	if n := strings.Count(log.String(), "outbound works again"); n != 1 || !strings.Contains(log.String(), "failures=9") {
		t.Errorf("%d lines at the end, want 1 with the count: %s", n, log.String())
	}
}

func TestExplain(t *testing.T) {
	r := router.New(router.Options{})
	reload(t, r, []rules.Config{
		{Port: []rules.PortRange{{From: 22, To: 22}}, Use: "reject", Line: 3},
		{Port: []rules.PortRange{{From: 80, To: 80}}, Cgroup: []string{"/a"}, Use: "up", Line: 8},
		{Use: "up", Line: 12},
	}, failing("up", nil))
	for _, tt := range []struct {
		dst     string
		known   rules.Fact
		want    rules.Verdict
		missing rules.Fact
		path    string
	}{
		{"198.51.100.1:22", 0, rules.Verdict{Rule: 1, Line: 3, Use: "reject"}, 0, ""},
		{"198.51.100.1:80", 0, rules.Verdict{}, rules.FactOwner, ""},
		{"198.51.100.1:80", rules.FactOwner, rules.Verdict{Rule: 3, Line: 12, Use: "up"}, 0, "up"},
	} {
		v, missing, path, err := r.Explain(&rules.Facts{Flow: newClient(tt.dst).flow, Known: tt.known})
		if v != tt.want || missing != tt.missing || strings.Join(path, " ") != tt.path || err != nil {
			t.Errorf("%s: got %+v, missing %d, path %v, error %v", tt.dst, v, missing, path, err)
		}
	}
	if len(r.Flows()) != 0 {
		t.Error("explaining left a flow in the table")
	}
}

func TestInfoIsTheContractsJSON(t *testing.T) {
	r := router.New(router.Options{})
	reload(t, r, []rules.Config{{CIDR: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Use: "drop"}})
	wait(t, "end of the flow", serve(t, r, newClient("[2001:db8::1]:443")))
	text, err := json.Marshal(r.Flows()[0])
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"proto": "tcp", "src": "192.0.2.9:4000", "dst": "[2001:db8::1]:443", "attachment": "home",
		"name": nil, "name_from": nil, "cgroup": nil, "pid": nil, "process": nil, "uid": nil, "rule": nil,
		"use": "direct", "state": "closed", "reason": "network unreachable", "replays": 0.0, "up_bytes": 0.0, "down_bytes": 0.0,
	}
	for key, value := range want {
		if v, ok := got[key]; !ok || v != value {
			t.Errorf("%s: got %v (%v), want %v", key, v, ok, value)
		}
		delete(got, key)
	}
	if path, ok := got["path"].([]any); !ok || len(path) != 0 {
		t.Errorf("path: got %v, want []", got["path"])
	}
	if start, _ := got["start"].(string); !strings.HasSuffix(start, "Z") {
		t.Errorf("start: got %v, want UTC", got["start"])
	}
	for _, key := range []string{"id", "age_ms", "path", "start"} {
		if _, ok := got[key]; !ok {
			t.Errorf("%s is missing", key)
		}
		delete(got, key)
	}
	if len(got) > 0 {
		t.Errorf("keys that the contract does not have: %v", got)
	}
}
