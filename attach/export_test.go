package attach

import "cgtun/internal/netns"

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
