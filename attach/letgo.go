package attach

import (
	"context"
	"maps"
	"slices"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
)

// # Theory of operation: devices in other namespaces than home
//
// A device is made inside, which takes a fifth of a millisecond. To move one in takes
// twenty, for most of which the kernel keeps everybody on the machine from changing
// anything of any network: steps of a build wait for that.
//
// What is made inside keeps the namespace, as any socket does. So the references that
// each namespace has are counted all the time (cgroupsel.Holders): when those of our devices
// are the only ones left, nobody is inside, nothing is on its way any more, and no
// mount or descriptor leads in, so that nobody can come. Then the devices are let go,
// and the namespace ends, a little later than it would have without us.
//
// Where the kernel does not let us count, devices are made elsewhere, and moved in.

// letGoEvery is for how long a namespace outlives its last process because of us. A
// count takes some microseconds.
const letGoEvery = 50 * time.Millisecond

// makes settles where devices are made. Who calls it calls what it returns.
func (m *Manager) makes() (closeMakes func(), err error) {
	holders, err := cgroupsel.OpenHolders()
	if err == nil {
		m.holders = holders
		return func() { _ = holders.Close() }, nil
	}
	m.opts.Logger.Debug("devices are moved into their namespaces", "err", err)
	from, stage, err := netns.Private()
	if err != nil {
		return nil, err
	}
	m.from = from
	return func() { stage.Close() }, nil
}

// letGo lets those namespaces end until ctx does that nobody but us keeps.
func (m *Manager) letGo(ctx context.Context) {
	if m.holders == nil {
		return
	}
	look := time.NewTicker(letGoEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		m.mu.Lock()
		sites := slices.Collect(maps.Values(m.sites))
		m.mu.Unlock()
		for _, s := range sites {
			s.letGo(m.holders)
		}
	}
}

// letGo ends the devices if nothing else keeps the namespace.
func (s *site) letGo(holders *cgroupsel.Holders) {
	s.mu.Lock()
	attached := s.attached
	s.mu.Unlock()
	own := 0
	for _, a := range attached {
		own += len(a.Device.Queues())
	}
	if own == 0 {
		return
	}
	n := 0
	errControl := attached[0].Device.Control(func(fd uintptr) {
		if count, err := holders.Count(fd); err == nil {
			n = count
		}
	})
	if errControl != nil || n == 0 || n > own {
		return
	}
	for _, a := range attached {
		_ = a.Device.LetGo()
	}
}
