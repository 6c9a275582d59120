package docker

import (
	"context"
	"errors"
	"net"
	"net/netip"
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

// bridge is what the bridge of a network is called.
func (n *network) bridge() string {
	if name := n.Options[bridgeName]; name != "" {
		return name
	}
	return "br-" + n.ID[:min(len(n.ID), bridgeDigits)]
}

// Internal says whether a gateway is that of an internal network of some daemon
// (docker network create --internal). Docker before 27 gives those a default
// route, and drops in home's firewall what goes by it.
func (f *Finder) Internal(gateway netip.Addr) (bool, error) {
	device := f.device(gateway)
	if device == "" || device == "docker0" {
		return false, nil // no network of a user's
	}
	var errs []error
	for _, d := range f.Daemons() {
		if d.Ended {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), networksTime)
		var all []network
		err := get(ctx, d.PID, "/networks", &all)
		cancel()
		if errors.Is(err, errNoSocket) && !strings.HasPrefix(device, "br-") {
			err = nil
		}
		errs = append(errs, err)
		for _, n := range all {
			if n.bridge() == device {
				return n.Internal, nil
			}
		}
	}
	return false, errors.Join(errs...)
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
