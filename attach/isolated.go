package attach

import (
	"fmt"
	"net/netip"
	"time"
)

// isolatedTime is how long the word about a gateway is believed. It is asked for
// at each change in a namespace.
const isolatedTime = 5 * time.Second

// verdict is the word about a gateway.
type verdict struct {
	isolated bool
	at       time.Time
}

// isolate takes the default routes away that lead nowhere by the will of who
// made the network: what home's firewall keeps a namespace from would be reached
// by us.
func (s *site) isolate(around *surroundings) error {
	if s.m.opts.Isolated == nil || s.home() || s.named() {
		return nil
	}
	if s.isolated == nil {
		s.isolated = map[netip.Addr]verdict{}
	}
	for gw, v := range s.isolated {
		if time.Since(v.at) > isolatedTime {
			delete(s.isolated, gw)
		}
	}
	for _, gw := range around.gateways {
		v, ok := s.isolated[gw]
		if !ok {
			isolated, err := s.m.opts.Isolated(gw)
			if err != nil {
				return fmt.Errorf("find out whether the network of gateway %s is an internal one: %w", gw, err)
			}
			v = verdict{isolated, time.Now()}
			s.isolated[gw] = v
		}
		if v.isolated && gw.Is4() {
			around.default4 = false
		} else if v.isolated {
			around.default6 = false
		}
	}
	return nil
}
