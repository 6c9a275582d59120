package attach

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
	"cgtun/steer"
)

// What keeps the attachments of a site in force, at home and elsewhere: it looks
// around whenever something may have changed, and applies what is wanted then.

// serve runs what moves packets beside what keeps the steering new, and waits
// for both. It calls inForce once.
func (s *site) serve(ctx context.Context, inForce func()) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	served := make(chan ended)
	begin := func(a *Attachment) {
		work.Go(func() {
			select {
			case served <- ended{a, s.m.opts.Serve(ctx, a)}:
			case <-ctx.Done(): // nobody asks any more
			}
		})
	}
	for _, a := range s.attached {
		if a.Device != nil {
			begin(a)
		}
	}
	if err := s.apply(); err != nil {
		return err
	}
	if err := s.admit(); err != nil {
		return err
	}
	for _, a := range s.attached {
		if err := errors.Join(a.steering.Missing(), s.cutOlder(a)); err != nil {
			s.m.opts.Logger.Warn("the kernel offers less than is wanted", "err", err)
		}
	}
	every := tick
	if s.home() {
		every = probeEvery
	}
	look := time.NewTicker(every)
	defer look.Stop()
	inForce()
	return s.keep(ctx, begin, served, look.C)
}

// ended is how the serving of an attachment ended.
type ended struct {
	of  *Attachment
	err error
}

// homeCalm is how long changes of home are gathered, by the time since the last look.
func homeCalm(looked time.Duration) time.Duration {
	if looked < busyFor {
		return max(calm, busyCalm)
	}
	return calm
}

// keep applies what is wanted whenever that may have changed. What it has begun
// to be served comes by served when that ends.
func (s *site) keep(ctx context.Context, begin func(*Attachment), served <-chan ended, look <-chan time.Time) error {
	more := false // something has changed since the last look
	var looked time.Time
	var later, calmed, guard <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-served:
			if ctx.Err() != nil {
				return nil
			}
			if err := s.over(e); err != nil {
				return err
			}
			continue
		case <-s.renewal.due:
			if err := s.renew(begin); err != nil {
				return err
			}
		case <-s.again:
			if s.home() {
				if guard == nil {
					guard = time.After(guardCalm + s.rest())
				}
				if calmed == nil {
					calmed = time.After(homeCalm(time.Since(looked)))
				}
				continue // who flushes loads anew, and is let
			}
			s.doubt() // at once: who begins to send waits for the look
			if more = calmed != nil || !s.begins() && !s.named(); more {
				if calmed == nil { // it is being set up: who begins is held for a look
					calmed = time.After(tick)
				}
				continue
			}
			calmed = time.After(calm + s.rest())
		case <-look:
			if s.home() {
				s.probe()
				continue
			}
			if s.idles() {
				return errIdle
			}
			if s.m.deaf == nil {
				continue
			}
		case <-guard:
			guard = nil
			s.guardNew()
			continue
		case <-calmed:
			calmed = nil
			if !s.home() {
				if !more {
					continue
				}
				more, calmed = false, time.After(calm+s.rest())
			}
		case <-later:
		case <-s.begun: // whatever was looked at just before: somebody is held
			more, calmed = false, time.After(calm+s.rest())
		}
		var err error
		later, err = s.bring()
		looked = time.Now()
		if err != nil {
			return err
		}
	}
}

// bring looks around and brings about what is wanted. What could not be done is to be
// tried again later.
func (s *site) bring() (later <-chan time.Time, err error) {
	err = s.refresh()
	if errors.Is(err, errOffline) && s.ending() {
		return time.After(retry), nil
	}
	if errors.Is(err, errOffline) || errors.Is(err, netns.ErrGone) && !s.home() {
		return nil, err
	}
	s.ended = time.Time{}
	// Also where the newest plan cannot be: the one before is in force.
	if errors.Join(err, s.repair()) != nil {
		return time.After(max(retry, s.rest())), nil
	}
	return nil, s.admit()
}

// ending says whether the way out is taken away because the processes have ended:
// then the namespace goes with all that is in it, and to undo that first would hold
// up who takes it down, and makes the next one. Meanwhile nobody begins to send. What
// does not go is undone a little later.
func (s *site) ending() bool {
	if s.there() {
		return false
	}
	if s.ended.IsZero() {
		if s.m.opts.Gate.Doubt(s.ref(), cgroupsel.V4|cgroupsel.V6) != nil {
			return false
		}
		s.ended, s.doubted = time.Now(), true
	}
	return time.Since(s.ended) < retry
}

// over says why serving an attachment has ended by itself, unless it goes on.
func (s *site) over(e ended) error {
	err := e.err
	switch {
	case !slices.Contains(s.attached, e.of):
		return nil // a new one is in its place
	case s.home() && errors.Is(err, netns.ErrGone):
		s.lose(e.of, errDeleted(e.of))
		return s.lost(e.of)
	case e.of.lost:
		return s.lost(e.of)
	case err == nil:
		err = errors.New("it ended by itself")
	}
	return fmt.Errorf("serve attachment %s: %w", s.id, err)
}

func errDeleted(a *Attachment) error {
	return fmt.Errorf("device %s was deleted by somebody", a.Device.Name())
}

// admit lets the gate pass what leaves by our device. Not before something runs:
// by then the namespace is set up, and what is in force is all of it.
func (s *site) admit() error {
	a := cgroupsel.Admission{Devices: make([]int, len(s.m.opts.Routes))}
	for _, one := range s.attached {
		a.Devices[one.selection] = one.leavesBy()
	}
	switch {
	case s.home():
		// Steering guards there. It is for what outlives us that the gate knows
		// the devices, too.
		if !s.m.closed() || slices.Equal(a.Devices, s.admitted) {
			return nil
		}
	case !s.doubted, !s.ran && !s.named():
		return nil
	}
	if err := s.m.opts.Gate.Admit(s.ref(), a); err != nil {
		return err
	}
	s.doubted, s.admitted = false, a.Devices
	return nil
}

// repair puts back what others took away from the steering.
func (s *site) repair() error {
	var errs []error
	for _, a := range s.attached {
		if a.lost {
			continue // applied when the device is back
		}
		what, err := a.steering.Repair()
		if what != "" || err != nil {
			s.repaired(what, err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// probe lets the kernel find out which of several gateways are alive. What it
// finds comes as an event; there is none where it fails.
func (s *site) probe() {
	for _, a := range s.attached {
		if a.route.Plan.Via.Chooses() {
			_ = a.steering.Probe()
		}
	}
}

// repaired tells of what others took away from the steering; of an error once.
func (s *site) repaired(what string, err error) {
	log := s.m.opts.Logger.With("attachment", s.id, "what", what)
	text := fmt.Sprint(err)
	s.mu.Lock()
	again := text == s.said
	s.said = text
	s.mu.Unlock()
	switch {
	case errors.Is(err, netns.ErrGone):
	case err != nil && again:
	case err != nil:
		log.Error("steering was changed by others and could not be put back", "err", err)
	default:
		log.Warn("steering was changed by others and is back")
	}
}

// refresh applies what is wanted now. What fails is said once in a spell.
func (s *site) refresh() error {
	before := s.failing()
	err := s.apply()
	switch {
	case errors.Is(err, errOffline), errors.Is(err, netns.ErrGone) && !s.home():
	case err != nil && before == nil:
		s.m.opts.Logger.Error("steering could not be renewed, trying on", "attachment", s.id, "err", err)
	case err == nil && before != nil:
		s.m.opts.Logger.Info("steering is in force again", "attachment", s.id)
	}
	return err
}

func (s *site) failing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, a := range s.attached {
		if !a.lost {
			errs = append(errs, a.err)
		}
	}
	return errors.Join(errs...)
}

// apply looks around and makes the plans be in force that are other ones than
// before.
func (s *site) apply() error {
	var errs []error
	s.ran = s.begins()
	for i, a := range s.attached {
		if a.lost {
			continue
		}
		plans := s.m.plans.Load()
		err := s.applyOne(a, *plans)
		if errors.Is(err, errNoDevice) {
			s.lose(a, errDeleted(a))
			continue
		}
		s.mu.Lock()
		a.err, a.plans = err, plans
		s.mu.Unlock()
		errs = append(errs, err)
		if i == 0 && errors.Is(err, netns.ErrGone) {
			break
		}
	}
	return errors.Join(errs...)
}

// errNoDevice says that the device at home is not there under its name.
var errNoDevice = errors.New("the device is not there")

func (s *site) applyOne(a *Attachment, plans []steer.Plan) error {
	base := plans[a.selection]
	around, err := a.look(s, &base)
	if err == nil && a.Device != nil && around.device != 0 && !around.whole(a.Device) {
		if err = a.Device.Restore(); err == nil {
			s.repaired("device", nil)
			around, err = a.look(s, &base)
		}
	}
	if err != nil {
		return err
	}
	if s.home() && a.Device != nil && around.device == 0 {
		return errNoDevice
	}
	a.around.Store(around)
	s.size = around.size
	s.guardFrames(around.others)
	if s.home() {
		s.m.homeMoved(around)
	} else if !s.online(around) {
		return errOffline
	}
	plan := s.wanted(a, base, around)
	s.mu.Lock()
	same := reflect.DeepEqual(plan, a.plan)
	s.mu.Unlock()
	if same {
		return nil
	}
	if err := s.steer(a, plan); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a.plan = plan
	return nil
}

// steer puts a plan in force, for another table by another Steering.
func (s *site) steer(a *Attachment, plan steer.Plan) error {
	if plan.Table == a.steering.Number() {
		return a.steering.Apply(plan)
	}
	next, err := a.steering.Renumber(plan)
	if next == nil {
		return err
	}
	s.mu.Lock()
	a.steering = next
	s.mu.Unlock()
	if a.Device != nil {
		err = errors.Join(err, a.Device.SetTable(uint32(plan.Table)))
	}
	if err != nil && !errors.Is(err, netns.ErrGone) {
		s.m.opts.Logger.Warn("something of another table is left", "attachment", s.id, "err", err)
	}
	return nil
}

func (a *Attachment) look(s *site, plan *steer.Plan) (around *surroundings, err error) {
	err = a.NS.Do(func() (err error) {
		around, err = look(a.deviceName(), s.interfaces(plan))
		return err
	})
	if err == nil {
		err = s.isolate(around)
	}
	return around, err
}

// interfaces are those through which packets are selected: at home alone.
func (s *site) interfaces(plan *steer.Plan) []string {
	if !s.home() {
		return nil
	}
	return plan.Interfaces
}

func (a *Attachment) deviceName() string {
	if a.Device == nil {
		return ""
	}
	return a.Device.Name()
}

// wanted is the plan for what is around and what is selected now.
func (s *site) wanted(a *Attachment, plan steer.Plan, around *surroundings) steer.Plan {
	plan.Device, plan.Interfaces = a.deviceName(), s.interfaces(&plan)
	written := plan.Bypass
	plan.Bypass = slices.Concat(written, around.connected)
	if !s.home() {
		plan.Bypass = append(plan.Bypass, s.m.homeAddresses()...)
	} else if a.route.OnLink && plan.Resolver != 0 {
		plan.OnLink = around.onLink(written)
	}
	if !s.home() && !s.named() {
		plan.No4, plan.No6 = !around.default4, !around.default6
	}
	route := a.selection
	plan.All = s.any(func(n cgroupsel.Namespace) bool { return n.All && n.Selection == route })
	if s.any(func(n cgroupsel.Namespace) bool { return n.All && n.Selection != route }) {
		return plan // whatever the cgroup: all is another route's
	}
	picture := s.m.picked.Load()
	for _, c := range picture.Cgroups {
		if c.Present && c.Selection == route {
			plan.Cgroups = append(plan.Cgroups, steer.Cgroup{Path: c.Path, ID: c.ID, Level: c.Level})
		}
	}
	for _, c := range picture.Within(route) {
		plan.Others = append(plan.Others, steer.Cgroup{Path: c.Path, ID: c.ID, Level: c.Level})
	}
	return plan
}
