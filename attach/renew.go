package attach

import (
	"errors"
	"fmt"
	"time"

	"cgtun/tun"
)

// # Theory of operation: a device that somebody takes away
//
// In another namespace the site begins anew (site.go). Home is not left: what is
// steered there stays as it is, and as its device is not there, what is marked
// goes nowhere. Meanwhile the device is made again and served by a new netstack;
// then the steering is applied to it. Home's other attachments go on.
//
// The first try is at once. Whoever takes the device away again and again, or has
// its name, makes the next one wait longer, and after maxRenewals in a row Run
// ends with an error.

const (
	maxRenewals = 10
	firstPause  = 50 * time.Millisecond
	lastPause   = 10 * time.Second
)

// renewal is what is known of devices at home that were taken away.
type renewal struct {
	due   <-chan time.Time // the next try; nil: every device is there
	tries int              // in a row
	last  time.Time        // when the last one was good
}

// next says how long the next try is to wait, or that there is none.
func (r *renewal) next() (pause time.Duration, ok bool) {
	if r.tries >= maxRenewals {
		return 0, false
	}
	if r.tries > 0 {
		pause = min(firstPause<<r.tries, lastPause)
	}
	r.tries++
	return pause, true
}

// lose notes that the device of an attachment at home is not there any more, and
// lets serving it end. Where only its name is another one now, it goes.
func (s *site) lose(a *Attachment, why error) {
	s.mu.Lock()
	a.err, a.lost = why, true
	s.mu.Unlock()
	_ = a.Device.Close()
}

// lost is for when a lost device is not served any more. It returns why none is
// made again.
func (s *site) lost(a *Attachment) error {
	if s.renewal.due != nil {
		return nil
	}
	if time.Since(s.renewal.last) > tick {
		s.renewal.tries = 0
		s.m.opts.Logger.Warn("a device was taken away: nothing gets out until it is made again", "attachment", s.id, "route", a.Route, "err", a.err)
	}
	return s.retry(a.err)
}

// retry lets the next try come, or says why there is none.
func (s *site) retry(why error) error {
	pause, ok := s.renewal.next()
	if !ok {
		return fmt.Errorf("serve attachment %s: its device was made %d times, and did not stay; start cgtun again: %w", s.id, maxRenewals, why)
	}
	s.renewal.due = time.After(pause)
	return nil
}

// renew makes all devices again that are lost, and has them served.
func (s *site) renew(serve func(*Attachment)) error {
	s.renewal.due = nil
	var errs []error
	for i, a := range s.attached {
		if !a.lost {
			continue
		}
		b, err := a.renewed(s.m.device(a.selection))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.mu.Lock()
		s.attached[i] = b
		s.mu.Unlock()
		serve(b)
		s.renewal.last = time.Now()
		s.m.opts.Logger.Warn("a device was taken away and is back", "attachment", s.id, "route", b.Route, "device", b.Device.Name())
	}
	if err := errors.Join(errs...); err != nil {
		return s.retry(err)
	}
	return nil
}

// renewed is the attachment with a new device in place of one that is not there
// any more. Its plan is not in force.
func (a *Attachment) renewed(o tun.Options) (*Attachment, error) {
	device, err := tun.Open(a.NS, o)
	if err != nil {
		return nil, err
	}
	b := &Attachment{
		ID: a.ID, Route: a.Route, NS: a.NS, Device: device, Since: time.Now(), missing: a.missing,
		route: a.route, selection: a.selection, steering: a.steering, asker: a.asker,
	}
	b.around.Store(&surroundings{})
	return b, nil
}
