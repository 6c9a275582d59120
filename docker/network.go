package docker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// network is what GET /networks says of one.
type network struct {
	ID       string `json:"Id"`
	Internal bool
	Options  map[string]string
}

const (
	bridgeName   = "com.docker.network.bridge.name"
	bridgeDigits = 12 // of the id, in the name of a bridge
	networksTime = time.Second
)

// errNoDaemon says that there is nobody to ask.
var errNoDaemon = errors.New("no docker daemon runs")

// bridge is what the bridge of a network is called.
func (n *network) bridge() string {
	if name := n.Options[bridgeName]; name != "" {
		return name
	}
	return "br-" + n.ID[:min(len(n.ID), bridgeDigits)]
}

// Internal says whether a gateway is that of an internal network of a daemon
// (docker network create --internal). Docker before 27 gives those a default
// route, and drops in home's firewall what goes by it. Networks outlive their
// daemon (live-restore): while none answers the last word holds, and what has
// the bridge of a network of which there was none is an error.
func (f *Finder) Internal(gateway netip.Addr) (bool, error) {
	device := f.device(gateway)
	if device == "" || device == "docker0" {
		return false, nil // no network of a user's
	}
	outer, inner := f.tiers()
	said, err := bridges(outer)
	internal, ok := f.remember(said, err)[device]
	if !ok && err == nil && len(inner) > 0 {
		said, err = bridges(inner)
		internal, ok = said[device]
	}
	if ok || err == nil {
		return internal, nil
	}
	if !isBridge(device) && (errors.Is(err, errNoDaemon) || errors.Is(err, errNoSocket)) {
		return false, nil // of others
	}
	return false, fmt.Errorf("ask for the network of bridge %s: %w", device, err)
}

// isBridge says whether a device is called as docker calls bridges by itself.
func isBridge(device string) bool {
	id, ok := strings.CutPrefix(device, "br-")
	return ok && len(id) == bridgeDigits && strings.Trim(id, "0123456789abcdef") == ""
}

// bridges says of each bridge of a network of these daemons whether that is an
// internal one. With an error not all have answered.
func bridges(daemons []Daemon) (map[string]bool, error) {
	if len(daemons) == 0 {
		return nil, errNoDaemon
	}
	ctx, cancel := context.WithTimeout(context.Background(), networksTime)
	defer cancel()
	type reply struct {
		networks []network
		err      error
	}
	replies := make(chan reply, len(daemons))
	for _, d := range daemons {
		go func() {
			var r reply
			r.err = get(ctx, d.PID, "/networks", &r.networks)
			replies <- r
		}()
	}
	said := make(map[string]bool)
	var errs []error
	for range daemons {
		r := <-replies
		errs = append(errs, r.err)
		for _, n := range r.networks {
			// Of two that have one bridge, the one that keeps more offline.
			said[n.bridge()] = said[n.bridge()] || n.Internal
		}
	}
	return said, errors.Join(errs...)
}

// remember keeps what the outermost daemons said, and adds what they said before
// where not all of them have answered.
func (f *Finder) remember(said map[string]bool, err error) map[string]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		f.said = said
		return said
	}
	all := maps.Clone(f.said)
	if all == nil {
		return said
	}
	maps.Copy(all, said)
	return all
}

// tiers are the daemons that run: outer, and those in a cgroup namespace within
// that of another one. What is in a container does not speak for who keeps it.
func (f *Finder) tiers() (outer, inner []Daemon) {
	all := f.Daemons()
	for _, d := range all {
		switch {
		case d.Ended:
		case slices.ContainsFunc(all, func(o Daemon) bool { return o.Root != d.Root && within(d.Root, o.Root) }):
			inner = append(inner, d)
		default:
			outer = append(outer, d)
		}
	}
	return outer, inner
}

// within says whether a cgroup is another one, or below it.
func within(cgroup, other string) bool {
	return cgroup == other || strings.HasPrefix(cgroup, strings.TrimSuffix(other, "/")+"/")
}

// deviceOf is the device of home that has an address, "" for none.
func deviceOf(addr netip.Addr) string {
	devices, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, d := range devices {
		addrs, err := d.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().WithZone("") == addr {
				return d.Name
			}
		}
	}
	return ""
}
