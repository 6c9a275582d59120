package steer

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"

	"cgtun/internal/netns"
)

// Steering is one instance's steering in one namespace. Safe for concurrent
// use. Who opened it closes it.
//
// It holds a netlink socket of the namespace, which owns the nft table and
// would keep the namespace alive: so it is for home.
type Steering struct {
	ns     netns.Ref
	number int
	owner  bool // ask for an owned table

	mu     sync.Mutex
	table  *table // nil when closed
	plan   *Plan  // in force; nil before the first Apply
	v6     bool
	plain  error // why the table has no owner
	opened bool  // the table is in the kernel
}

// Open prepares the steering of the instance, which is the number of its
// table, and removes what dead instances left in this namespace, of whatever
// number. It makes nothing yet.
func Open(ns netns.Ref, instance string) (*Steering, error) {
	number, err := strconv.Atoi(instance)
	if err != nil || number <= 0 {
		return nil, fmt.Errorf("open steering of instance %q: not the number of a table", instance)
	}
	if err := removeDead(ns); err != nil {
		return nil, fmt.Errorf("remove what dead instances left in %s: %w", ns, err)
	}
	t, err := openTable(ns, number)
	if err != nil {
		return nil, err
	}
	return &Steering{ns: ns, number: number, owner: true, table: t}, nil
}

// Check says, as a *TakenError, whether something that the plan needs is in
// use, its device's name too. It is for the time before the device is made;
// Apply asks again for the rest. After the first Apply it returns nil.
func (s *Steering) Check(p Plan) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.valid(&p); err != nil || s.opened {
		return err
	}
	return s.free(&p, true)
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
	return nil
}

func (s *Steering) free(p *Plan, device bool) error {
	tables, err := ourTables(s.ns)
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name == s.table.ref.Name {
			return s.tableTaken()
		}
	}
	return withRoutes(s.ns, func(h *netlink.Handle) error { return taken(h, p, device) })
}

func (s *Steering) tableTaken() error {
	return &TakenError{
		What:   fmt.Sprintf("table %d", s.number),
		Holder: fmt.Sprintf("cgtun instance %d (nft table inet %s)", s.number, s.table.ref.Name),
	}
}

// Apply makes the namespace be as the plan says, whatever it was before: the
// same call serves the start, a reload, changed addresses and cgroups that
// were made again. The device must exist. Packets see the nft table of before
// or that of after, nothing between.
//
// The first Apply returns a *TakenError, and has changed nothing, if something
// is in use. On another error what the last good Apply made is in force again,
// or nothing.
func (s *Steering) Apply(p Plan) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.valid(&p); err != nil {
		return err
	}
	if !s.opened {
		if err := s.create(&p); err != nil {
			return err
		}
	}
	err := s.apply(&p)
	if err == nil {
		s.plan = &p
		return nil
	}
	if s.plan == nil {
		return errors.Join(err, s.undo())
	}
	return errors.Join(err, s.apply(s.plan))
}

// create makes the empty table, and so takes the number.
func (s *Steering) create(p *Plan) error {
	if err := s.free(p, false); err != nil {
		return err
	}
	err := s.table.create(s.owner)
	var feature *FeatureError
	switch {
	case errors.Is(err, fs.ErrExist):
		return s.tableTaken()
	case errors.As(err, &feature):
		s.plain = feature
	case err != nil:
		return err
	}
	s.opened = true
	return nil
}

// apply goes from the far end to the near: routes, ip rules, then the table
// that makes packets take them. A mark that is not set any more loses its ip
// rule last.
func (s *Steering) apply(p *Plan) error {
	return withRoutes(s.ns, func(h *netlink.Handle) error {
		link, v6, err := setDevice(h, p.Device)
		if err != nil {
			return err
		}
		s.v6 = v6
		if _, err := setRoutes(h, p, link, v6); err != nil {
			return err
		}
		_, stale, err := setRules(h, p, v6)
		if err != nil {
			return err
		}
		if err := s.table.apply(newRuleset(p)); err != nil {
			return err
		}
		return delRules(h, stale)
	})
}

// V6 says whether IPv6 is steered: not where our device has none. Marked v6
// packets are dropped by the guard then.
func (s *Steering) V6() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.v6
}

// Missing returns a *FeatureError if the kernel refused an owned table: Run
// then has more to put back, and more is left after a kill.
func (s *Steering) Missing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plain
}

// Counters are packets that the nft table dropped since the first Apply.
type Counters struct {
	Guard uint64 // marked, and about to leave by another device than ours
	Spoof uint64 // into our device with a source that is not of this namespace
	Stray uint64 // out of our device to somebody else than this namespace's sockets
}

// Counters reads them.
func (s *Steering) Counters() (Counters, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil || !s.opened {
		return Counters{}, nil
	}
	packets, err := s.table.counters()
	return Counters{Guard: packets[countGuard], Spoof: packets[countSpoof], Stray: packets[countStray]}, err
}

// undo takes everything away, the nearest first.
func (s *Steering) undo() error {
	var errs []error
	if s.opened {
		errs = append(errs, s.table.remove())
		errs = append(errs, withRoutes(s.ns, func(h *netlink.Handle) error { return clearRoutes(h, s.number) }))
	}
	s.opened, s.plan = false, nil
	return errors.Join(errs...)
}

// Close undoes what Apply made and closes the socket. Packets that are on
// their way lose their mark; nothing foreign is touched. A second Close does
// nothing.
func (s *Steering) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil {
		return nil
	}
	err := errors.Join(s.undo(), s.table.close())
	s.table = nil
	return err
}
