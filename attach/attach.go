// Package attach puts cgtun into a network namespace and takes it out again:
// it owns the order of device, stack, steering, and its reverse, and follows
// what changes around them: addresses, connected routes, selected cgroups. It
// also answers whose a flow is, as that is asked in the flow's namespace.
//
// It knows neither netstack nor router: cmd says in Options what is to be
// served on the device.
//
// The order is
//
//	device up → Serve running → steering applied
//
// and so no packet is steered to where nobody reads. It is undone in reverse
// but for one thing: Serve ends first, with RSTs for its clients, while they
// still find their way.
//
// See rtnetlink(7) for what is followed and sock_diag(7) for owners.
package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
	"cgtun/steer"
	"cgtun/tun"
)

// Home is the id of the attachment of the namespace that cgtun was started in.
const Home = "home"

// calm is how long changes are gathered after one was looked at. A routing
// daemon makes thousands a second, and each look reads all routes.
const calm = 50 * time.Millisecond

// retry is how long a plan that could not be applied waits for the next try.
const retry = time.Second

// Attachment is ours in one network namespace.
type Attachment struct {
	ID     string
	NS     netns.Ref
	Device *tun.Device
	Since  time.Time

	around atomic.Pointer[surroundings] // the newest; never nil
	asker  *asker
}

// Local says whether an address is one of the namespace's own. It allocates
// nothing and may be called for each packet.
func (a *Attachment) Local(addr netip.Addr) bool {
	_, ok := a.around.Load().local[addr]
	return ok
}

// newAttachment returns one that knows nothing of its surroundings yet. Who
// made it closes its asker and its device.
func newAttachment(id string, ns netns.Ref, device *tun.Device) (*Attachment, error) {
	a := &Attachment{ID: id, NS: ns, Device: device, Since: time.Now()}
	a.around.Store(&surroundings{})
	err := ns.Do(func() (err error) {
		a.asker, err = openAsker()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", id, err)
	}
	return a, nil
}

// Options say what to attach.
type Options struct {
	Instance string // the table's number as text
	Tun      tun.Options
	// Plan is what is steered. Device, Cgroups and the connected prefixes
	// are filled in.
	Plan steer.Plan
	// Serve moves the packets of the device until ctx ends.
	Serve func(context.Context, *Attachment) error
	// CgroupPath finds the path of a cgroup by its id; nil: none is known.
	CgroupPath func(id uint64) (string, bool)
	// Process finds the process of a socket by its cookie, and its program;
	// nil: none is known.
	Process func(cookie uint64) (pid int, program string, ok bool)
	Logger  *slog.Logger
}

// State is an attachment as status shows it.
type State struct {
	ID        string
	NetnsIno  uint64
	Device    string
	Addresses []netip.Prefix
	Bypass    []netip.Prefix
	V6        bool
	Err       error // why what is wanted is not in force; nil: it is
	Missing   error // what the kernel does not offer
	Dropped   steer.Counters
	Since     time.Time
}

// Manager attaches. Safe for concurrent use.
type Manager struct {
	opts   Options
	again  chan struct{} // holds one token: look again
	picked atomic.Pointer[cgroupsel.Snapshot]

	mu       sync.Mutex
	home     *Attachment
	steering *steer.Steering
	plan     steer.Plan // in force
	err      error
}

// New returns a Manager that has not attached anything yet.
func New(o Options) *Manager {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Manager{opts: o, again: make(chan struct{}, 1)}
	m.picked.Store(&cgroupsel.Snapshot{})
	return m
}

// Reconcile takes the newest picture of the selected cgroups. It returns at
// once; Run applies it.
func (m *Manager) Reconcile(s cgroupsel.Snapshot) {
	m.picked.Store(&s)
	m.lookAgain()
}

func (m *Manager) lookAgain() {
	select {
	case m.again <- struct{}{}:
	default:
	}
}

// Check says, as a *steer.TakenError, whether something that the plan needs is
// in use. It changes nothing but what dead instances left, which it removes,
// and is for the time before anything is made.
func Check(instance, device string, plan steer.Plan) error {
	ns, err := netns.Home()
	if err != nil {
		return fmt.Errorf("check home: %w", err)
	}
	steering, err := steer.Open(ns, instance)
	if err != nil {
		return err
	}
	plan.Device = device
	_, err = tun.RemoveLeftovers(ns)
	return errors.Join(steering.Check(plan), err, steering.Close())
}

// Run attaches home, calls ready, and keeps the attachment in force until ctx
// ends. Then it undoes everything. A *steer.TakenError or *tun.TakenError says
// that something was in use and nothing was changed.
func (m *Manager) Run(ctx context.Context, ready func()) (err error) {
	ns, err := netns.Home()
	if err != nil {
		return fmt.Errorf("attach home: %w", err)
	}
	steering, err := steer.Open(ns, m.opts.Instance)
	if err != nil {
		return err
	}
	device, err := tun.Open(ns, m.opts.Tun)
	if err != nil {
		return errors.Join(err, steering.Close())
	}
	home, err := newAttachment(Home, ns, device)
	if err != nil {
		return errors.Join(err, steering.Close(), device.Close())
	}
	m.set(home, steering)
	defer func() {
		m.set(nil, nil)
		home.asker.close()
		err = errors.Join(err, steering.Close(), device.Close())
	}()
	return m.serve(ctx, ready)
}

// serve runs what moves packets beside what keeps the steering new, and waits
// for both.
func (m *Manager) serve(ctx context.Context, ready func()) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	served := make(chan error, 1)
	work.Go(func() { served <- m.opts.Serve(ctx, m.home) })
	if err := m.apply(); err != nil {
		return err
	}
	if err := m.steering.Missing(); err != nil {
		m.opts.Logger.Warn("the kernel offers less than is wanted", "err", err)
	}
	work.Go(func() { follow(ctx, m.opts.Logger, m.lookAgain) })
	work.Go(func() {
		if err := m.steering.Run(ctx, m.repaired); err != nil && ctx.Err() == nil {
			m.opts.Logger.Error("steering is not watched any more", "err", err)
		}
	})
	ready()
	again := m.again
	var later, calmed <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-served:
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				err = errors.New("it ended by itself")
			}
			if errors.Is(err, netns.ErrGone) {
				return fmt.Errorf("device %s was deleted by somebody; start cgtun again: %w", m.home.Device.Name(), err)
			}
			return fmt.Errorf("serve attachment %s: %w", Home, err)
		case <-again:
			if !m.refresh() {
				later = time.After(retry)
			}
			again, calmed = nil, time.After(calm)
		case <-calmed:
			again = m.again
		case <-later:
			m.lookAgain()
		}
	}
}

// repaired tells of what others took away from the steering.
func (m *Manager) repaired(what string, err error) {
	if err != nil {
		m.opts.Logger.Error("steering was changed by others and could not be put back", "what", what, "err", err)
		return
	}
	m.opts.Logger.Warn("steering was changed by others and is back", "what", what)
}

// refresh applies what is wanted now and says whether that is in force. What
// fails is said once in a spell.
func (m *Manager) refresh() bool {
	before := m.err // written by apply alone, which runs here alone
	err := m.apply()
	switch {
	case err != nil && before == nil:
		m.opts.Logger.Error("steering could not be renewed, trying on", "attachment", Home, "err", err)
	case err == nil && before != nil:
		m.opts.Logger.Info("steering is in force again", "attachment", Home)
	}
	return err == nil
}

// apply looks around and makes the plan be in force, if it is another one than
// before.
func (m *Manager) apply() error {
	var around *surroundings
	err := m.home.NS.Do(func() (err error) {
		around, err = look(m.home.Device.Name())
		return err
	})
	if err == nil {
		m.home.around.Store(around)
		plan := m.wanted(around)
		if !reflect.DeepEqual(plan, m.plan) {
			if err = m.steering.Apply(plan); err == nil {
				m.mu.Lock()
				m.plan = plan
				m.mu.Unlock()
			}
		}
	}
	m.mu.Lock()
	m.err = err
	m.mu.Unlock()
	return err
}

func (m *Manager) wanted(around *surroundings) steer.Plan {
	plan := m.opts.Plan
	plan.Device = m.home.Device.Name()
	plan.Bypass = slices.Concat(plan.Bypass, around.connected)
	for _, c := range m.picked.Load().Cgroups {
		if c.Present {
			plan.Cgroups = append(plan.Cgroups, steer.Cgroup{Path: c.Path, ID: c.ID, Level: c.Level})
		}
	}
	return plan
}

// set begins with an attachment, of which nothing is in force yet, or ends it.
func (m *Manager) set(home *Attachment, steering *steer.Steering) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.home, m.steering, m.plan, m.err = home, steering, steer.Plan{}, nil
}

// find returns a live attachment, or nil.
func (m *Manager) find(id string) *Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.home == nil || m.home.ID != id {
		return nil
	}
	return m.home
}

// State returns the state of home's attachment, or nil while there is none.
func (m *Manager) State() *State {
	m.mu.Lock()
	home, steering, plan, err := m.home, m.steering, m.plan, m.err
	m.mu.Unlock()
	if home == nil {
		return nil
	}
	s := &State{
		ID: home.ID, NetnsIno: home.NS.Inode(), Device: home.Device.Name(), Addresses: home.Device.Addresses(),
		Bypass: slices.Concat(steer.Builtin(), plan.Bypass), V6: steering.V6(),
		Err: err, Missing: steering.Missing(), Since: home.Since,
	}
	var errCount error
	if s.Dropped, errCount = steering.Counters(); errCount != nil {
		m.opts.Logger.Debug("counters of steering could not be read", "err", errCount)
	}
	return s
}
