package dialer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cgtun/flow"
)

// pipeConn is a conn of no network, so that a test has a time of its own.
type pipeConn struct{ net.Conn }

func (pipeConn) CloseWrite() error { return nil }
func (pipeConn) Reset() error      { return nil }

// A proxy that does not take our account is left alone for a minute: the flows
// are refused at once, one line says so. Then one dial at a time asks again,
// and the first that is let in ends it.
func TestAccountThatIsNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := false
		next := &scripted{name: "direct"}
		next.dial = func(context.Context, netip.AddrPort) (*Conn, error) {
			if good && next.dials.Load()%2 == 0 {
				return nil, &Error{Hop: "direct", Op: "connect", Addr: netip.MustParseAddrPort("192.0.2.9:3128"), Err: errors.New("no route")}
			}
			ours, theirs := net.Pipe()
			go func() {
				defer theirs.Close()
				readRequest(theirs)
				answer := "HTTP/1.1 407 No\r\n\r\n"
				if good {
					answer = "HTTP/1.1 200 OK\r\n\r\n"
				}
				_, _ = io.WriteString(theirs, answer)
				_, _ = io.Copy(io.Discard, theirs) // a pipe with one end has no deadlines
			}()
			return &Conn{Conn: pipeConn{ours}}, nil
		}
		var log bytes.Buffer
		p, err := NewProxy(Config{Name: "relay", Type: TypeHTTP, Server: "192.0.2.9:3128"}, next, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		// Somebody's own proxy is reached by it: what it says is not that one's.
		far, err := NewProxy(Config{Name: "far", Type: TypeHTTP, Server: "192.0.2.10:3128", Via: "relay"}, p, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		dial := func(o Outbound) error {
			t.Helper()
			c, err := o.DialStream(t.Context(), somewhere)
			if err == nil {
				_ = c.Close()
			}
			return err
		}
		began := time.Now()
		for time.Since(began) < 4*time.Minute-time.Second {
			if err := errors.Join(dial(p), dial(far)); flow.ReasonOf(err) != flow.Prohibited || !errors.Is(err, ErrAccount) {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := next.dials.Load(); n != 4 {
			t.Errorf("%d dials in four minutes, want 4", n)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "outbound=relay") {
			t.Errorf("the log has %d lines:\n%s", n, log.String())
		}
		if why := p.Refused(); !strings.Contains(why, "407") || far.Refused() != "" {
			t.Errorf("refused: %q, and who leads through it %q", why, far.Refused())
		}
		log.Reset()
		next.dials.Store(1)
		good = true
		time.Sleep(2 * time.Second)
		// The proxy is not reached: nobody has looked at the account.
		if err := dial(p); flow.ReasonOf(err) == flow.Prohibited {
			t.Errorf("the dial that asks again: %v", err)
		}
		if err := dial(p); flow.ReasonOf(err) != flow.Prohibited {
			t.Errorf("a dial beside it: %v", err)
		}
		time.Sleep(lockedAgain)
		if err := dial(p); err != nil {
			t.Errorf("the account is taken: %v", err)
		}
		if why := p.Refused(); why != "" {
			t.Errorf("still refused: %s", why)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "is back") {
			t.Errorf("the log has %d lines:\n%s", n, log.String())
		}
	})
}

// What was on its way when the account was refused ends no spell.
func TestLateSuccessEndsNoSpell(t *testing.T) {
	l := lockout{name: "relay", log: slog.New(slog.DiscardHandler)}
	early, err := l.enter(lockDial{})
	if err != nil {
		t.Fatal(err)
	}
	pass, _ := l.enter(lockDial{})
	l.leave(pass, lockDial{}, &Error{Hop: "relay", Err: &denied{text: "407"}})
	l.leave(early, lockDial{}, nil)
	if _, err := l.enter(lockDial{}); err == nil {
		t.Error("the account is asked for again")
	}
}

// Which targets are asked for is the clients' choice: by one that the proxy wants
// another account for, no client takes the outbound from the others. Where it is the
// account that is refused, it is refused for all.
func TestRefusedTargetLeavesTheOutbound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := lockout{name: "relay", log: slog.New(slog.DiscardHandler)}
		no := &Error{Hop: "relay", Op: "ask", Err: &denied{text: "407", asked: true}}
		asked := 0
		dial := func(to, by string, err error) error {
			d := lockDial{lockTarget{addr: netip.MustParseAddrPort(to)}, lockSource{attachment: by}}
			pass, kept := l.enter(d)
			if kept != nil {
				return kept
			}
			asked++
			l.leave(pass, d, err)
			return err
		}
		const good, good2, bad, bad2 = "198.51.100.1:443", "198.51.100.2:443", "198.51.100.3:443", "198.51.100.4:443"

		// Nobody has been let in yet: the account may be wrong, and its proxy is left
		// alone; but by another source's success the first one's refusal was its own.
		_ = dial(bad, "hostile", no)
		if err := dial(good, "hostile", nil); !errors.Is(err, ErrAccount) {
			t.Errorf("the same source again: %v", err)
		}
		if err := dial(good, "other", nil); !errors.Is(err, ErrAccount) {
			t.Errorf("another source within %v: %v", lockedAgain, err)
		}
		time.Sleep(lockedAgain)
		if err := dial(good, "other", nil); err != nil {
			t.Errorf("another source: %v", err)
		}
		if l.state() != "" {
			t.Error("the outbound is out though the proxy takes its account")
		}

		// From now on a refused target is out alone.
		for range 600 {
			if err := dial(bad2, "hostile", no); !errors.Is(err, ErrAccount) {
				t.Errorf("a refused target: %v", err)
			}
			if err := errors.Join(dial(good, "other", nil), dial(good2, "hostile", nil)); err != nil {
				t.Fatalf("beside a refused target: %v", err)
			}
			asked -= 2
			time.Sleep(lockedFor / 300)
		}
		if want := 2 + 2; asked != want {
			t.Errorf("refused targets were asked for %d times in two minutes, want %d", asked, want)
		}

		// What was let in before is not any more: that is the account.
		_ = dial(good, "other", no)
		for _, by := range []string{"other", "third"} {
			if err := dial(good2, by, nil); !errors.Is(err, ErrAccount) {
				t.Errorf("with an account that is not taken any more: %v", err)
			}
		}

		// Nor does a client keep it out when it is its turn to ask again.
		time.Sleep(lockedFor)
		_ = dial("198.51.100.5:443", "hostile", no)
		time.Sleep(lockedAgain)
		if err := dial(good, "other", nil); err != nil || l.state() != "" {
			t.Errorf("an account that is taken again: %v", err)
		}
	})
}

// With an account that is wrong from the start, many sources ask no more often than
// one in ten seconds.
func TestWrongAccountIsNotAskedForByEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := lockout{name: "relay", log: slog.New(slog.DiscardHandler)}
		no := &Error{Hop: "relay", Op: "ask", Err: &denied{text: "407", asked: true}}
		asked := 0
		for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(100 * time.Millisecond) {
			for by := range 20 {
				d := lockDial{lockTarget{}, lockSource{attachment: string(rune('a' + by))}}
				if pass, err := l.enter(d); err == nil {
					asked++
					l.leave(pass, d, no)
				}
			}
		}
		if asked > 6 {
			t.Errorf("asked %d times in a minute", asked)
		}
	})
}
