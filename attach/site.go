package attach

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
)

// # Theory of operation
//
// A site is one network namespace with an attachment for each route. Home's is
// driven by Manager.Run: the kernel's events say when to look around, errors at
// its begin are fatal.
//
// Every other site has a goroutine of its own from the time that the selector
// first sees a selected task inside, and is in one of these states:
//
//	gated     nothing is known yet: a task was forked there, and has not reached
//	          its exec or first socket. What sets the namespace up is at work.
//	offline   its main table has no default route: there is nothing to capture.
//	          Admitted, without a device; looked at again each second and when
//	          a task there execs or opens its first socket. What is closed takes
//	          no default route that comes while cgtun is not there (fence.go).
//	up        attached, and admitted
//	failed    it could not be attached, twice: on_exit decides whether it is admitted
//
// No socket or descriptor of such a namespace is held open, as it would keep it
// alive, but those of its devices (letgo.go). The kernel's events come by sockets of
// home (events.go), and there is a look each second at little; the device says when the
// namespace has ended. The site ends with the namespace, and when the selector sees nobody selected in it
// any more; then all is undone.
//
// A namespace is admitted by what was seen of it after somebody had begun to run there:
// what is seen before can be half of what is set up by then. Who begins during a look
// makes another one follow.
//
// A namespace that is selected by its name is never offline.

const (
	// tick is how often is looked at what no event tells of.
	tick = time.Second
	// probeEvery is how often gateways that stand for each other are asked for.
	probeEvery = 5 * time.Second
	// secondTry is how long after a first failure it is tried once more: who is held
	// waits, and on_exit is asked about only then.
	secondTry = 100 * time.Millisecond
	// restEach is how long a namespace is left alone after a look for each thing seen
	// there above fewThings, and mostRest for how long at most: who makes thousands and
	// changes them all the time is looked at seldom.
	restEach  = 100 * time.Microsecond
	fewThings = 1000
	mostRest  = 3 * time.Second
	// setUpCalm is how long changes are gathered while a namespace is set up and nobody
	// who runs waits.
	setUpCalm = 5 * time.Millisecond
	// idleTime is how long a namespace stays attached without anybody in it.
	idleTime = 5 * time.Second
)

// The states of a site as status shows them.
const (
	StateUp      = "up"
	StateOffline = "offline"
	StateFailed  = "failed"
	StateGated   = "gated"
)

type site struct {
	m  *Manager
	id string
	// container is as State has it.
	container string

	again chan struct{} // holds one token: look again
	begun chan struct{} // holds one token: somebody runs now, and waits; not for home
	end   func()        // lets run return; not for home
	// stopping is closed when all of the Manager ends.
	stopping <-chan struct{}
	// decided is closed when it is known for the first time whether there is
	// anything to capture, and that is captured.
	decided chan struct{}
	decide  func()

	// run's own:
	idle     time.Time     // since when nobody is in it; zero: somebody is
	ended    time.Time     // since when it is ending; zero: it is not
	doubted  bool          // the gate has to be told again
	admitted []int         // the devices that it was told last
	lasted   time.Duration // for how long the last capture was in force
	size     int           // how much the last look saw
	ran      bool          // somebody had begun to run before the last look
	refused  bool          // it could not be attached: nobody has been held since
	isolated map[netip.Addr]verdict
	renewal  renewal // of home's devices
	guarded  guarding
	fences   map[*Route]fence // of a namespace without a way out
	// unblocked: it was looked for what routes left there that were closed once.
	unblocked bool

	mu       sync.Mutex
	ns       netns.Ref             // the way in can be another one later
	news     []cgroupsel.Namespace // one, and one for each selection that names it
	state    string
	err      error  // why it is failed
	said     string // of the last repair
	attached []*Attachment
	since    time.Time
}

func (m *Manager) newSite(ns netns.Ref, id string) *site {
	s := &site{
		m: m, ns: ns, id: id, again: make(chan struct{}, 1), begun: make(chan struct{}, 1), decided: make(chan struct{}),
		state: StateGated, since: time.Now(), fences: map[*Route]fence{},
	}
	s.decide = sync.OnceFunc(func() { close(s.decided) })
	return s
}

func (s *site) home() bool { return s.id == Home }

// seen takes what the selector knows of the namespace now.
func (s *site) seen(news []cgroupsel.Namespace) {
	same := func(a, b cgroupsel.Namespace) bool {
		a.Ref, b.Ref = netns.Ref{}, netns.Ref{}
		return a == b
	}
	ran := s.running()
	s.mu.Lock()
	changed := !slices.EqualFunc(news, s.news, same)
	s.news = news
	if len(news) > 0 {
		s.ns = news[0].Ref
	}
	s.mu.Unlock()
	switch {
	case changed && !s.home() && !ran && s.running():
		signal(s.begun)
	case changed:
		signal(s.again)
	}
}

func (s *site) ref() netns.Ref {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ns
}

func (s *site) set(state string, err error) {
	s.mu.Lock()
	s.state, s.err = state, err
	s.mu.Unlock()
	s.decide()
}

// open begins the attachments of all routes; on an error there are none.
func (s *site) open() error {
	var opened []*Attachment
	for i := range s.m.opts.Routes {
		r := &s.m.opts.Routes[i]
		if r.Kernel && !s.home() {
			continue
		}
		a, err := s.attach(r, i)
		if err != nil {
			return errors.Join(err, closeAll(opened))
		}
		opened = append(opened, a)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attached, s.since = opened, time.Now()
	return nil
}

func (s *site) close() error {
	s.mu.Lock()
	opened := s.attached
	s.attached = nil
	s.mu.Unlock()
	return closeAll(opened)
}

func closeAll(attached []*Attachment) error {
	var errs []error
	for _, a := range slices.Backward(attached) {
		errs = append(errs, a.close())
	}
	return errors.Join(errs...)
}

// run is the life of a site that is not home.
func (s *site) run(ctx context.Context) {
	log := s.m.opts.Logger.With("attachment", s.id)
	defer s.decide()
	failures := 0
	for ctx.Err() == nil {
		online, err := s.judge()
		if err == nil && online {
			s.lasted = 0
			err = s.capture(ctx)
			if s.lasted > 0 {
				failures = 0
			}
		}
		switch {
		case errors.Is(err, netns.ErrGone), ctx.Err() != nil:
			return
		case errors.Is(err, errIdle):
			return
		case errors.Is(err, errOffline):
			continue
		case err != nil && s.lasted > 0:
			// Somebody inside took it apart: it counts as not attached until it is
			// back, and that is at once, but not all the time.
			log.Warn("a namespace is attached anew", "err", err)
			s.set(StateFailed, err)
			if s.lasted > tick {
				continue
			}
		case err != nil && failures == 0:
			failures++
			log.Warn("a namespace with selected processes could not be attached, and is tried once more while they wait", "err", err)
			s.doubt()
			select {
			case <-ctx.Done():
			case <-time.After(secondTry):
			}
			continue
		case err != nil:
			if failures++; failures == 2 {
				log.Error("a namespace with selected processes cannot be attached, trying on", "err", err, "on_exit_closed", s.m.closed())
			}
			s.set(StateFailed, err)
			s.refused = true
			if s.m.refuse(s.ref()) {
				s.guardFrames(nil)
			}
		}
		if s.idles() {
			return
		}
		wait := min(tick<<min(max(failures-1, 0), 4), 10*tick)
		select {
		case <-ctx.Done():
		case <-s.again:
			s.doubt()
			select {
			case <-ctx.Done():
			case <-s.begun:
			case <-time.After(setUpCalm + s.rest()):
			}
		case <-s.begun:
		case <-time.After(wait):
		}
	}
}

// doubt lets nobody begin to send in a namespace that has changed before it was
// looked at again, if a family is left alone in it: it can have a way out now.
func (s *site) doubt() {
	alone := s.alone()
	if s.home() || alone == 0 {
		return
	}
	s.doubted = true
	if err := s.m.opts.Gate.Doubt(s.ref(), alone); err != nil {
		s.m.opts.Logger.Warn("a namespace is looked at again while its processes run", "attachment", s.id, "err", err)
	}
}

// rest is how long it waits for the next look.
func (s *site) rest() time.Duration {
	return min(time.Duration(max(s.size-fewThings, 0))*restEach, mostRest)
}

// alone are the families that are not captured.
func (s *site) alone() (families cgroupsel.Family) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == StateOffline {
		return cgroupsel.V4 | cgroupsel.V6
	}
	for _, a := range s.attached {
		if a.plan.No4 {
			families |= cgroupsel.V4
		}
		if a.plan.No6 {
			families |= cgroupsel.V6
		}
	}
	return families
}

func (s *site) forget() {
	defer s.unfence()
	// Until the selector lets go of all, a stop leaves the gate as it is.
	if !s.stops() {
		s.m.opts.Gate.Forget(s.ref())
	}
}

// judge says whether there is anything to capture in the namespace, and admits
// it if there is not.
func (s *site) judge() (online bool, err error) {
	s.ran = s.begins()
	around, err := s.lookAround()
	if err != nil {
		return false, err
	}
	s.size = around.size
	switch {
	case s.online(around):
		// Before anything else: also what cannot be attached is shut, if it is to be.
		s.guardFrames(around.others)
		return true, nil
	case !s.ran:
		s.set(StateGated, nil)
		return false, nil
	}
	s.guardFrames(nil)
	if err := s.fenceIn(around); err != nil {
		return false, err
	}
	// On a busy machine that has taken its time, and who sets the namespace up can
	// have given it a way out: who is held meanwhile would be let go into it.
	if around, err = s.lookAround(); err != nil {
		return false, err
	}
	if s.online(around) {
		s.guardFrames(around.others)
		return true, nil
	}
	s.set(StateOffline, nil)
	return false, s.m.opts.Gate.Admit(s.ref(), cgroupsel.Admission{Offline: true})
}

// online says whether there is something to capture.
func (s *site) online(around *surroundings) bool {
	return s.named() || around.default4 || around.default6
}

// lookAround is what the namespace has before it is attached.
func (s *site) lookAround() (around *surroundings, err error) {
	err = s.ref().Do(func() (err error) {
		around, err = look("", nil)
		return err
	})
	if err == nil {
		err = s.isolate(around)
	}
	return around, err
}

var (
	// errOffline ends a capture: the namespace has lost its last default route.
	errOffline = errors.New("no default route any more")
	// errIdle ends a site: nobody selected is in the namespace any more.
	errIdle = errors.New("no selected process any more")
)

// capture attaches until ctx ends, the namespace does, or goes offline.
func (s *site) capture(ctx context.Context) error {
	s.doubted, s.ended = true, time.Time{}
	if err := s.open(); err != nil {
		return err
	}
	var began time.Time
	err := s.serve(ctx, func() {
		began = time.Now()
		s.set(StateUp, nil)
		s.m.opts.Logger.Debug("attached", "attachment", s.id)
	})
	if !began.IsZero() {
		s.lasted = time.Since(began)
	}
	if errors.Is(err, netns.ErrGone) && s.there() {
		// Who serves the device, or looks around by it, takes it for the namespace.
		err = errors.New("the device was deleted by somebody")
	}
	if !errors.Is(err, netns.ErrGone) {
		err = errors.Join(err, s.shut())
	}
	if closeErr := errors.Join(s.undo(), s.close()); closeErr != nil {
		s.m.opts.Logger.Warn("something is left in a namespace that is not attached any more", "attachment", s.id, "err", closeErr)
	}
	return err
}

// there says whether the namespace is there, and somebody in it.
func (s *site) there() bool {
	return !errors.Is(s.ref().Do(func() error { return nil }), netns.ErrGone)
}

// shut lets nobody send any more, until the next word or for good; when cgtun
// stops and on_exit is open it lets everything pass instead.
func (s *site) shut() error {
	switch {
	case s.m.closed():
		return s.m.opts.Gate.Deny(s.ref())
	case s.stops():
		return s.m.opts.Gate.Admit(s.ref(), cgroupsel.Admission{})
	}
	return s.m.opts.Gate.Doubt(s.ref(), cgroupsel.V4|cgroupsel.V6)
}

// stops says whether all of the Manager ends.
func (s *site) stops() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// undo takes away what blocks, too, where the namespace is left because nobody
// selected is in it, not because cgtun stops.
func (s *site) undo() error {
	if s.stops() {
		return nil
	}
	var errs []error
	for _, a := range slices.Backward(s.attached) {
		errs = append(errs, a.steering.Undo())
	}
	return errors.Join(errs...)
}

// any says whether something holds of what the selector knows.
func (s *site) any(holds func(cgroupsel.Namespace) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.news, holds)
}

// idles says whether nobody selected has been in the namespace for a while:
// between two steps of a script nothing is taken down.
func (s *site) idles() bool {
	idle := !s.any(func(n cgroupsel.Namespace) bool { return n.All || !n.Idle })
	switch {
	case !idle:
		s.idle = time.Time{}
	case s.idle.IsZero():
		s.idle = time.Now()
	}
	return idle && time.Since(s.idle) > idleTime
}

func (s *site) named() bool { return s.any(func(n cgroupsel.Namespace) bool { return n.All }) }

// begins says whether somebody has begun to run, or can without being held.
func (s *site) begins() bool { return s.refused || s.running() }

func (s *site) running() bool { return s.any(func(n cgroupsel.Namespace) bool { return n.Running }) }
