package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// way is where a plan's default route leads, as it was found just now.
type way struct {
	dev    string // what marked packets leave by; "" while that is not known
	link   int    // its index; 0: it is not there
	ours   bool   // the tun
	tproxy netip.AddrPort
	gw     map[bool]netip.Addr // the gateway to be taken, by Is6
	none   map[bool]bool       // families that it does not carry, by Is6
	down   error               // why nothing goes this way now
}

// carries says whether packets of a family go this way now.
func (w *way) carries(is6 bool) bool { return w.down == nil && !w.none[is6] }

// findWay looks at the way of a plan. What may still come, a device or a
// gateway, is no error but in down.
func (s *Steering) findWay(h *netlink.Handle, p *Plan) (*way, error) {
	w := &way{gw: map[bool]netip.Addr{}, none: map[bool]bool{}}
	var err error
	switch {
	case p.offline():
		w.down = errors.New("there is no way out")
	case p.byTun():
		w.dev, w.ours = p.Device, true
		err = w.findTun(h)
	case p.Via.TProxy.IsValid():
		err = w.findProxy(h, p.Via.TProxy)
	default:
		s.findGateways(h, &p.Via, w)
	}
	return w, err
}

// findTun prepares our own device: it joins the group, its packets are looked
// up with their mark where rp_filter asks for the way back, and may come from
// its own address, as what its router says does, and from routers of other links,
// of which the errors are (2 is the loose mode, and wins over "all"). All go when
// the device goes.
func (w *way) findTun(h *netlink.Handle) error {
	l, err := h.LinkByName(w.dev)
	if err != nil {
		return fmt.Errorf("find device %s: %w", w.dev, err)
	}
	if l.Attrs().Group != linkGroup {
		if err := h.LinkSetGroup(l, linkGroup); err != nil {
			return fmt.Errorf("set group of device %s: %w", w.dev, err)
		}
	}
	for _, set := range [][2]string{{"src_valid_mark", "1"}, {"accept_local", "1"}, {"rp_filter", "2"}} {
		if err := sysctl("/proc/sys/net/ipv4/conf/"+w.dev+"/"+set[0], set[1]); err != nil {
			return err
		}
	}
	w.link, w.none[true] = l.Attrs().Index, !hasV6(w.dev)
	return nil
}

// findProxy is the way of FACTS: everything is local on lo, and a rule of the
// nft table hands it to the listener.
func (w *way) findProxy(h *netlink.Handle, addr netip.AddrPort) error {
	l, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find device lo: %w", err)
	}
	w.dev, w.link, w.tproxy = "lo", l.Attrs().Index, addr
	if a := addr.Addr(); !a.IsUnspecified() {
		w.none[a.Is4()] = true // the family that the listener is not of
	}
	w.none[true] = w.none[true] || !hasV6("lo")
	return nil
}

// findGateways looks for the device and the first gateway of each family that
// is alive.
func (s *Steering) findGateways(h *netlink.Handle, via *Via, w *way) {
	w.dev = via.Dev
	for is6, list := range map[bool][]netip.Addr{false: via.Gateway, true: via.Gateway6} {
		if len(list) > 0 && w.dev == "" {
			w.dev = deviceTo(h, list)
		}
		w.none[is6] = len(list) == 0 && len(via.Gateway)+len(via.Gateway6) > 0
	}
	if w.dev == "" {
		w.down = errors.New("no device leads to the gateway")
		return
	}
	l, err := h.LinkByName(w.dev)
	switch {
	case err != nil:
		w.down = fmt.Errorf("device %s is not there", w.dev)
	case l.Attrs().Flags&1 == 0: // net.FlagUp
		w.down = fmt.Errorf("device %s is down", w.dev)
	case l.Attrs().OperState == netlink.OperDown || l.Attrs().OperState == netlink.OperLowerLayerDown:
		w.down = fmt.Errorf("device %s has no carrier", w.dev)
	}
	if w.down != nil {
		return
	}
	w.link, w.none[true] = l.Attrs().Index, w.none[true] || !hasV6(w.dev)
	for is6, list := range map[bool][]netip.Addr{false: via.Gateway, true: via.Gateway6} {
		if len(list) > 0 {
			w.gw[is6] = s.firstAlive(h, w.link, list)
		}
	}
}

// deviceTo finds the device by which the first reachable gateway is on-link.
func deviceTo(h *netlink.Handle, gateways []netip.Addr) string {
	for _, g := range gateways {
		routes, err := h.RouteGet(g.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].Gw != nil {
			continue
		}
		if l, err := h.LinkByIndex(routes[0].LinkIndex); err == nil && l.Attrs().Name != "lo" {
			return l.Attrs().Name
		}
	}
	return ""
}

// firstAlive chooses a gateway by what the kernel knows of its neighbours. One
// is dead from when it failed to answer until it answers again; where all are,
// the first is taken.
func (s *Steering) firstAlive(h *netlink.Handle, link int, gateways []netip.Addr) netip.Addr {
	if len(gateways) == 1 {
		return gateways[0]
	}
	neighbours, err := listNeighbours(h, link, gateways[0])
	if err != nil {
		return gateways[0]
	}
	for _, n := range neighbours {
		addr, _ := netip.AddrFromSlice(n.IP)
		switch {
		case n.State&unix.NUD_FAILED != 0:
			s.dead[addr.Unmap()] = true
		case n.State&(unix.NUD_REACHABLE|unix.NUD_PERMANENT|unix.NUD_NOARP) != 0:
			delete(s.dead, addr.Unmap())
		}
	}
	for _, g := range gateways {
		if !s.dead[g] {
			return g
		}
	}
	return gateways[0]
}

// listNeighbours lists the neighbours of the family of an address.
func listNeighbours(h *netlink.Handle, link int, of netip.Addr) ([]netlink.Neigh, error) {
	return again(func() ([]netlink.Neigh, error) { return h.NeighList(link, familyOf(of)) })
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// probe makes the kernel ask the neighbours that a plan chooses among. One
// that nobody sends to would never be seen to die, nor to come back, and one
// that answered is believed for up to 45 s.
func probe(h *netlink.Handle, via *Via, link int) {
	for _, list := range [][]netip.Addr{via.Gateway, via.Gateway6} {
		if len(list) < 2 {
			continue
		}
		known := map[netip.Addr]bool{}
		neighbours, _ := listNeighbours(h, link, list[0])
		for _, n := range neighbours {
			a, _ := netip.AddrFromSlice(n.IP)
			known[a.Unmap()] = n.State&(unix.NUD_REACHABLE|unix.NUD_STALE|unix.NUD_DELAY) != 0
		}
		for _, g := range list {
			n := &netlink.Neigh{LinkIndex: link, Family: familyOf(g), IP: g.AsSlice(), Flags: unix.NTF_USE}
			if known[g] {
				n.Flags, n.State = 0, unix.NUD_PROBE
			}
			// What it finds shows in the neighbour's state.
			_ = h.NeighSet(n)
		}
	}
}

func hasV6(dev string) bool {
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6")
	return err == nil && strings.TrimSpace(string(off)) == "0"
}
