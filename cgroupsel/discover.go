package cgroupsel

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"cgtun/internal/netns"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// initialPIDs is the inode of the first pid namespace (PROC_PID_INIT_INO).
const initialPIDs = 0xeffffffc

// Admission says how a namespace is known to the gate.
type Admission struct {
	// Offline: it is not steered. When a selected task does exec or opens a
	// socket there, Namespace.Again becomes true.
	Offline bool
	// Devices are the ifindices of the tuns there, or of what a way leads to, by
	// index of the selection: packets with its mark leave by this one alone. 0 or
	// missing: by any.
	Devices []int
}

// NoDevice in an Admission lets packets leave by none.
const NoDevice = -1

// errOwnPIDs is why there are no records: they have the numbers of the first pid
// namespace.
var errOwnPIDs = errors.New("cgtun is in a pid namespace of its own, and would not know the processes")

// fate is what was decided about a namespace.
type fate uint8

const (
	pending  fate = iota // unknown to the gate
	admitted             // Admit
	denied               // Deny, or nothing came in time
	waived               // above the bounds
)

// space is a Namespace with what is done to it.
type space struct {
	Namespace
	fate  fate
	tells bool      // admitted as offline
	since time.Time // when it became pending, with somebody who waits
	seen  time.Time // when a task was last seen in it
}

// spaces finds namespaces, holds tasks and keeps the gate.
type spaces struct {
	s       *Selector
	m       *spaceMaps
	program *spaceProgram
	hooks   hooks // discovery
	all     *link.Iter
	home    uint64        // cookie
	cookies rooted        // what tells the gate which namespace a socket is of; none where the kernel does
	news    chan struct{} // holds one token: the Snapshot is old

	mu     sync.Mutex
	by     map[uint64]*space // by cookie
	exempt map[uint64]bool   // home and select.netns
	holds  bool              // tasks are held; before Run
	armed  time.Time         // since when gate and hold are in force; zero: not
	arms   rooted            // the gate
	excess uint64
	above  bool // some are above the bounds, and that was said
	late   uint64
	lost   uint64 // countLost at the last scan
}

// openSpaces attaches discovery: from here on no namespace is missed. Nothing
// is held or dropped before Arm.
func (s *Selector) openSpaces() (*spaces, error) {
	if err := s.allowed(FeatureTasks); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return nil, fmt.Errorf("stat own pid namespace: %w", err)
	}
	if st.Ino != initialPIDs {
		return nil, errOwnPIDs
	}
	home, err := netns.Home()
	if err != nil {
		return nil, err
	}
	_, closed := s.opts.byExit()
	l, err := s.readLayout()
	if err != nil {
		return nil, err
	}
	t, err := s.readTaskLayout()
	if err != nil {
		return nil, err
	}
	m, err := newSpaceMaps()
	if err != nil {
		return nil, err
	}
	d := &spaces{
		s: s, m: m, home: home.Cookie(), news: make(chan struct{}, 1),
		program: &spaceProgram{sel: s.maps, m: m, l: l, t: t, own: uint32(os.Getpid()), closed: closed},
		by:      make(map[uint64]*space), exempt: make(map[uint64]bool),
	}
	d.findCookies()
	err = d.spare(home)
	if err == nil {
		err = d.attach()
	}
	if err == nil {
		err = d.adopt()
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// lookForSpaces brings what is known of namespaces up to date, and tells
// whether the picture of them changed.
func (s *Selector) lookForSpaces() bool {
	d := s.spaces
	if d == nil {
		return false
	}
	s.mu.Lock()
	named := s.snapshot.Namespaces
	s.mu.Unlock()
	err := d.spareNamed(named)
	news, errScan := d.scan()
	s.note(FeatureTasks, errors.Join(err, errScan))
	return news
}

// spareNamed spares the namespaces of select.netns, and no longer those that
// were in it.
func (d *spaces) spareNamed(named []Namespace) error {
	keep := map[uint64]bool{d.home: true}
	var errs []error
	for _, ns := range named {
		keep[ns.Ref.Cookie()] = true
		errs = append(errs, d.spare(ns.Ref))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for cookie := range d.exempt {
		if !keep[cookie] {
			delete(d.exempt, cookie)
			d.drop(cookie)
		}
	}
	return errors.Join(errs...)
}

// spare makes a namespace one in which nobody is held and nothing dropped.
func (d *spaces) spare(ns netns.Ref) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.exempt[ns.Cookie()] {
		return nil
	}
	if err := d.m.known.Put(ns.Cookie(), known{Flags: knownPass}); err != nil {
		return fmt.Errorf("make namespace %s known: %w", ns, err)
	}
	d.exempt[ns.Cookie()] = true
	delete(d.by, ns.Cookie())
	return nil
}

// attach attaches discovery, with what holds where the kernel lets it.
func (d *spaces) attach() error {
	if err := d.attachExit(); err != nil {
		return err
	}
	held := d.s.allowed(FeatureHold)
	if held == nil {
		held = d.attachTasks(whatAgain | whatHold)
	}
	if d.s.note(FeatureHold, held) {
		d.holds = true
		return d.attachAll()
	}
	return errors.Join(d.attachTasks(whatAgain), d.attachAll())
}

// attachTasks attaches what tells of new tasks. When one acts by itself, in exec
// and sock_create, this is what is done.
func (d *spaces) attachTasks(acts what) (err error) {
	var h hooks
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
			return
		}
		d.hooks = append(d.hooks, h...)
	}()
	for _, tp := range []struct {
		name string
		spec *ebpf.ProgramSpec
	}{
		{"sched_process_fork", d.program.taskProgram("cgtun_fork", 1, 0)},
		{"cgroup_attach_task", d.program.taskProgram("cgtun_moved", 2, 0)},
		{"sched_process_exec", d.program.taskProgram("cgtun_exec", 0, acts)},
	} {
		lk, err := attach(tp.spec, func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachRawTracepoint(link.RawTracepointOptions{Name: tp.name, Program: p})
		})
		if err != nil {
			return fmt.Errorf("tracepoint %s: %w", tp.name, err)
		}
		h = append(h, lk)
	}
	opens, err := attachSockets(d.s.tree.root, []*ebpf.ProgramSpec{d.program.socketProgram(acts)})
	h = append(h, opens...)
	return err
}

// attachAll makes the look at all tasks possible.
func (d *spaces) attachAll() error {
	_, err := attach(d.program.allProgram(), func(p *ebpf.Program) (io.Closer, error) {
		it, err := link.AttachIter(link.IterOptions{Program: p})
		d.all = it
		return it, err
	})
	return err
}

// close detaches everything and lets go who is held. No goroutine of run is
// left when it is called.
func (d *spaces) close() error {
	d.pause()
	errs := []error{d.hooks.Close()}
	d.letGoAll()
	errs = append(errs, d.arms.Close(), d.cookies.Close())
	if d.all != nil {
		errs = append(errs, d.all.Close())
	}
	return errors.Join(append(errs, d.m.Close())...)
}

// see brings in what a record says of a namespace. It reports whether the
// Snapshot is another one now.
func (d *spaces) see(r record) (news bool) {
	d.mu.Lock()
	sp := d.by[r.Cookie]
	// Where nobody is held nothing tells a task that sets the namespace up from
	// one that begins to run in it.
	running := r.Held != 0 || r.Again == 1 || !d.holds || d.armed.IsZero()
	if sp != nil {
		news = sp.Idle || (r.Again == 1 && !sp.Again) || (running && !sp.Running)
		if running && !sp.Running {
			sp.since = time.Now()
		}
		sp.seen, sp.Idle, sp.Again = time.Now(), false, sp.Again || r.Again == 1
		sp.Running = sp.Running || running
	}
	stranger := sp == nil && !d.exempt[r.Cookie]
	d.mu.Unlock()
	if !stranger {
		return news
	}
	ref, ok := enter(r)
	if !ok {
		// It ended or went on to another namespace: the next scan sees what is
		// so by then.
		return false
	}
	now := time.Now()
	sp = &space{Namespace: Namespace{Ref: ref, PID: int(r.PID), Cgroup: r.Cgroup, Running: running}, since: now, seen: now}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.by[r.Cookie] != nil || d.exempt[r.Cookie] {
		return false
	}
	within := d.within()
	sp.Excess = within.above(r.Cgroup)
	d.by[r.Cookie] = sp
	if sp.Excess != nil {
		d.leaveOut(sp)
	}
	return true
}

// visits says whether a record is of who sets a namespace up and is none of those
// who will run in it: dockerd opens sockets and runs iptables in one before its network
// is there. Judged by them it would be without a way out, and open. Who has another cgroup
// and is alone there for Patience is one of those after all.
func (d *spaces) visits(r record) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	sp := d.by[r.Cookie]
	return r.Held != 0 && sp != nil && sp.fate == pending && !sp.Running && r.Cgroup != sp.Cgroup && time.Since(sp.since) < d.s.opts.Patience
}

// enter finds the way into the namespace of a record.
func enter(r record) (netns.Ref, bool) {
	for _, file := range []string{fmt.Sprintf("/proc/%d/ns/net", r.PID), fmt.Sprintf("/proc/%d/task/%d/ns/net", r.PID, r.TID)} {
		if ref, err := netns.Named(file); err == nil && ref.Cookie() == r.Cookie {
			return ref, true
		}
	}
	return netns.Ref{}, false
}

// newest is the newest way into a namespace.
func (d *spaces) newest(ns netns.Ref) netns.Ref {
	if d == nil {
		return ns
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if sp := d.by[ns.Cookie()]; sp != nil {
		return sp.Ref
	}
	return ns
}

// list is Snapshot.Namespaces, in the order of their age.
func (d *spaces) list() []Namespace {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []Namespace
	for _, sp := range d.by {
		all = append(all, sp.Namespace)
	}
	slices.SortFunc(all, func(a, b Namespace) int { return cmp.Compare(a.Ref.Cookie(), b.Ref.Cookie()) })
	return all
}

// tellRun makes Run call changed.
func (d *spaces) tellRun() {
	select {
	case d.news <- struct{}{}:
	default:
	}
}

// changed is ready when the Snapshot is old.
func (d *spaces) changed() <-chan struct{} {
	if d == nil {
		return nil
	}
	return d.news
}
