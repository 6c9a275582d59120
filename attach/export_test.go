package attach

import "cgtun/internal/netns"

// AttachNothing makes owners be found at home without a device or steering.
func (m *Manager) AttachNothing() (release func(), err error) {
	ns, err := netns.Home()
	if err != nil {
		return nil, err
	}
	home, err := newAttachment(Home, ns, nil)
	if err != nil {
		return nil, err
	}
	m.set(home, nil)
	return func() { m.set(nil, nil); home.asker.close() }, nil
}
