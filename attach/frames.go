package attach

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
)

// guarding is what the gate was told last of the devices of a namespace.
type guarding struct {
	all     int
	devices []cgroupsel.Device
	said    string // the error of the last time
}

// guardFrames tells the gate which devices there are, if these are others than
// before. Those of containers come and go. That it cannot be done for one is said once.
func (s *site) guardFrames(devices []cgroupsel.Device) {
	now := guarding{all: cgroupsel.AnyCgroup}
	s.any(func(n cgroupsel.Namespace) bool {
		if n.All {
			now.all = n.Selection
		}
		return n.All
	})
	if !s.home() {
		devices = slices.Clone(devices)
		for i := range devices {
			devices[i].Passing = !s.named()
		}
	}
	if s.guarded.said == "" && now.all == s.guarded.all && slices.Equal(devices, s.guarded.devices) {
		return
	}
	now.devices = devices
	err := s.m.opts.Gate.GuardFrames(s.ref(), now.all, devices...)
	if err != nil && !errors.Is(err, netns.ErrGone) {
		if now.said = fmt.Sprint(err); now.said != s.guarded.said {
			s.m.opts.Logger.Error("selected processes with CAP_NET_RAW can send frames of their own by a device, trying on", "attachment", s.id, "err", err)
		}
	}
	s.guarded = now
}

// guardNew looks for new devices at home, where what has changed is looked at
// a little later.
func (s *site) guardNew() {
	var links []netlink.Link
	err := s.ref().Do(func() (err error) { links, err = netlink.LinkList(); return err })
	if err == nil {
		s.guardFrames(devicesIn(links))
	}
}
