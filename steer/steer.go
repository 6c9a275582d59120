package steer

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"cgtun/internal/netns"
)

// Steering is one instance's steering in one namespace. Safe for concurrent
// use. Who opened it closes it.
//
// In home it holds a netlink socket, which owns the nft table. In another
// namespace it holds nothing, for that would keep the namespace alive.
type Steering struct {
	ns     netns.Ref
	number int
	before int                              // of the Steering in whose place this one comes; 0: of none
	owner  bool                             // ask for an owned table
	clear  func(*netlink.Handle, int) error // clearRoutes, but for tests

	mu    sync.Mutex
	table *table // nil when closed
	plan  *Plan  // in force; nil before the first Apply
	way   *way   // as it was found last
	dead  map[netip.Addr]bool
	plain error // why the table is less than was asked for
	made  bool  // something of ours may be in the kernel
	over  bool  // it is taken over from a closed run before
	shut  bool  // what a run before left, or a fence, blocks what is marked until the first Apply is through
}

// Open prepares the steering of the instance, which is the number of its
// table, and removes what dead instances left in this namespace, of whatever
// number; what blocks for them stays. It makes nothing yet.
func Open(ns netns.Ref, instance string) (*Steering, error) {
	number, err := strconv.Atoi(instance)
	if err != nil || number <= 0 {
		return nil, fmt.Errorf("open steering of instance %q: not the number of a table", instance)
	}
	return open(ns, number, ns.IsHome())
}

func open(ns netns.Ref, number int, home bool) (*Steering, error) {
	if err := removeDead(ns); err != nil {
		return nil, fmt.Errorf("remove what dead instances left in %s: %w", ns, err)
	}
	t, err := openTable(ns, number, home)
	if err != nil {
		return nil, err
	}
	return &Steering{ns: ns, number: number, owner: true, clear: clearRoutes, table: t, dead: map[netip.Addr]bool{}}, nil
}

// Check says, as a *TakenError, whether something that the plan needs is in
// use, its device's name too. It is for the time before the device is made;
// Apply asks again for the rest. After the first Apply it returns nil.
func (s *Steering) Check(p Plan) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.valid(&p); err != nil || s.made {
		return err
	}
	_, err := s.free(&p, true)
	return err
}

func (s *Steering) valid(p *Plan) error {
	if s.table == nil {
		return fmt.Errorf("steer table %d: %w", s.number, fs.ErrClosed)
	}
	if p.Table != s.number {
		return fmt.Errorf("steer table %d: the plan is for table %d", s.number, p.Table)
	}
	if err := p.validate(); err != nil {
		return fmt.Errorf("steer table %d: %w", s.number, err)
	}
	if s.table.at.away && !p.byTun() {
		return fmt.Errorf("steer table %d in %s: the way %q is served in home only", s.number, s.ns, p.Via)
	}
	return nil
}

// free says whether the plan's numbers are free, and the name of its device if
// that is asked for. What a dead run of this instance left, mine, is no
// obstacle.
func (s *Steering) free(p *Plan, device bool) (mine bool, err error) {
	objects, err := Find(s.ns)
	if err != nil {
		return false, err
	}
	for _, o := range objects {
		if o.Instance != strconv.Itoa(s.number) {
			continue
		}
		if mine = !o.Alive && o.Home == s.table.at.home; !mine {
			return false, s.tableTaken()
		}
	}
	ours := []int{s.before}
	if mine {
		ours = append(ours, s.number)
	}
	return mine, withRoutes(s.ns, func(h *netlink.Handle) error { return taken(h, p, device, ours...) })
}

// Number is that of its table.
func (s *Steering) Number() int { return s.number }

// CanBe says, as a *TakenError, whether something that another plan needs is in
// use by others. It may be for another table.
func (s *Steering) CanBe(p Plan) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := p.validate(); err != nil {
		return err
	}
	if p.Table != s.number {
		objects, err := Find(s.ns)
		if err != nil {
			return err
		}
		for _, o := range objects {
			if o.Instance == strconv.Itoa(p.Table) {
				return &TakenError{What: fmt.Sprintf("table %d", p.Table), Holder: "cgtun instance " + o.Instance}
			}
		}
	}
	return withRoutes(s.ns, func(h *netlink.Handle) error { return taken(h, &p, false, s.number) })
}

// Renumber puts a plan for another table in force beside what is, and takes that
// away then: no packet finds neither. It returns the Steering of the new table,
// and closes this one; without a new one this one is in force as before.
func (s *Steering) Renumber(p Plan) (*Steering, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, err := open(s.ns, p.Table, !s.table.at.away)
	if err != nil {
		return nil, err
	}
	next.before = s.number
	if err := next.Apply(p); err != nil {
		return nil, errors.Join(err, next.Close())
	}
	next.before = 0
	err = errors.Join(s.undoAll(), s.table.close())
	s.table = nil
	// Rules of both tables that look alike are one rule, which went with the old.
	_, errRepair := next.Repair()
	return next, errors.Join(err, errRepair)
}

func (s *Steering) tableTaken() error {
	return &TakenError{
		What:   fmt.Sprintf("table %d", s.number),
		Holder: fmt.Sprintf("cgtun instance %d (nft table inet %s)", s.number, s.table.ref.Name),
	}
}

// Apply makes the namespace be as the plan says, whatever it was before: the
// same call serves the start, a reload, changed addresses and cgroups that
// were made again. Our own device must exist; another way may come later, see
// Down. Packets see the nft table of before or that of after, nothing between.
//
// The first Apply returns a *TakenError, and has changed nothing, if something
// is in use. On another error what the last good Apply made is in force again,
// or nothing; what a run before has closed stays closed, if the plan is.
func (s *Steering) Apply(p Plan) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.valid(&p); err != nil {
		return err
	}
	if !s.made {
		if err := s.claim(&p); err != nil {
			return err
		}
	}
	err := s.apply(&p)
	if err == nil {
		s.plan = &p
		return nil
	}
	switch {
	case s.plan != nil:
		return errors.Join(err, s.apply(s.plan))
	case s.over && p.Closed && s.before != 0:
		return err // it blocks, as it did while the Steering before was in force
	case s.over && p.Closed:
		s.shut = p.byTun()
		return errors.Join(err, s.block(&p))
	}
	return errors.Join(err, s.undo())
}

// claim takes the number: in home by making the empty table.
func (s *Steering) claim(p *Plan) error {
	mine, err := s.free(p, false)
	if err != nil {
		return err
	}
	s.over = mine && p.Closed
	s.shut = s.over && p.byTun() // another way leads on without us
	if !s.table.at.away {
		if mine && !p.Closed {
			// It cannot be made into one that ends with us. The routes block
			// until the new one is whole.
			if err := s.table.remove(); err != nil {
				return err
			}
		}
		if err := s.create(p); err != nil {
			return err
		}
	}
	s.made = true
	return nil
}

func (s *Steering) create(p *Plan) error {
	err := s.table.create(s.owner, p.Closed)
	var feature *FeatureError
	switch {
	case errors.Is(err, fs.ErrExist):
		return s.tableTaken()
	case errors.As(err, &feature):
		s.plain = feature
	case err != nil:
		return err
	}
	return nil
}

// apply goes from the far end to the near: routes, ip rules, then the table
// that makes packets take them. A mark that is not set any more loses its ip
// rule last. Where marks are set already, and blocked, it is opened when the table
// knows the device: who has gone by an answer that comes out of it is told of by an
// ICMP error of the kernel, which finds its way by the table alone.
func (s *Steering) apply(p *Plan) error {
	return withRoutes(s.ns, func(h *netlink.Handle) error {
		w, err := s.findWay(h, p)
		if err != nil {
			return err
		}
		first := w
		if s.shut {
			first = &way{down: errors.New("the table is not written yet")}
		}
		if _, err := setRoutes(h, p, first); err != nil {
			return err
		}
		_, stale, err := setRules(h, p, w)
		if err != nil {
			return err
		}
		if s.plan != nil && s.plan.Closed != p.Closed && !s.table.at.away {
			// A table is for life what it was made as.
			if err := errors.Join(s.table.remove(), s.create(p)); err != nil {
				return err
			}
		}
		if err := s.table.apply(newRuleset(p, w, s.table.at)); err != nil {
			return err
		}
		if s.shut {
			if _, err := setRoutes(h, p, w); err != nil {
				return err
			}
			s.shut = false
		}
		s.way = w
		return delRules(h, stale)
	})
}

// V6 says whether IPv6 goes the plan's way now: not where our device has none.
// Marked v6 packets are dropped by the guard then.
func (s *Steering) V6() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan != nil && !s.plan.No6 && s.way.carries(true)
}

// Down says why nothing goes the plan's way now: its device or gateway is not
// there. Repair puts it in force when it has come. It is nil for our own device.
func (s *Steering) Down() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.way == nil {
		return nil
	}
	return s.way.down
}

// Link returns the index of the device by which what is marked leaves now, 0:
// by none.
func (s *Steering) Link() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.way == nil || s.way.down != nil {
		return 0
	}
	return s.way.link
}

// Missing returns a *FeatureError if the kernel refused an owned table: Repair
// then has more to put back, and more is left after a kill.
func (s *Steering) Missing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plain
}

// Counters are packets that the nft table dropped since the first Apply.
type Counters struct {
	Guard uint64 // marked, and about to leave by another device than ours
	Spoof uint64 // to be captured, with a source that is not of here
	Stray uint64 // out of our device to somebody whom it is not for
}

// Counters reads them.
func (s *Steering) Counters() (Counters, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil || s.plan == nil {
		return Counters{}, nil
	}
	packets, err := s.table.counters()
	return Counters{Guard: packets[countGuard], Spoof: packets[countSpoof], Stray: packets[countStray]}, err
}

// undoTries is how often Close tries to undo what the kernel refuses to let
// go, and undoPause the time between.
const (
	undoTries = 3
	undoPause = 50 * time.Millisecond
)

// undo takes everything away, the nearest first. What a failure leaves is what
// the next call takes.
func (s *Steering) undo() error {
	if !s.made {
		return nil
	}
	s.plan, s.way = nil, nil
	err := errors.Join(
		s.table.remove(),
		withRoutes(s.ns, func(h *netlink.Handle) error { return s.clear(h, s.number) }),
	)
	if errors.Is(err, netns.ErrGone) {
		err = nil // and all with it
	}
	s.made, s.over = err != nil, false
	return err
}

// block leaves nothing but what blocks: marked packets, and no way for them.
func (s *Steering) block(p *Plan) error {
	err := withRoutes(s.ns, func(h *netlink.Handle) error {
		w := &way{down: errors.New("cgtun does not run")}
		_, routes := setRoutes(h, p, w)
		_, stale, rules := setRules(h, p, w)
		table := s.table.apply(newRuleset(p, w, s.table.at)) // if not, that of before marks
		return errors.Join(routes, rules, table, delRules(h, stale))
	})
	if errors.Is(err, netns.ErrGone) {
		return nil
	}
	return err
}

// Undo takes away what Apply made, a closed block too: it is for a namespace
// that lives on and has nobody selected any more. The Steering can be used
// again.
func (s *Steering) Undo() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil {
		return nil
	}
	return s.undoAll()
}

func (s *Steering) undoAll() (err error) {
	for try := range undoTries {
		if try > 0 {
			time.Sleep(undoPause)
		}
		if err = s.undo(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("take steering of table %d out of %s (\"cgtun cleanup\" removes what is left): %w", s.number, s.ns, err)
}

// Close undoes what Apply made and closes the socket. Packets that are on
// their way lose their mark; nothing foreign is touched. Of a closed plan it
// leaves what blocks. A second Close does nothing, or tries again what the
// first one could not.
func (s *Steering) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil {
		return nil
	}
	if p := s.plan; p != nil && p.Closed || p == nil && s.over {
		var err error
		if p != nil {
			err = s.block(p)
		}
		err = errors.Join(err, s.table.close())
		s.table = nil
		return err
	}
	err := s.undoAll()
	err = errors.Join(err, s.table.close())
	if s.made {
		// An owned table is gone with the socket; what is left needs none.
		s.table.hold = nil
		return err
	}
	s.table = nil
	return err
}
