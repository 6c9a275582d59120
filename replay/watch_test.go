package replay_test

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/relay"
	"cgtun/replay"
)

// TestWatch says a few things to a flow that is watched, and then looks whose it is: of
// relay alone, or of who would take it if the server ended now.
func TestWatch(t *testing.T) {
	long := "GET /" + strings.Repeat("a", 40<<10) + " HTTP/1.1\r\n\r\n"
	for _, tt := range []struct {
		name   string
		alone  bool // no other server can be asked
		parts  []string
		after  time.Duration // the last of them
		until  time.Duration // how long the server may be silent; 0: for ever
		relays bool
	}{
		{"nothing", false, nil, 0, 0, false},
		{"a request", false, []string{get}, 0, time.Second, false},
		{"a request, where nobody else can be asked", true, []string{get}, 0, 0, false},
		{"a part of one", false, []string{get[:20]}, 0, 0, false},
		{"one in two parts", false, []string{get[:20], get[20:]}, 0, time.Second, false},
		{"two", false, []string{get, get}, 0, time.Second, false},
		{"one, and a part of one", false, []string{get, get[:20]}, 0, 0, false},
		{"something unsafe", false, []string{post}, 0, 0, true},
		{"something unsafe after a request", false, []string{get, post}, 0, 0, true},
		{"a long one", false, []string{long}, 0, time.Second, false},
		{"two long ones", false, []string{long, long}, 0, 0, true},
		{"crumbs", false, strings.Split(strings.Repeat(get, 2)[:64], ""), 0, 0, false},
		{"too many crumbs", false, strings.Split(strings.Repeat(get, 2)[:65], ""), 0, 0, true},
		{"a request long ago", false, []string{get}, 30 * time.Second, time.Second, true},
		{"a request just not so long ago", false, []string{get}, 30*time.Second - 1, time.Second, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var told []dialer.News
				server := &dialer.Conn{Path: []string{"a"}, Report: func(o dialer.Outcome) { told = append(told, o.News) }}
				make := func() *replay.Watch {
					w := replay.NewWatch(server, 80, !tt.alone)
					var until time.Time
					for _, p := range tt.parts {
						half := len(p) / 2
						if !w.Next([][]byte{[]byte(p[:half]), []byte(p[half:])}, len(p)) {
							t.Fatal("nobody has taken it, and relay is told so")
						}
						until = w.Sent(len(p))
					}
					if got := time.Until(until); until.IsZero() != (tt.until == 0) || tt.until != 0 && got != tt.until {
						t.Errorf("may be silent for %v, want %v", got, tt.until)
					}
					time.Sleep(tt.after)
					return w
				}
				w := make()
				if got := w.ServerEnds(nil); got != tt.relays {
					t.Errorf("the server ends: relay goes on: %t, want %t", got, tt.relays)
				}
				if w.ServerSpeaks() != tt.relays || w.ClientEnds() != tt.relays || w.ServerEnds(nil) != tt.relays || w.Next([][]byte{[]byte("a")}, 1) != tt.relays {
					t.Error("it is not theirs who have it")
				}
				w = make()
				if got, want := w.ClientEnds(), tt.relays || len(tt.parts) == 0; got != want {
					t.Errorf("the client ends: relay goes on: %t, want %t", got, want)
				}
				if len(told) > 0 {
					t.Errorf("told %v", told)
				}
				w = make()
				if !w.ServerSpeaks() || !w.ServerEnds(nil) || !w.Next([][]byte{[]byte("a")}, 1) || !w.Sent(1).IsZero() {
					t.Error("a flow that was answered is not relay's")
				}
				if answered := len(told) == 1 && told[0] == dialer.Answered; answered == (tt.relays && tt.after == 0) {
					t.Errorf("told %v", told)
				}
				if tt.after == 0 {
					return
				}
				w, told = make(), nil
				if !w.Next([][]byte{[]byte("G")}, 1) || !w.ServerSpeaks() || (len(told) == 0) != tt.relays {
					t.Errorf("after one more byte, so late, it is told %v", told)
				}
			})
		})
	}
}

// TestUnsafeIsOfNoInterest: a client that has said something unsafe is no longer watched,
// however silent its server is and however that ends.
func TestUnsafeIsOfNoInterest(t *testing.T) {
	early := string(withExtension([]byte(hello(t, &tls.Config{ServerName: "a.example"})), 42))
	for _, tt := range []struct {
		name  string
		parts []string
	}{
		{"POST", []string{post}}, {"early data", []string{early}}, {"GET, then POST", []string{get, post}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			all := strings.Join(tt.parts, "")
			b := &bed{T: t}
			b.script = []func(*net.TCPConn){
				func(c *net.TCPConn) { b.read(0, len(all), c); time.Sleep(1200 * time.Millisecond) },
				func(c *net.TCPConn) { b.read(1, -1, c) },
			}
			heard, err := b.run(say(tt.parts...))
			if len(heard) > 0 || err != nil || len(b.got) != 1 || string(b.got[0]) != all || b.left || b.up.Load() != int64(len(all)) {
				t.Errorf("heard %q, %v; got %q; left to another one: %t; %d bytes counted", heard, err, b.got, b.left, b.up.Load())
			}
		})
	}
}

// TestAnswerToWhatWasTaken: a server that speaks just when the flow is taken from relay is
// heard by who has taken it, and by nobody else.
func TestAnswerToWhatWasTaken(t *testing.T) {
	app, end := pair(t)
	near, far := pair(t)
	var done sync.WaitGroup
	defer done.Wait()
	defer func() { app.Close(); end.Close(); near.Close(); far.Close() }()
	client := show(end, &done)
	server := &dialer.Conn{Conn: flow.NewTCPConn(near), Path: []string{"a"}}
	w := replay.NewWatch(server, 80, true)
	if !w.Next([][]byte{[]byte(get)}, len(get)) || w.Sent(len(get)).IsZero() || w.ClientEnds() {
		t.Fatal("an end after a request is left to relay")
	}
	_, _ = io.WriteString(far, "answer")
	res := relay.Streams(t.Context(), client, server.Conn, &relay.Options{Watcher: w})
	got := make([]byte, len("answer"))
	_ = near.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(near, got); !res.Left || res.Err != nil || string(got) != "answer" || err != nil {
		t.Errorf("%+v; in the server's socket: %q, %v", res, got, err)
	}
}
