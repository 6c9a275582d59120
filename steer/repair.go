package steer

import (
	"errors"
	"maps"
	"strings"

	"github.com/vishvananda/netlink"
)

// Repair puts back what others took away — ip rules, which network managers
// clear, routes, which go when our device is set down, and an nft table that has
// no owner — and says what that was; "" is nothing, and costs little. It follows
// a way that has come, gone or moved, too. It is for a caller who follows the
// kernel's events. The error wraps netns.ErrGone if the namespace has ended.
func (s *Steering) Repair() (what string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table == nil || s.plan == nil {
		return "", nil
	}
	var tableErr error
	err = withRoutes(s.ns, func(h *netlink.Handle) error {
		found, err := s.repair(h)
		changed, restoreErr := s.table.restore()
		if changed {
			found = append(found, "nft table")
		}
		what, tableErr = strings.Join(found, ", "), restoreErr
		return err
	})
	return what, errors.Join(err, tableErr)
}

// repair is Repair of all but the nft table.
func (s *Steering) repair(h *netlink.Handle) (what []string, err error) {
	w, err := s.findWay(h, s.plan)
	if err != nil {
		return nil, err
	}
	moved := s.moved(w)
	changed, err := setRoutes(h, s.plan, w)
	if changed && !moved {
		what = append(what, "routes")
	}
	if err != nil {
		return what, err
	}
	changed, stale, err := setRules(h, s.plan, w)
	if changed && !moved {
		what = append(what, "ip rules")
	}
	if err != nil {
		return what, err
	}
	if moved {
		if err := s.table.apply(newRuleset(s.plan, w, s.table.at)); err != nil {
			return what, err
		}
	}
	s.way = w
	return what, delRules(h, stale)
}

// moved says whether a way by the kernel is another one than before: routes
// that follow it were not taken away by anybody.
func (s *Steering) moved(w *way) bool {
	if w.ours {
		return false
	}
	return w.dev != s.way.dev || w.link != s.way.link || !maps.Equal(w.gw, s.way.gw) || (w.down == nil) != (s.way.down == nil)
}

// Probe keeps what the kernel knows of gateways that stand for each other new:
// it is to be called every few seconds where Via.Chooses. What it finds comes as
// an event of the neighbours.
func (s *Steering) Probe() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.plan == nil || s.way == nil || s.way.ours || s.way.link == 0 {
		return nil
	}
	return withRoutes(s.ns, func(h *netlink.Handle) error {
		probe(h, &s.plan.Via, s.way.link)
		return nil
	})
}
