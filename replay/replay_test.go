package replay_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/relay"
	"cgtun/replay"
)

// bed is a flow between two sockets: what a client does at one end, and servers
// that the test scripts at the other.
type bed struct {
	*testing.T
	plain  bool // the servers' sockets are not known to be sockets
	small  bool // they hold little
	reads  bool // the client's end is read, and does not show what it has got
	first  string
	script []func(*net.TCPConn)
	redial func() // called before each server but the first
	budget *replay.Budget

	mu   sync.Mutex
	got  [][]byte // by each server
	told []string // news
	hid  []string

	servers sync.WaitGroup
	open    atomic.Int32
	up      atomic.Int64
	left    bool // by relay
	result  replay.Result
}

// pair is a connection over loopback.
func pair(t testing.TB) (near, far *net.TCPConn) { return pairOf(t, net.ListenConfig{}) }

// smallPair is one whose ends hold little of what near writes.
func smallPair(t testing.TB) (near, far *net.TCPConn) {
	near, far = pairOf(t, net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) })
	}})
	_ = near.SetWriteBuffer(4 << 10)
	return near, far
}

func pairOf(t testing.TB, config net.ListenConfig) (near, far *net.TCPConn) {
	t.Helper()
	ln, err := config.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// hiding is a server's end that is more than a socket.
type hiding struct{ flow.Conn }

// connect makes the next server of the script.
func (b *bed) connect() (*dialer.Conn, error) {
	b.mu.Lock()
	n := len(b.got)
	if n >= len(b.script) {
		b.mu.Unlock()
		return nil, errors.New("no other path")
	}
	b.got = append(b.got, nil)
	b.mu.Unlock()
	make := pair
	if b.small {
		make = smallPair
	}
	near, far := make(b.T)
	b.servers.Go(func() { b.script[n](far); far.Close() })
	b.open.Add(1)
	c := &dialer.Conn{Conn: flow.NewTCPConn(near), Path: []string{fmt.Sprint("path", n)}}
	if b.plain {
		c.Conn = hiding{c.Conn}
	}
	c.Report = func(o dialer.Outcome) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.told = append(b.told, fmt.Sprint(n, " ", o.News))
	}
	return c, nil
}

// read has server n read so many bytes; -1: to the end.
func (b *bed) read(n, bytes int, c *net.TCPConn) {
	var buf []byte
	if bytes < 0 {
		buf, _ = io.ReadAll(c)
	} else {
		buf = make([]byte, bytes)
		m, _ := io.ReadFull(c, buf)
		buf = buf[:m]
	}
	b.mu.Lock()
	b.got[n] = append(b.got[n], buf...)
	b.mu.Unlock()
}

func reset(c *net.TCPConn) { _ = c.SetLinger(0); c.Close() }

// run has a client do its part, and returns what it heard and how that ended.
func (b *bed) run(client func(*net.TCPConn)) (heard []byte, err error) {
	b.Helper()
	app, end := pair(b.T)
	server, err := b.connect()
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var done sync.WaitGroup
	var flowEnd flow.Conn = flow.NewTCPConn(end)
	if !b.reads {
		flowEnd = show(end, &done)
	}
	done.Go(func() {
		o := replay.Options{
			Redial: func(context.Context, []string) (*dialer.Conn, error) {
				if b.redial != nil {
					b.redial()
				}
				return b.connect()
			},
			Closed: func() { b.open.Add(-1) },
			Hide: func(outbound string, kind dialer.Hidden) {
				b.mu.Lock()
				defer b.mu.Unlock()
				b.hid = append(b.hid, outbound+" "+kind.String())
			},
			Budget: b.budget,
			First:  []byte(b.first),
			Up:     &b.up,
		}
		// As router does it.
		w := replay.NewWatch(server, 80, true)
		moved := relay.Streams(ctx, flowEnd, server.Conn, &relay.Options{Watcher: w, First: o.First, Up: o.Up})
		b.left = moved.Left
		if moved.Left {
			res := replay.Begin(ctx, flowEnd, w, moved.Err, o)
			b.result, server = res, res.Server
			if !res.Over {
				relay.Streams(ctx, flowEnd, server.Conn, &relay.Options{First: res.Rest, Gone: res.Gone, Broken: res.Broken, Shut: res.Shut, Up: o.Up})
			}
		}
		_ = server.Close()
		server.Tell(dialer.Outcome{News: dialer.Ended})
		_ = end.Close()
	})
	done.Go(func() { client(app) })
	heard, err = io.ReadAll(app)
	app.Close()
	done.Wait()
	b.servers.Wait()
	if n := b.open.Load(); n != 1 {
		b.Errorf("%d conns were not closed, want the one that was given back", n)
	}
	return heard, err
}

func say(parts ...string) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		for i, p := range parts {
			if i > 0 {
				time.Sleep(20 * time.Millisecond)
			}
			_, _ = io.WriteString(c, p)
		}
	}
}

const (
	get  = "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"
	post = "POST /a HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello"
)

// TestCutPoints has the first server end after each number of bytes, in two ways:
// what the second one gets is exact or nothing, and no unsafe byte comes twice.
func TestCutPoints(t *testing.T) {
	tlsHello := string(hello(t, &tls.Config{ServerName: "a.example", MaxVersion: tls.VersionTLS12}))
	early := string(withExtension([]byte(hello(t, &tls.Config{ServerName: "a.example"})), 42))
	for _, tt := range []struct {
		name    string
		parts   []string
		unsafe  int // from here on nothing comes twice
		hidden  bool
		between bool // parts with a pause
	}{
		{"GET", []string{get}, len(get), true, false},
		{"two GETs", []string{get, get}, 2 * len(get), true, true},
		{"hello", []string{tlsHello}, len(tlsHello), true, false},
		{"early data", []string{early}, 0, false, false},
		{"POST", []string{post}, 0, false, false},
		{"part of a GET", []string{get[:20]}, 0, false, false},
		{"GET and POST", []string{get + post}, len(get), false, false},
		{"GET, then POST", []string{get, post}, len(get), false, true},
	} {
		for _, how := range []string{"reset", "close"} {
			t.Run(tt.name+" "+how, func(t *testing.T) {
				t.Parallel()
				all := strings.Join(tt.parts, "")
				step := max(1, len(all)/12)
				for cut := 1; cut <= len(all); cut += step {
					cutPoint(t, tt.parts, cut, tt.unsafe, tt.hidden, how)
				}
				cutPoint(t, tt.parts, len(all), tt.unsafe, tt.hidden, how)
			})
		}
	}
}

func cutPoint(t *testing.T, parts []string, cut, unsafe int, hidden bool, how string) {
	all := strings.Join(parts, "")
	b := &bed{T: t, plain: cut%2 == 0, reads: cut%3 == 0}
	b.script = []func(*net.TCPConn){
		func(c *net.TCPConn) {
			b.read(0, cut, c)
			if how == "reset" {
				reset(c)
			}
		},
		func(c *net.TCPConn) {
			b.read(1, len(all), c)
			_, _ = io.WriteString(c, "answer")
		},
	}
	heard, err := b.run(say(parts...))
	seen := 0
	for _, g := range b.got {
		if len(g) > unsafe {
			seen++
		}
		if !strings.HasPrefix(all, string(g)) {
			t.Errorf("cut at %d: a server got %q", cut, g)
		}
	}
	if seen > 1 {
		t.Errorf("cut at %d: %d servers got bytes that are not safe: %q", cut, seen, b.got)
	}
	switch {
	case string(heard) == "answer":
		if len(b.got) != 2 || string(b.got[1]) != all || b.up.Load() != int64(len(all)) {
			t.Errorf("cut at %d: an answer to %q, of which %d bytes are counted", cut, b.got, b.up.Load())
		}
	case len(heard) > 0:
		t.Errorf("cut at %d: heard %q", cut, heard)
	case hidden && len(parts) == 1:
		t.Errorf("cut at %d: not hidden: %v, %q", cut, err, b.got)
	}
}

// TestEndsBeforeAWord: nothing was sent yet.
func TestEndsBeforeAWord(t *testing.T) {
	for _, how := range []string{"reset", "close"} {
		t.Run(how, func(t *testing.T) {
			b := &bed{T: t}
			b.script = []func(*net.TCPConn){
				func(c *net.TCPConn) {
					if how == "reset" {
						reset(c)
					}
				},
				func(c *net.TCPConn) { _, _ = io.WriteString(c, "220 hello\r\n"); b.read(1, len(post), c) },
			}
			heard, err := b.run(func(c *net.TCPConn) {
				time.Sleep(time.Second)
				_, _ = io.WriteString(c, post)
			})
			if string(heard) != "220 hello\r\n" || string(b.got[1]) != post || err != nil {
				t.Errorf("heard %q, %v; got %q", heard, err, b.got)
			}
			if want := "path0 " + how; len(b.hid) != 1 || b.hid[0] != want || b.result.Replays != 1 {
				t.Errorf("hidden %q, want %q; %d replays", b.hid, want, b.result.Replays)
			}
		})
	}
}

// TestAllEndAlike: the client hears what all say, and each is asked once.
func TestAllEndAlike(t *testing.T) {
	t.Run("reset", func(t *testing.T) {
		b := &bed{T: t}
		for n := range 5 {
			b.script = append(b.script, func(c *net.TCPConn) { b.read(n, len(get), c); reset(c) })
		}
		heard, err := b.run(say(get))
		if len(heard) != 0 || !errors.Is(err, unix.ECONNRESET) || len(b.got) != 3 || len(b.hid) != 0 {
			t.Errorf("heard %q, %v, from %d servers; hidden %q", heard, err, len(b.got), b.hid)
		}
		if !b.result.Over || b.result.Reason != flow.Reset || !b.result.ByServer {
			t.Errorf("%+v", b.result)
		}
	})
	t.Run("close", func(t *testing.T) {
		b := &bed{T: t}
		b.script = []func(*net.TCPConn){func(c *net.TCPConn) { b.read(0, len(get), c) }, func(c *net.TCPConn) { b.read(1, len(get), c) }}
		heard, err := b.run(say(get))
		if len(heard) != 0 || err != nil || len(b.got) != 2 {
			t.Errorf("heard %q, %v, from %d servers", heard, err, len(b.got))
		}
	})
}

// TestSilence: the second server is asked when the first one is silent, and
// whoever answers first has the flow; the other one is closed.
func TestSilence(t *testing.T) {
	for _, tt := range []struct {
		name   string
		late   time.Duration // the first server's answer after the request
		second time.Duration
		want   string
		hid    int
	}{
		{"the second answers", 10 * time.Second, 0, "second", 1},
		{"the first answers late", 5 * time.Second, 20 * time.Second, "first", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := &bed{T: t}
			answer := func(n int, after time.Duration, text string) func(*net.TCPConn) {
				return func(c *net.TCPConn) {
					b.read(n, len(get), c)
					_ = c.SetReadDeadline(time.Now().Add(after))
					var one [1]byte
					if _, err := c.Read(one[:]); after > 0 && !errors.Is(err, os.ErrDeadlineExceeded) {
						return // closed: it has lost
					}
					_, _ = io.WriteString(c, text)
				}
			}
			b.script = []func(*net.TCPConn){answer(0, tt.late, "first"), answer(1, tt.second, "second")}
			began := time.Now()
			heard, err := b.run(say(get))
			took := time.Since(began)
			if string(heard) != tt.want || err != nil || took < 1500*time.Millisecond || took > 9*time.Second {
				t.Errorf("heard %q, %v, after %v", heard, err, took)
			}
			if len(b.got) != 2 || string(b.got[0]) != get || string(b.got[1]) != get || len(b.hid) != tt.hid {
				t.Errorf("got %q; hidden %q", b.got, b.hid)
			}
		})
	}
}

// TestSilenceOfBoth: nobody else is asked where the client has said nothing that could
// be answered.
func TestSilenceOfBoth(t *testing.T) {
	for _, first := range []string{"", get[:20]} {
		t.Run(fmt.Sprintf("%d bytes", len(first)), func(t *testing.T) {
			t.Parallel()
			b := &bed{T: t, reads: true}
			b.script = []func(*net.TCPConn){
				func(c *net.TCPConn) { b.read(0, len(get), c); _, _ = io.WriteString(c, "first") },
				func(c *net.TCPConn) { _, _ = io.WriteString(c, "second") },
			}
			heard, err := b.run(func(c *net.TCPConn) {
				_, _ = io.WriteString(c, first)
				time.Sleep(2500 * time.Millisecond)
				_, _ = io.WriteString(c, get[len(first):])
			})
			if string(heard) != "first" || err != nil || len(b.got) != 1 {
				t.Errorf("heard %q, %v; got %q", heard, err, b.got)
			}
		})
	}
}

// TestUnsafeWhileTwoAreAsked: what makes it unsafe goes to one server only.
func TestUnsafeWhileTwoAreAsked(t *testing.T) {
	b := &bed{T: t}
	b.script = []func(*net.TCPConn){
		func(c *net.TCPConn) { b.read(0, len(get+post), c); _, _ = io.WriteString(c, "first") },
		func(c *net.TCPConn) { b.read(1, -1, c) },
	}
	heard, err := b.run(func(c *net.TCPConn) {
		_, _ = io.WriteString(c, get)
		for { // until the second one is asked
			b.mu.Lock()
			n := len(b.got)
			b.mu.Unlock()
			if n == 2 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond)
		_, _ = io.WriteString(c, post)
	})
	if string(heard) != "first" || err != nil || string(b.got[0]) != get+post || string(b.got[1]) != get {
		t.Errorf("heard %q, %v; got %q", heard, err, b.got)
	}
}

// TestUnsafeWhileAnotherIsAsked: a server that has ended without a word, and reads
// on, gets nothing of what comes while another one is asked.
func TestUnsafeWhileAnotherIsAsked(t *testing.T) {
	for _, reads := range []bool{false, true} {
		b := &bed{T: t, reads: reads}
		asked := make(chan struct{})
		b.script = []func(*net.TCPConn){
			func(c *net.TCPConn) { _ = c.CloseWrite(); b.read(0, -1, c) },
			func(c *net.TCPConn) { b.read(1, len(post), c); _, _ = io.WriteString(c, "second") },
		}
		b.redial = func() { close(asked); time.Sleep(100 * time.Millisecond) }
		heard, err := b.run(func(c *net.TCPConn) {
			<-asked
			_, _ = io.WriteString(c, post)
		})
		if string(heard) != "second" || err != nil || len(b.got[0]) > 0 || string(b.got[1]) != post {
			t.Errorf("heard %q, %v; got %q", heard, err, b.got)
		}
	}
}

// TestNothingIsLost: a flow that is given on at any moment is whole: large
// requests, late answers, ends.
func TestNothingIsLost(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 20_000) // more than is kept
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprint(plain), func(t *testing.T) {
			b := &bed{T: t, plain: plain}
			b.script = []func(*net.TCPConn){func(c *net.TCPConn) {
				b.read(0, -1, c)
				_, _ = c.Write(b.got[0])
			}}
			heard, err := b.run(func(c *net.TCPConn) { _, _ = c.Write(big); _ = c.CloseWrite() })
			if !bytes.Equal(heard, big) || err != nil {
				t.Errorf("%d bytes came back of %d, %v", len(heard), len(big), err)
			}
		})
	}
	t.Run("an end after a request", func(t *testing.T) {
		b := &bed{T: t}
		b.script = []func(*net.TCPConn){func(c *net.TCPConn) { b.read(0, -1, c); _, _ = io.WriteString(c, "answer") }}
		heard, err := b.run(func(c *net.TCPConn) { _, _ = io.WriteString(c, get); _ = c.CloseWrite() })
		if string(heard) != "answer" || err != nil || string(b.got[0]) != get {
			t.Errorf("heard %q, %v; got %q", heard, err, b.got)
		}
	})
	t.Run("an end without a word", func(t *testing.T) {
		b := &bed{T: t}
		b.script = []func(*net.TCPConn){func(c *net.TCPConn) { b.read(0, -1, c) }}
		heard, err := b.run(func(c *net.TCPConn) { _ = c.CloseWrite() })
		if len(heard) != 0 || err != nil || len(b.got) != 1 {
			t.Errorf("heard %q, %v; %d servers", heard, err, len(b.got))
		}
	})
}

// TestFirst: what was read of the client before is sent as what it sends then, and
// what is not safe goes to one server.
func TestFirst(t *testing.T) {
	for _, tt := range []struct {
		name, first, then string
		want              []string // what each server gets
		rest              bool     // some of it is left to who goes on
	}{
		{"safe", get, "", []string{get, get}, false},
		{"unsafe", post, "more", []string{post + "more"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := &bed{T: t, first: tt.first}
			for n, want := range tt.want {
				b.script = append(b.script, func(c *net.TCPConn) {
					b.read(n, len(want), c)
					if n < len(tt.want)-1 {
						reset(c)
						return
					}
					_, _ = io.WriteString(c, "answer")
				})
			}
			heard, err := b.run(say(tt.then))
			var got []string
			for _, g := range b.got {
				got = append(got, string(g))
			}
			if string(heard) != "answer" || err != nil || !slices.Equal(got, tt.want) || (len(b.result.Rest) > 0) != tt.rest {
				t.Errorf("heard %q, %v; got %q; left %q", heard, err, got, b.result.Rest)
			}
		})
	}
}

// TestServerThatTakesNothing: what cannot be cut short is not waited for for ever.
func TestServerThatTakesNothing(t *testing.T) {
	b := &bed{T: t, plain: true, small: true}
	b.script = []func(*net.TCPConn){func(c *net.TCPConn) {
		raw, _ := c.SyscallConn()
		ask := func(option int) (n int) {
			_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), uint(option)) })
			return n
		}
		until(t, "nothing more is taken", func() bool { return ask(unix.SIOCINQ) > 0 })
		time.Sleep(200 * time.Millisecond)
		_, _ = io.WriteString(c, "answer")
		until(t, "the flow is given up", func() bool {
			state := 0
			_ = raw.Control(func(fd uintptr) {
				if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
					state = int(info.State)
				}
			})
			return state != unix.BPF_TCP_ESTABLISHED
		})
	}}
	heard, err := b.run(say(strings.Repeat(get, 1500)))
	if string(heard) != "answer" || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client hears %q, %v", heard, err)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	for began := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Errorf("not within 10 s: %s", what)
			return
		}
	}
}
