// Package attach puts cgtun into network namespaces and takes it out again: it
// owns the order of device, stack, steering and gate in each of them, and its
// reverse, and follows what changes around them: addresses, routes, selected
// cgroups. It also answers whose a flow is, as that is asked in the flow's
// namespace.
//
// It knows neither netstack nor router: cmd says in Options what is to be
// served on the devices.
//
// The order in a namespace is
//
//	device up → Serve running → steering applied → admitted by the gate
//
// and so no packet is steered to where nobody reads, and none leaves a namespace
// that is not attached. It is undone in reverse but for one thing: Serve ends
// first, with RSTs for its clients, while they still find their way.
//
// Home (the namespace that cgtun was started in) is attached from Run's begin to
// its end; what is taken there is Run's error. Every other namespace of the
// selector's picture is attached for as long as it is in it: site.go has how.
//
// See rtnetlink(7) for what is followed and sock_diag(7) for owners.
package attach

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/cgroupsel"
	"cgtun/flow"
	"cgtun/internal/netns"
	"cgtun/steer"
	"cgtun/tun"
)

// Home is the id of the attachments of the namespace that cgtun was started in.
const Home = flow.Home

// calm is how long changes are gathered after one was looked at, at home
// before. A routing daemon makes thousands a second, and each look reads all
// routes.
var calm = 50 * time.Millisecond // a constant, but for tests

const (
	// guardCalm is how long new devices at home are gathered before they are guarded: by
	// then the other end of a link to a container is where it belongs.
	guardCalm = 10 * time.Millisecond
	// busyCalm is how long changes at home are gathered where it was looked at within
	// busyFor: where containers come and go it changes all the time, and each look is at
	// their cost.
	busyCalm = 250 * time.Millisecond
	busyFor  = time.Second
)

// retry is how long what could not be done waits for the next try.
const retry = time.Second

// Route is one way for selected packets, as it is attached in each namespace.
type Route struct {
	Name     string
	Instance string // the number of its table as text
	// Kernel: the way is the kernel's (steer.Via); nothing is served, and home
	// alone is steered.
	Kernel bool
	Tun    tun.Options
	// Plan is what is steered. Device, Cgroups, All and the prefixes of the
	// namespace are filled in.
	Plan steer.Plan
	// OnLink: what is asked of resolvers on home's own networks goes to Plan.Resolver,
	// too, where there is one.
	OnLink bool
}

// Gate is what holds back the selected tasks of namespaces that are not attached
// yet: *cgroupsel.Selector is one. For home only GuardFrames is called, and Admit
// where a route is closed.
type Gate interface {
	// Arm begins to hold back. It is called once, when what was there at the
	// start is attached.
	Arm() error
	// Admit lets the selected tasks of a namespace send.
	Admit(netns.Ref, cgroupsel.Admission) error
	// Doubt holds back who begins to send in a namespace that was admitted, and
	// all that is sent of these families, until the next word.
	Doubt(netns.Ref, cgroupsel.Family) error
	// Deny lets nothing out.
	Deny(netns.Ref) error
	// Forget says that a namespace is of no concern any more.
	Forget(netns.Ref)
	// GuardFrames keeps what selected tasks hand to devices themselves from
	// these, which are all of a namespace, home too, but ours. all is the route
	// that has everything inside, or cgroupsel.AnyCgroup.
	GuardFrames(ns netns.Ref, all int, devices ...cgroupsel.Device) error
}

// noGate holds nobody back.
type noGate struct{}

func (noGate) Arm() error                                            { return nil }
func (noGate) Admit(netns.Ref, cgroupsel.Admission) error            { return nil }
func (noGate) Doubt(netns.Ref, cgroupsel.Family) error               { return nil }
func (noGate) Deny(netns.Ref) error                                  { return nil }
func (noGate) Forget(netns.Ref)                                      {}
func (noGate) GuardFrames(netns.Ref, int, ...cgroupsel.Device) error { return nil }

// Options say what to attach.
type Options struct {
	Routes []Route // at least one
	// Serve moves the packets of a device until ctx ends.
	Serve func(context.Context, *Attachment) error
	Gate  Gate // nil: none
	// HomeChanged is called when links, addresses or routes of home, or the
	// attachments, may have changed. It must not wait; nil: nobody wants to know.
	HomeChanged func()
	// CgroupPath finds the path of a cgroup by its id; nil: none is known.
	CgroupPath func(id uint64) (string, bool)
	// Selection finds the index of the route that selects a cgroup, by its id;
	// nil: none does.
	Selection func(id uint64) (int, bool)
	// Process finds the process of a socket by its cookie, and its program;
	// nil: none is known.
	Process func(cookie uint64) (pid int, program string, ok bool)
	// Isolated says whether a gateway, an address of home, is that of a network
	// whose members are to stay among themselves; nil: none is.
	Isolated func(gateway netip.Addr) (bool, error)
	Logger   *slog.Logger
}

// Manager attaches. Safe for concurrent use.
type Manager struct {
	opts   Options
	again  chan struct{} // holds one token: the picture is new
	picked atomic.Pointer[cgroupsel.Snapshot]
	plans  atomic.Pointer[[]steer.Plan] // of each route: what is wanted now
	// Set before there are other sites.
	holders *cgroupsel.Holders // nil: devices of other namespaces are moved in
	from    netns.Ref          // from there
	deaf    error              // why events tell of home alone

	mu      sync.Mutex
	own     []netip.Prefix                 // home's addresses
	home    *site                          // nil before Run and after
	sites   map[uint64]*site               // all but home, by cookie
	numbers map[int]*site                  // those of which events tell
	left    map[uint64]*cgroupsel.Snapshot // namespaces that were forgotten, and the picture of that time
}

// New returns a Manager that has not attached anything yet.
func New(o Options) *Manager {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Gate == nil {
		o.Gate = noGate{}
	}
	if o.HomeChanged == nil {
		o.HomeChanged = func() {}
	}
	m := &Manager{opts: o, again: make(chan struct{}, 1), sites: map[uint64]*site{}, numbers: map[int]*site{}, left: map[uint64]*cgroupsel.Snapshot{}}
	m.picked.Store(&cgroupsel.Snapshot{})
	plans := make([]steer.Plan, len(o.Routes))
	for i, r := range o.Routes {
		plans[i] = r.Plan
	}
	m.plans.Store(&plans)
	return m
}

// Change puts other plans in force, one for each route, and with them the newest
// picture; it waits until that is so in every namespace that is attached. Via and
// Closed must be as before. The error is that of ctx, or why home is not steered
// as it should be: what was before goes on there, and the caller changes back.
func (m *Manager) Change(ctx context.Context, plans []steer.Plan) error {
	m.plans.Store(&plans)
	m.lookAgain()
	const look = 5 * time.Millisecond
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		if done, err := m.inForce(&plans); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("steer otherwise in all namespaces: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// inForce says whether all attachments have the plans, but for those that fail
// elsewhere than at home.
func (m *Manager) inForce(plans *[]steer.Plan) (done bool, err error) {
	m.mu.Lock()
	sites := slices.Collect(maps.Values(m.sites))
	if m.home != nil {
		sites = append(sites, m.home)
	}
	m.mu.Unlock()
	done = true
	for _, s := range sites {
		s.mu.Lock()
		for _, a := range s.attached {
			switch {
			case a.plans == plans && a.err != nil && s.home() && !a.lost:
				err = a.err
			case a.plans != plans && !a.lost:
				done = false
			}
		}
		s.mu.Unlock()
	}
	return done, err
}

// CanChange says, as a *steer.TakenError, whether something that other plans need
// at home is in use by others. It changes nothing.
func (m *Manager) CanChange(plans []steer.Plan) error {
	m.mu.Lock()
	home := m.home
	m.mu.Unlock()
	if home == nil {
		return errors.New("cgtun is not attached")
	}
	home.mu.Lock()
	defer home.mu.Unlock()
	for _, a := range home.attached {
		plan := plans[a.selection]
		plan.Device = a.deviceName()
		if err := a.steering.CanBe(plan); err != nil {
			return err
		}
	}
	return nil
}

// device is what a route's devices are made as.
func (m *Manager) device(route int) tun.Options {
	o := m.opts.Routes[route].Tun
	o.Table = uint32((*m.plans.Load())[route].Table)
	return o
}

// elsewhere is what they are made as in other namespaces than home.
func (m *Manager) elsewhere(route int) tun.Options {
	o := m.device(route)
	o.From, o.Yield = m.from, true
	return o
}

// Reconcile takes the newest picture of what is selected. It returns at once;
// Run applies it.
func (m *Manager) Reconcile(s cgroupsel.Snapshot) {
	m.picked.Store(&s)
	signal(m.again)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Check says, as a *steer.TakenError, whether something that a route needs at
// home is in use. It changes nothing but what dead instances left, which it
// removes, and is for the time before anything is made.
func Check(r *Route) error {
	ns, err := netns.Home()
	if err != nil {
		return fmt.Errorf("check home: %w", err)
	}
	steering, err := steer.Open(ns, r.Instance)
	if err != nil {
		return err
	}
	plan := r.Plan
	if !r.Kernel {
		plan.Device = r.Tun.Name
	}
	_, err = tun.RemoveLeftovers(ns)
	return errors.Join(steering.Check(plan), err, steering.Close())
}

// Run attaches home, calls ready, and keeps all attachments in force until ctx
// ends. Then it undoes everything. A *steer.TakenError or *tun.TakenError says
// that something was in use at home and nothing was changed.
func (m *Manager) Run(ctx context.Context, ready func()) (err error) {
	ns, err := netns.Home()
	if err != nil {
		return fmt.Errorf("attach home: %w", err)
	}
	closeMakes, err := m.makes()
	if err != nil {
		return err
	}
	defer closeMakes()
	var events events
	if err := ns.Do(func() (err error) { events, err = openEvents(m.wanted()...); return err }); err != nil {
		return err
	}
	defer events.close()
	if m.deaf = events.deaf; m.deaf != nil {
		m.opts.Logger.Warn("other namespaces are looked at each second instead of at once", "err", m.deaf)
	}

	home := m.newSite(ns, Home)
	if err := home.open(); err != nil {
		return err
	}
	m.mu.Lock()
	m.home = home
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.home = nil
		m.mu.Unlock()
		err = errors.Join(err, home.close())
	}()

	ctx, cancel := context.WithCancel(ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer cancel()
	others.Go(func() {
		events.run(ctx, m.opts.Logger, m.changed, func() { m.opts.HomeChanged(); m.lookAgain() })
	})
	others.Go(func() { m.letGo(ctx) })
	return home.serve(ctx, func() {
		m.scan(ctx, &others)
		m.arm(ctx)
		ready()
		others.Go(func() { m.attachOthers(ctx, &others) })
	})
}

// wanted are the events that are followed.
func (m *Manager) wanted() []subscription {
	wanted := []subscription{routeEvents, nftEvents}
	if slices.ContainsFunc(m.opts.Routes, func(r Route) bool { return r.Plan.Via.Chooses() }) {
		wanted = append(wanted, neighbourEvents)
	}
	return wanted
}

// patience is how long a start waits for the namespaces that are there already.
// It goes on without them: the gate holds them back.
const patience = 5 * time.Second

// arm shuts the gate when all that was there is decided about.
func (m *Manager) arm(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	m.mu.Lock()
	sites := slices.Collect(maps.Values(m.sites))
	m.mu.Unlock()
	for _, s := range sites {
		select {
		case <-s.decided:
		case <-ctx.Done():
		}
	}
	if err := m.opts.Gate.Arm(); err != nil {
		m.opts.Logger.Warn("the kernel offers less than is wanted", "err", err)
	}
}

// attachOthers follows the picture until ctx ends.
func (m *Manager) attachOthers(ctx context.Context, work *sync.WaitGroup) {
	var cgroups []cgroupsel.Cgroup
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.again:
		}
		m.scan(ctx, work)
		if now := m.picked.Load().Cgroups; !reflect.DeepEqual(now, cgroups) {
			cgroups = now
			m.lookAgain()
		}
	}
}

// scan begins with the namespaces that are new in the picture and ends with
// those that are not in it any more.
func (m *Manager) scan(ctx context.Context, work *sync.WaitGroup) {
	picked := m.picked.Load()
	listed := map[uint64][]cgroupsel.Namespace{}
	for _, n := range picked.Namespaces {
		if n.Excess != nil {
			continue
		}
		listed[n.Ref.Cookie()] = append(listed[n.Ref.Cookie()], n)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// What was forgotten since this picture was made is not in it.
	maps.DeleteFunc(m.left, func(cookie uint64, of *cgroupsel.Snapshot) bool {
		if of == picked {
			delete(listed, cookie)
		}
		return of != picked
	})
	m.home.seen(listed[m.home.ref().Cookie()])
	delete(listed, m.home.ref().Cookie())
	for cookie, news := range listed {
		if s := m.sites[cookie]; s != nil {
			s.seen(news)
			continue
		}
		m.begin(ctx, work, cookie, news)
	}
	for cookie, s := range m.sites {
		if listed[cookie] == nil {
			s.end()
		}
	}
}

// begin lets a new site run. It is called with the lock held.
func (m *Manager) begin(ctx context.Context, work *sync.WaitGroup, cookie uint64, news []cgroupsel.Namespace) {
	id, container := nameOf(news, netns.Names(), m.opts.CgroupPath)
	s := m.newSite(news[0].Ref, id)
	s.container = container
	s.seen(news)
	m.sites[cookie] = s
	s.stopping = ctx.Done()
	ctx, s.end = context.WithCancel(ctx)
	work.Go(func() {
		defer s.end()
		number := m.number(s)
		s.run(ctx)
		// A picture that comes from now on and has it is of one that is there after all.
		picked := m.picked.Load()
		s.forget()
		m.mu.Lock()
		delete(m.numbers, number)
		delete(m.sites, cookie)
		m.left[cookie] = picked
		m.mu.Unlock()
		signal(m.again) // such a picture can have been looked at already
	})
}

// number lets events tell of a site's namespace. Without them it is looked at
// each second.
func (m *Manager) number(s *site) int {
	n, err := number(s.ref())
	if err != nil {
		m.opts.Logger.Debug("changes of a namespace are not told", "attachment", s.id, "err", err)
		return noNumber
	}
	m.mu.Lock()
	m.numbers[n] = s
	m.mu.Unlock()
	m.opts.HomeChanged()
	return n
}

// Numbers returns the numbers that the attached namespaces have in home: the
// near ends of their veths name them (RTM_NEWNSID of rtnetlink(7)).
func (m *Manager) Numbers() map[int]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	numbers := make(map[int]bool, len(m.numbers))
	for n := range m.numbers {
		numbers[n] = true
	}
	return numbers
}

// refuse lets a namespace that cannot be attached do what on_exit says, and tells
// whether it is open.
func (m *Manager) refuse(ns netns.Ref) (open bool) {
	var err error
	if open = !m.closed(); open {
		err = m.opts.Gate.Admit(ns, cgroupsel.Admission{})
	} else {
		err = m.opts.Gate.Deny(ns)
	}
	if err != nil {
		m.opts.Logger.Warn("the gate could not be told of a namespace that is not attached", "netns", ns.String(), "open", open, "err", err)
	}
	return open
}

// closed says whether what cannot be attached stays shut.
func (m *Manager) closed() bool {
	for i := range m.opts.Routes {
		if m.opts.Routes[i].Plan.Closed {
			return true
		}
	}
	return false
}

// homeMoved takes home's addresses, which are bypassed everywhere.
func (m *Manager) homeMoved(around *surroundings) {
	own := around.own()
	m.mu.Lock()
	moved := !slices.Equal(own, m.own)
	m.own = own
	m.mu.Unlock()
	if moved {
		m.lookAgain()
	}
}

func (m *Manager) homeAddresses() []netip.Prefix {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.own
}

// changed lets the site look again that has this number.
func (m *Manager) changed(number int) {
	if number == noNumber {
		m.opts.HomeChanged()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if number == noNumber {
		signal(m.home.again)
		return
	}
	if s := m.numbers[number]; s != nil {
		signal(s.again)
	}
}

// lookAgain lets every site look at its surroundings.
func (m *Manager) lookAgain() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.home != nil {
		signal(m.home.again)
	}
	for _, s := range m.sites {
		signal(s.again)
	}
}
