package attach

import (
	"net/netip"
	"time"

	"cgtun/internal/netns"
)

// Renewals lists how long each try to make a device again waits, in a row of
// tries that fail.
func Renewals() (pauses []time.Duration) {
	var r renewal
	for {
		pause, ok := r.next()
		if !ok {
			return pauses
		}
		pauses = append(pauses, pause)
	}
}

// AttachNothing makes owners be found at home without a device or steering.
func (m *Manager) AttachNothing() (release func(), err error) {
	ns, err := netns.Home()
	if err != nil {
		return nil, err
	}
	home := m.newSite(ns, Home)
	a := &Attachment{ID: Home, NS: ns}
	a.around.Store(&surroundings{})
	if a.asker, err = openAsker(); err != nil {
		return nil, err
	}
	home.attached = []*Attachment{a}
	m.home = home
	return a.asker.close, nil
}

// Calm sets for how long changes are gathered; it is for the time before a Manager runs.
func Calm(d time.Duration) { calm = d }

// Left is Attachment.Left of home.
func (m *Manager) Left(sources []netip.AddrPort) []netip.AddrPort { return m.find(Home).Left(sources) }
