package relay

import (
	"cmp"
	"io"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

// down moves what the server sends, then waits until the flow is over.
func (d *direct) down() {
	if !d.downBytes() {
		return
	}
	d.awaitEnd()
}

// downBytes returns true when the server has ended its direction in order.
func (d *direct) downBytes() bool {
	d.await()
	for !d.isOver() {
		d.full, d.eof, d.gone, d.err = false, false, false, nil
		if err := d.raw.Read(d.downFn); err != nil {
			d.err = err
		}
		if d.downEnded() {
			break
		}
	}
	return d.eof && !d.isOver()
}

// downEnded looks at what a wait has brought and says whether down is over.
func (d *direct) downEnded() bool {
	switch {
	case flow.IsDeadline(d.err): // or an end, or news of up
		if d.silent() {
			return true
		}
		d.await()
	case d.err != nil:
		if !d.lost(d.err) {
			d.end(Server, d.err)
		}
		return true
	case d.eof:
		// A write that hears of a reset takes its errno with it. That the pump has
		// noted it cannot be waited for: the state of the socket tells, if up has
		// not ended, which is to be looked at after it.
		reset := state(d.server) == unix.BPF_TCP_CLOSE
		done, failed := d.upState()
		if failed == nil && reset && !done && !d.o.Shut {
			failed = unix.ECONNRESET
		}
		if d.lost(cmp.Or(failed, io.EOF)) {
			return true
		}
		if failed != nil {
			d.end(Server, failed)
			return true
		}
		_ = d.client.CloseWrite()
		d.o.Half()
		return true
	case d.gone:
		// The pump says how, after it has passed on what came before.
		d.pump.Event()
		<-d.over
		return true
	case d.full:
		select {
		case <-d.room:
		case <-d.over:
		}
	}
	return false
}

// fillClient runs when the socket may be readable; false waits for more.
func (d *direct) fillClient(fd uintptr) bool {
	d.fd = int(fd)
	for range maxRounds {
		n, err := unix.IoctlGetInt(d.fd, unix.SIOCINQ)
		if err != nil {
			d.err = err
			return true
		}
		if n == 0 {
			return d.nothingQueued()
		}
		if d.unheard {
			d.unheard = false
			if !d.o.Watcher.ServerSpeaks() {
				d.end(Neither, errLeft)
				return true
			}
		}
		sent, err := d.client.Fill(n, d.readFn)
		d.o.Down.Add(int64(sent))
		if err != nil {
			d.gone = true
			return true
		}
		if sent == 0 {
			d.full = true
			return true
		}
	}
	return true
}

// nothingQueued tells an end from a pause. SIOCINQ is 0 for both.
func (d *direct) nothingQueued() bool {
	n, err := flow.Waiting(uintptr(d.fd))
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return false
	case err != nil:
		d.err = err
	case n == 0:
		d.eof = true
	}
	return true
}

// readServer gives the client the next bytes of the socket, which are there. An
// end in their place would be a kernel's lie, but one that Fill must see as an
// error: it asks until it has all.
func (d *direct) readServer(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, err := syscall.Read(d.fd, b)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		default:
			return n, nil
		}
	}
}

// awaitEnd waits, after the server's end of stream, for that of the client or
// for a reset of the server.
func (d *direct) awaitEnd() {
	for !d.upOver() {
		d.await()
		// Between the look above and this line upEnded may have set its
		// deadline, which is taken back now: look again.
		if d.upOver() {
			return
		}
		d.err = nil
		if err := d.raw.Read(d.resetSeen); err != nil {
			d.err = err
		}
		if !flow.IsDeadline(d.err) {
			d.end(Server, d.err)
		}
	}
}

// upOver ends the flow if up has ended.
func (d *direct) upOver() bool {
	done, failed := d.upState()
	switch {
	case d.isOver():
	case failed != nil:
		d.end(Server, failed)
	case done:
		d.end(Neither, nil)
	default:
		return false
	}
	return true
}

// resetSeen runs on each event of a socket whose stream has ended.
func (d *direct) resetSeen(fd uintptr) bool {
	errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		d.err = err
	case errno != 0:
		d.err = unix.ECONNRESET
	default:
		return false
	}
	return true
}

// await says until when the server is waited for. It never takes back the deadline of
// an end.
func (d *direct) await() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.unheard {
		d.until = time.Time{}
	}
	if !d.ended {
		_ = d.server.SetReadDeadline(d.until)
	}
}

// mayBeSilent notes until when; zero: nothing new.
func (d *direct) mayBeSilent(until time.Time) {
	if until.IsZero() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.until = until
	if !d.ended {
		_ = d.server.SetReadDeadline(until)
	}
}

// silent says whether somebody else goes on, as the server has said nothing until then.
func (d *direct) silent() bool {
	d.mu.Lock()
	late := !d.until.IsZero() && !time.Now().Before(d.until)
	d.mu.Unlock()
	return late && d.lost(nil)
}

// lost says whether somebody else goes on where the server has ended without a word, or,
// by nil, is silent.
func (d *direct) lost(err error) bool {
	if !d.unheard {
		return false
	}
	d.unheard = false
	if d.o.Watcher.ServerEnds(err) {
		return false
	}
	d.lostBy = err
	d.end(Neither, errLeft)
	return true
}
