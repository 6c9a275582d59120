package stack_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/stack"
)

var families = []struct{ name, server string }{{"v4", server4}, {"v6", server6}}

func TestBytesGoBothWays(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			client, server := w.pair(f.server)
			for _, d := range []struct{ from, to net.Conn }{{client, server}, {server, client}} {
				if _, err := d.from.Write([]byte("hello")); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 5)
				if _, err := io.ReadFull(d.to, buf); err != nil || string(buf) != "hello" {
					t.Fatalf("got %q, %v", buf, err)
				}
			}
		})
	}
}

func TestRefusedPortIsRefused(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	for _, f := range families {
		began := time.Now()
		_, err := w.client.Dial("tcp", net.JoinHostPort(f.server, "9"))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: got %v, want connection refused", f.name, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: took %v", f.name, took)
		}
	}
}

func TestReasonsReachTheClient(t *testing.T) {
	for _, tt := range []struct {
		why    flow.Reason
		v4, v6 unix.Errno
	}{
		{flow.NetUnreachable, unix.ENETUNREACH, unix.ENETUNREACH},
		{flow.HostUnreachable, unix.EHOSTUNREACH, unix.EHOSTUNREACH},
		{flow.TimedOut, unix.EHOSTUNREACH, unix.EHOSTUNREACH},
		{flow.Prohibited, unix.EHOSTUNREACH, unix.EACCES},
		{flow.Refused, unix.ECONNREFUSED, unix.ECONNREFUSED},
	} {
		t.Run(tt.why.String(), func(t *testing.T) {
			w := newWorld(t, stack.Options{}, func(context.Context, *flow.Flow) (flow.Conn, error) {
				return nil, &flow.PeerError{Reason: tt.why, Err: errors.New("as the test wants")}
			})
			for i, want := range []unix.Errno{tt.v4, tt.v6} {
				began := time.Now()
				_, err := w.client.Dial("tcp", net.JoinHostPort(families[i].server, "80"))
				if !errors.Is(err, want) {
					t.Errorf("%s: got %v, want %v", families[i].name, err, want)
				}
				// An ICMP error that comes while connect() still has its socket locked
				// is a soft one (tcp_v4_err): then that of the next SYN counts, a second
				// later.
				if took := time.Since(began); took > 8*time.Second {
					t.Errorf("%s: took %v; %+v", families[i].name, took, w.stack.Stats())
				}
			}
		})
	}
}

// The SYN is not answered before the outbound is there, and repeats of it start
// no second dial; a client that closes cancels the dial.
func TestSYNIsHeldAndTheDialEndsWithItsClient(t *testing.T) {
	dials, cancelled := make(chan struct{}, 10), make(chan struct{}, 10)
	w := newWorld(t, stack.Options{}, func(ctx context.Context, _ *flow.Flow) (flow.Conn, error) {
		dials <- struct{}{}
		<-ctx.Done()
		cancelled <- struct{}{}
		return nil, ctx.Err()
	})
	began := time.Now()
	_, err := w.client.DialWith(&net.Dialer{Timeout: 2500 * time.Millisecond}, "tcp", server4+":80")
	if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		t.Fatalf("got %v, want a timeout", err)
	}
	<-dials
	select {
	case <-cancelled:
	case <-time.After(10 * time.Second):
		t.Fatal("the dial goes on without a client")
	}
	if took := time.Since(began); took < 2500*time.Millisecond {
		t.Errorf("cancelled after %v, while the client was still waiting", took)
	}
	if len(dials) != 0 {
		t.Error("a repeated SYN was dialled again")
	}
	labtest.Eventually(t, time.Second, func() bool { return w.stack.Stats().Pending == 0 }, "still pending")
	if got := w.stack.Stats().GaveUp; got != 1 {
		t.Errorf("%d gave up, want 1", got)
	}
}

func TestHalfCloseInBothOrders(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	for _, f := range families {
		for _, firstIsClient := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s client first %v", f.name, firstIsClient), func(t *testing.T) {
				first, second := w.pair(f.server)
				if !firstIsClient {
					first, second = second, first
				}
				up, down := pattern(1<<20, 1), pattern(3<<20, 2)
				before := w.halves.Load()
				go func() {
					first.Write(up)
					first.CloseWrite()
				}()
				if got, err := io.ReadAll(second); err != nil || !bytes.Equal(got, up) {
					t.Fatalf("second read %d bytes, %v, want %d", len(got), err, len(up))
				}
				labtest.Eventually(t, 10*time.Second, func() bool { return w.halves.Load() == before+1 }, "one direction is said to have ended")
				go func() {
					second.Write(down)
					second.CloseWrite()
				}()
				if got, err := io.ReadAll(first); err != nil || !bytes.Equal(got, down) {
					t.Fatalf("first read %d bytes, %v, want %d", len(got), err, len(down))
				}
				if r := w.lastResult(); r.Reason != flow.Closed {
					t.Errorf("ended %v (%v)", r.Reason, r.Err)
				}
			})
		}
	}
}

// A reset arrives as one, after all bytes before it, with the reader slow and
// with a direction that was closed before (CLOSE-WAIT).
func TestResetPassesBothWaysWithAllBytesBefore(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	for _, f := range families {
		for _, fromClient := range []bool{true, false} {
			for _, afterFIN := range []bool{false, true} {
				for _, size := range []int{0, 300_000} {
					t.Run(fmt.Sprintf("%s from client %v after FIN %v %d bytes", f.name, fromClient, afterFIN, size), func(t *testing.T) {
						from, to := w.pair(f.server)
						if !fromClient {
							from, to = to, from
						}
						data := pattern(size, 3)
						if _, err := from.Write(data); err != nil {
							t.Fatal(err)
						}
						awaitSent(t, from)
						if afterFIN {
							from.CloseWrite()
							if got, err := io.ReadAll(to); err != nil || !bytes.Equal(got, data) {
								t.Fatalf("read %d bytes, %v", len(got), err)
							}
							data = nil
						}
						from.SetLinger(0)
						from.Close()
						got, err := readSlowly(to)
						if afterFIN {
							// Reading goes on saying EOF; writing does not.
							err = writeUntilError(to)
						}
						if !bytes.Equal(got, data) {
							t.Errorf("read %d bytes before the reset, want %d", len(got), len(data))
						}
						if !errors.Is(err, unix.ECONNRESET) && !(afterFIN && errors.Is(err, unix.EPIPE)) {
							t.Errorf("got %v, want a reset", err)
						}
						if r := w.lastResult(); r.Reason != flow.Reset {
							t.Errorf("ended %v (%v)", r.Reason, r.Err)
						}
					})
				}
			}
		}
	}
}

// A byte that is sent as urgent keeps its place, both ways.
func TestUrgentByteKeepsItsPlace(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	client, server := w.pair(server4)
	for _, d := range []struct{ from, to *net.TCPConn }{{client, server}, {server, client}} {
		d.to.SetReadDeadline(time.Now().Add(10 * time.Second))
		sendUrgent(t, d.to, d.from, "abc", "d", "efg")
	}
}

// sendUrgent sends three pieces, the second as urgent, each after the one before
// has arrived.
func sendUrgent(t *testing.T, to, from *net.TCPConn, pieces ...string) {
	t.Helper()
	raw, err := from.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	inline(t, to)
	for i, piece := range pieces {
		cerr := raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte(piece), i%2*unix.MSG_OOB, nil) })
		if err = errors.Join(cerr, err); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(piece))
		if n, err := io.ReadFull(to, got); err != nil || string(got) != piece {
			t.Fatalf("from %v: got %q, %v, want %q", from.LocalAddr(), got[:n], err, piece)
		}
	}
}

// inline lets c read urgent bytes like others, if they come as urgent.
func inline(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	if err = errors.Join(cerr, err); err != nil {
		t.Fatal(err)
	}
}

// A reader that stops stops the writer, and loses nothing.
func TestBackPressure(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	for _, fromClient := range []bool{true, false} {
		from, to := w.pair(server4)
		if !fromClient {
			from, to = to, from
		}
		data := pattern(64<<20, 4)
		wrote := make(chan int, 1)
		from.SetWriteDeadline(time.Now().Add(time.Second))
		go func() {
			n, _ := from.Write(data)
			wrote <- n
		}()
		n := <-wrote
		if n == len(data) {
			t.Fatalf("from client %v: %d MiB were taken with nobody reading", fromClient, n>>20)
		}
		from.SetWriteDeadline(time.Now().Add(time.Minute))
		go func() {
			from.Write(data[n:])
			from.CloseWrite()
		}()
		h := sha256.New()
		if m, err := io.Copy(h, to); err != nil || m != int64(len(data)) {
			t.Fatalf("from client %v: read %d bytes, %v", fromClient, m, err)
		}
		if want := sha256.Sum256(data); !bytes.Equal(h.Sum(nil), want[:]) {
			t.Errorf("from client %v: other bytes than were sent", fromClient)
		}
	}
}

// A client that is alive and never reads does not keep a closed connection.
func TestClosedConnectionDoesNotLingerForEver(t *testing.T) {
	w := newWorld(t, stack.Options{TCP: stack.TCPOptions{Linger: 2 * time.Second}}, nil)
	w.client.Sysctl("net.ipv4.tcp_rmem", "4096 16384 16384")
	client, server := w.pair(server4)
	// More than the client's kernel takes unread, less than the stack does.
	if _, err := server.Write(pattern(100_000, 5)); err != nil {
		t.Fatal(err)
	}
	client.CloseWrite()
	server.Close()
	labtest.Eventually(t, 30*time.Second, func() bool {
		return w.stack.Endpoints() == 0
	}, "the endpoint is still there")
	if _, err := io.Copy(io.Discard, client); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("client got %v, want a reset", err)
	}
}

// Many transfers at once, each of its own size, with half-closes in any order
// and some that end with a reset: what arrives is what was sent.
func TestHashedTransfers(t *testing.T) {
	w := newWorld(t, stack.Options{}, nil)
	total, flows := 64<<20, 32
	if raceEnabled {
		total, flows = 4<<20, 8
	}
	var all sync.WaitGroup
	for i := range flows {
		rnd := rand.New(rand.NewPCG(7, uint64(i)))
		f := families[i%2]
		client, server := w.pair(f.server)
		all.Go(func() { transfer(t, client, server, rnd, 2*total/flows) })
	}
	all.Wait()
}

// transfer sends up to size bytes each way.
func transfer(t *testing.T, a, b *net.TCPConn, rnd *rand.Rand, size int) {
	up, down := pattern(rnd.IntN(size), rnd.Uint64()), pattern(rnd.IntN(size), rnd.Uint64())
	seeds := [4]uint64{rnd.Uint64(), rnd.Uint64(), rnd.Uint64(), rnd.Uint64()}
	resetBy := rnd.IntN(6) // 0: a, 1: b, others: nobody
	var sides sync.WaitGroup
	send := func(c *net.TCPConn, data []byte, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		for len(data) > 0 {
			n := min(len(data), 1+r.IntN(100_000))
			if _, err := c.Write(data[:n]); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			data = data[n:]
		}
		c.CloseWrite()
	}
	receive := func(c *net.TCPConn, want []byte, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 2))
		h := sha256.New()
		n, err := io.CopyBuffer(h, struct{ io.Reader }{c}, make([]byte, 1+r.IntN(200_000)))
		sum := sha256.Sum256(want)
		if err != nil || n != int64(len(want)) || !bytes.Equal(h.Sum(nil), sum[:]) {
			t.Errorf("read %d of %d bytes, %v", n, len(want), err)
		}
	}
	sides.Go(func() { send(a, up, seeds[0]) })
	sides.Go(func() { receive(b, up, seeds[1]) })
	sides.Wait() // half-closed: a sends no more
	sides.Go(func() {
		if resetBy != 1 {
			send(b, down, seeds[2])
			return
		}
		b.Write(down)
		awaitSent(t, b)
		b.SetLinger(0)
		b.Close()
	})
	sides.Go(func() {
		if resetBy != 1 {
			receive(a, down, seeds[3])
			return
		}
		if got, err := io.ReadAll(a); !bytes.Equal(got, down) || !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read %d of %d bytes before a reset, %v", len(got), len(down), err)
		}
	})
	sides.Wait()
}

// An open connection that nobody uses for longer than any timer of ours that
// could end it.
func TestIdleConnectionStays(t *testing.T) {
	w := newWorld(t, stack.Options{TCP: stack.TCPOptions{KeepAlive: time.Second}}, nil)
	client, server := w.pair(server4)
	client.SetReadDeadline(time.Now().Add(4 * time.Second))
	if _, err := client.Read(make([]byte, 1)); !isTimeout(err) {
		t.Fatalf("idle connection ended: %v", err)
	}
	client.Write([]byte("x"))
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// A flood of clients that are never answered does not keep a new one from being
// served.
func TestOldestPendingMakesRoom(t *testing.T) {
	w := newWorld(t, stack.Options{TCP: stack.TCPOptions{Pending: 64}}, nil)
	ln := w.server.Listen("tcp", server4+":0")
	defer ln.Close()
	// Nobody answers for these addresses: the dials hang.
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			w.client.DialWith(&net.Dialer{Timeout: 2 * time.Second}, "tcp", fmt.Sprintf("10.7.0.%d:80", 3+i%250))
		})
	}
	labtest.Eventually(t, 5*time.Second, func() bool {
		s := w.stack.Stats()
		return s.Evicted+s.EvictedSource > 0
	}, "nothing was evicted")
	began := time.Now()
	for {
		c, err := w.client.Dial("tcp", ln.Addr().String())
		if err == nil {
			c.Close()
			break
		}
		// In so small a table a burst of repeats can push out anybody.
		if time.Since(began) > 20*time.Second {
			t.Fatal(err)
		}
	}
	if n := w.stack.Stats().Pending; n > 64 {
		t.Errorf("%d pending, bound 64", n)
	}
	all.Wait()
	labtest.Eventually(t, 10*time.Second, func() bool { return w.stack.Stats().Pending == 0 }, "pendings stay")
}

// pattern is n bytes that no other seed has.
func pattern(n int, seed uint64) []byte {
	var key [32]byte
	key[0], key[1], key[2], key[3] = byte(seed), byte(seed>>8), byte(seed>>16), byte(seed>>24)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// awaitSent waits until the peer's kernel, or the stack, has acknowledged all.
func awaitSent(t *testing.T, c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	for range 30_000 {
		left := 0
		raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if left == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("not acknowledged")
}

// readSlowly reads to the end in small pieces.
func readSlowly(c net.Conn) (all []byte, err error) {
	buf := make([]byte, 7000)
	for {
		n, err := c.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			return all, err
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func writeUntilError(c net.Conn) error {
	for {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}
