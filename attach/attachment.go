package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
	"cgtun/steer"
	"cgtun/tun"
)

// Attachment is one route's in one network namespace.
type Attachment struct {
	ID     string // of the namespace: "home", its name, a container's, "netns-INODE"
	Route  string
	NS     netns.Ref
	Device *tun.Device // nil where the kernel routes
	Since  time.Time

	around  atomic.Pointer[surroundings] // the newest; never nil
	missing func()                       // an address was asked for that is not known

	route     *Route
	selection int // index of the route, and so of its selection
	steering  *steer.Steering
	asker     *asker // nil in another namespace than home, which it would keep alive

	// Under the lock of the site.
	plan  steer.Plan    // in force
	plans *[]steer.Plan // those that err is the answer to
	err   error         // why what is wanted is not; nil: it is
	lost  bool          // its device is not there, and is closed; written by the site's goroutine alone
}

// Local says whether an address is one of the namespace's own, or routed to one
// of the selected interfaces. It allocates nothing and may be called for
// each packet.
func (a *Attachment) Local(addr netip.Addr) bool {
	if a.around.Load().has(addr) {
		return true
	}
	a.missing()
	return false
}

// leavesBy is the device by which marked packets leave, as the gate is told.
func (a *Attachment) leavesBy() int {
	link := a.around.Load().device
	if a.kernel() {
		link = a.steering.Link()
	}
	if link == 0 {
		return cgroupsel.NoDevice
	}
	return link
}

// kernel says that the kernel routes: there is no device of ours.
func (a *Attachment) kernel() bool { return a.route != nil && a.route.Kernel }

// attach begins an attachment: everything of it is there afterwards, but nothing is
// steered. Who opened it closes it.
func (s *site) attach(r *Route, selection int) (_ *Attachment, err error) {
	a := &Attachment{ID: s.id, Route: r.Name, NS: s.ref(), Since: time.Now(), route: r, selection: selection, missing: func() {}}
	a.around.Store(&surroundings{})
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	if !r.Kernel {
		o := s.m.device(selection)
		if !s.home() {
			o = s.m.elsewhere(selection)
			a.missing = func() { signal(s.again) }
		}
		// The device before the steering: in another namespace than home it
		// is what leads in, when the task that did has gone.
		if a.Device, err = tun.Open(a.NS, o); err != nil {
			return nil, err
		}
		a.NS = a.Device.Netns()
	}
	table := (*s.m.plans.Load())[selection].Table
	if a.steering, err = steer.Open(a.NS, strconv.Itoa(table)); err != nil {
		return nil, err
	}
	if s.home() {
		err = a.NS.Do(func() (err error) {
			a.asker, err = openAsker()
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", s.id, err)
	}
	return a, nil
}

// close takes everything away. What has gone with its namespace is no error.
func (a *Attachment) close() error {
	var errs []error
	if a.asker != nil {
		a.asker.close()
	}
	if a.steering != nil {
		if err := a.steering.Close(); !errors.Is(err, netns.ErrGone) {
			errs = append(errs, err)
		}
	}
	if a.Device != nil && !a.lost {
		errs = append(errs, a.Device.Close())
	}
	return errors.Join(errs...)
}
