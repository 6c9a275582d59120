package cgroupsel

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cgtun/internal/netns"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// # Theory of operation: hold
//
// The programs for exec and sock_create stop their own task with SIGSTOP, in
// the kernel, before its first instruction or before its socket is there. They
// do so only while the reader gives signs of life, and write who it is into the
// map held first. An entry goes when the process is let go, or ends.
//
// The entry is there a little before the signal is: who is let go in between
// would be stopped after it, for good. So the program looks for its entry again
// after the signal, and continues its task itself if it has been taken out.
//
// Whoever takes an entry out lets the process go (SIGCONT):
//
//	Admit, Deny   those in that namespace
//	the reader    one whose namespace was decided about meanwhile
//	watchHeld     each that is held for longer than Patience: it waits for no
//	              lock and for no other goroutine
//	close         all
//	the kernel    one whose parent, or another before it in its session, ends
//
// and after a kill the next start (hold_find.go). A process that others stopped
// is never in held, and so is never continued.
//
// A hold shows to nobody but an interactive shell, which says "Stopped" of a
// job that it waits for, and gets the prompt back. Nor does it kill: a process
// group that is orphaned while one of it is stopped is sent SIGHUP, so who is held
// goes on before that happens (spareOrphans).

// errHome is what Deny says of namespaces that have no gate.
var errHome = errors.New("home and select.netns have no gate")

// Arm shuts the gate and begins to hold: it is for the time when all of the
// first Snapshot's namespaces are admitted or denied. Then it looks once more;
// what it finds is in the next Snapshot. A FeatureError says what this kernel
// does not have; the rest is in force. To call it again does nothing.
func (s *Selector) Arm() error {
	d := s.spaces
	if d == nil {
		return nil
	}
	d.mu.Lock()
	if !d.armed.IsZero() {
		d.mu.Unlock()
		return nil
	}
	d.armed = time.Now()
	d.mu.Unlock()
	// The gate is open without a sign of life.
	d.alive()
	err := s.allowed(FeatureGate)
	if err == nil {
		d.arms, err = s.attachRoot(func(others []int32) []*ebpf.ProgramSpec {
			return []*ebpf.ProgramSpec{d.program.gateProgram(others)}
		})
	}
	errs := []error{s.missing(FeatureGate, err), d.settle()}
	_, err = d.scan()
	d.tellRun()
	return errors.Join(append(errs, err)...)
}

// Admit makes a namespace known to the gate, and lets go who is held in it: it
// is attached, or was judged offline. Again and again is fine; the newest
// Admission counts.
func (s *Selector) Admit(ns netns.Ref, a Admission) error {
	d := s.spaces
	if d == nil {
		return nil
	}
	flags := uint32(knownPass)
	if a.Offline {
		flags |= knownTell
	}
	marks := s.marks()
	d.mu.Lock()
	defer d.mu.Unlock()
	// The guards come first: nothing may pass before they are there.
	for i, mark := range marks {
		key := guardKey{Cookie: ns.Cookie(), Mark: mark}
		device := uint32(0)
		if i < len(a.Devices) {
			device = uint32(a.Devices[i])
		}
		if err := d.m.setGuard(key, device); err != nil {
			return fmt.Errorf("admit %s: %w", ns, err)
		}
	}
	if err := d.m.known.Put(ns.Cookie(), known{Flags: flags}); err != nil {
		return fmt.Errorf("admit %s (at most %d): %w", ns, maxKnown, err)
	}
	d.decide(ns, admitted, a.Offline)
	return nil
}

// Deny shuts the gate for selected tasks in a namespace, and lets go who is
// held in it. The namespace stays in the Snapshot.
func (s *Selector) Deny(ns netns.Ref) error {
	d := s.spaces
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.exempt[ns.Cookie()] {
		return fmt.Errorf("deny %s: %w", ns, errHome)
	}
	if err := d.m.known.Put(ns.Cookie(), known{Flags: knownShut}); err != nil {
		return fmt.Errorf("deny %s (at most %d): %w", ns, maxKnown, err)
	}
	d.decide(ns, denied, false)
	return nil
}

// Family is of the internet: V4, V6, or both.
type Family uint8

// The families.
const (
	V4 Family = 1 << iota
	V6
)

// Doubt makes an admitted namespace undecided again: something has changed in
// it, and who execs or opens a socket there is held until the next Admit or
// Deny. Until then nothing is sent of these families, which are not captured
// there, or not any more; what is sent of the other one goes on.
func (s *Selector) Doubt(ns netns.Ref, families Family) error {
	d := s.spaces
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	sp := d.by[ns.Cookie()]
	if d.exempt[ns.Cookie()] || sp == nil {
		return nil
	}
	return d.doubt(sp, families)
}

// doubt is Doubt. It wants d.mu.
func (d *spaces) doubt(sp *space, families Family) error {
	var k known
	cookie := sp.Ref.Cookie()
	err := d.m.known.Lookup(cookie, &k)
	switch {
	case err != nil:
	case k.Flags&knownPass != 0:
		err = d.m.known.Put(cookie, known{Flags: k.Flags&^knownTell | families.doubts()})
	default:
		err = d.m.known.Delete(cookie)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("doubt %s: %w", sp.Ref, err)
	}
	sp.fate, sp.since = pending, time.Now()
	return nil
}

// Forget takes a namespace out of the Snapshot: it ended, or nobody is in it
// any more and what was made there is undone. If a selected task is in it after
// all, it comes back as a new one.
func (s *Selector) Forget(ns netns.Ref) {
	if err := s.frames.forget(ns); err != nil {
		s.log.Warn("forget the devices of a namespace", "netns", ns.String(), "err", err)
	}
	d := s.spaces
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.exempt[ns.Cookie()] {
		return
	}
	d.drop(ns.Cookie())
	d.letGoIn(ns.Cookie())
}

// decide notes what was decided, and lets go. It wants d.mu.
func (d *spaces) decide(ns netns.Ref, f fate, tells bool) {
	if sp := d.by[ns.Cookie()]; sp != nil {
		sp.fate, sp.tells, sp.Again = f, tells, false
	}
	d.letGoIn(ns.Cookie())
}

// doubts are the flags of the families in known.
func (f Family) doubts() (flags uint32) {
	if f&V4 != 0 {
		flags |= knownDoubt4
	}
	if f&V6 != 0 {
		flags |= knownDoubt6
	}
	return flags
}

// giveUp lets those go who are held in a namespace, if nothing was decided about
// it meanwhile. The gate stays shut: what is not attached yet is not impossible to
// attach, and a datagram lost is less than one that leaks.
func (d *spaces) giveUp(cookie uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	sp := d.by[cookie]
	if sp == nil || d.decided(cookie) {
		return
	}
	if err := d.m.known.Put(cookie, known{Flags: knownShut}); err != nil {
		d.s.log.Warn("too many namespaces for the gate", "limit", maxKnown, "err", err)
	}
	d.late++
	sp.fate = denied
	d.letGoIn(cookie)
	d.s.log.Warn("a namespace was not attached in time: who is in it goes on, and sends nothing before that", "netns", sp.Ref.String())
}

// watch keeps the deadlines of namespaces until ctx ends, and makes good for
// lost records without waiting for Run.
func (d *spaces) watch(ctx context.Context) {
	everyWatch(ctx, func() {
		if d.lose() {
			if news, err := d.scan(); err != nil || news {
				d.tellRun()
			}
		}
		for _, cookie := range d.overdue() {
			d.giveUp(cookie)
		}
	})
}

// watchHeld lets go, until ctx ends, who is held for too long. It takes no
// lock.
func (d *spaces) watchHeld(ctx context.Context) {
	everyWatch(ctx, func() {
		at := now()
		for tgid, s := range d.held() {
			// Signed: an entry can be younger than "now".
			if int64(at-s.Since) > int64(d.s.opts.Patience+watchEvery) {
				d.letGo(tgid)
			}
		}
	})
}

// everyWatch calls f every watchEvery until ctx ends.
func everyWatch(ctx context.Context, f func()) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f()
		}
	}
}

// overdue lists the namespaces that are undecided for too long. Before Arm
// none is: nothing is dropped either.
func (d *spaces) overdue() (cookies []uint64) {
	patience := d.s.opts.Patience
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.armed.IsZero() {
		return nil
	}
	for cookie, sp := range d.by {
		// Nobody waits before one runs.
		if sp.fate == pending && sp.Running && time.Since(sp.since) > patience && time.Since(d.armed) > patience {
			cookies = append(cookies, cookie)
		}
	}
	return cookies
}

// held are the processes that are stopped now.
func (d *spaces) held() map[uint32]stopped {
	all := make(map[uint32]stopped)
	var tgid uint32
	var s stopped
	// One that comes or goes meanwhile may be missed: watch looks again.
	for it := d.m.held.Iterate(); it.Next(&tgid, &s); {
		all[tgid] = s
	}
	return all
}

// letGoIn lets those go who are held in a namespace. It wants d.mu.
func (d *spaces) letGoIn(cookie uint64) {
	for tgid, s := range d.held() {
		if s.Cookie == cookie {
			d.letGo(tgid)
		}
	}
}

// noteStop lets a process go that was held while its namespace was decided about, or
// that only visits it: the gate stays shut. A record can be old: by now somebody else can have stopped the process, or it
// can be held in another namespace.
func (d *spaces) noteStop(r record, visits bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var s stopped
	if d.m.held.Lookup(r.PID, &s) == nil && s.Cookie == r.Cookie && (visits || d.decided(r.Cookie)) {
		d.letGo(r.PID)
	}
}

func (d *spaces) letGoAll() {
	for tgid := range d.held() {
		d.letGo(tgid)
	}
}

// letGo continues a process that is held. The entry goes with a process that
// ends, before another can have its number: so if it is still there after the
// pidfd was opened, the pidfd is that of the process which was stopped. And it
// is taken out before the signal: the process can be held again right after.
func (d *spaces) letGo(tgid uint32) {
	fd, err := unix.PidfdOpen(int(tgid), 0)
	if err == nil {
		defer unix.Close(fd)
	}
	if d.m.held.Delete(tgid) == nil {
		d.signal(tgid, fd, err)
	}
}

// signal continues a process by its pidfd; err says why there is none.
func (d *spaces) signal(tgid uint32, fd int, err error) {
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		// No descriptor is left: it is stopped and can hardly have ended.
		err = unix.Kill(int(tgid), unix.SIGCONT)
	} else {
		err = unix.PidfdSendSignal(fd, unix.SIGCONT, nil, 0)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		d.s.log.Error("a held process could not be continued", "pid", tgid, "err", err)
	}
}
