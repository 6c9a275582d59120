package cgroupsel

import "errors"

// The bounds of the namespaces that are to be attached. What is above is left to
// on_exit at once, so that nobody waits for what will not be, and taken in when
// there is room again.

// Bounds that a namespace can be above: Namespace.Excess.
var (
	errMany  = errors.New("as many network namespaces as there can be are attached already")
	errCrowd = errors.New("as many network namespaces as there can be with processes of one cgroup are attached already")
)

// crowd is how many namespaces are within the bounds.
type crowd struct {
	max, maxOf int
	all        int
	of         map[uint64]int // by cgroup
}

// within counts those that are to be attached. It wants d.mu.
func (d *spaces) within() crowd {
	o := &d.s.opts
	c := crowd{max: o.MaxNamespaces, maxOf: o.MaxPerCgroup, of: make(map[uint64]int)}
	for cookie := range d.exempt {
		if cookie != d.home {
			c.all++
		}
	}
	for _, sp := range d.by {
		if sp.Excess == nil {
			c.add(sp.Cgroup)
		}
	}
	return c
}

func (c *crowd) add(cgroup uint64) {
	c.all++
	c.of[cgroup]++
}

// above says which bound one more namespace with tasks of a cgroup is above.
func (c *crowd) above(cgroup uint64) error {
	switch {
	case c.all >= c.max:
		return errMany
	case c.of[cgroup] >= c.maxOf:
		return errCrowd
	}
	return nil
}

// leaveOut leaves a namespace that is above the bounds to on_exit. It wants d.mu.
func (d *spaces) leaveOut(sp *space) {
	if !d.above {
		d.above = true
		d.s.log.Warn("too many network namespaces with selected processes: on_exit decides about more",
			"limit", d.s.opts.MaxNamespaces, "limit_per_cgroup", d.s.opts.MaxPerCgroup, "err", sp.Excess)
	}
	cookie := sp.Ref.Cookie()
	if err := d.m.known.Put(cookie, known{Flags: knownWaived}); err != nil {
		d.s.log.Warn("too many namespaces for the gate", "limit", maxKnown, "err", err)
	}
	d.excess++
	sp.fate = waived
	d.letGoIn(cookie)
}

// takeIn makes those above the bounds that there is room for now like new ones,
// and tells whether there were any.
func (d *spaces) takeIn() (news bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.above {
		return false
	}
	c := d.within()
	d.above = false
	for _, sp := range d.by {
		if sp.Excess == nil {
			continue
		}
		if sp.Excess = c.above(sp.Cgroup); sp.Excess != nil {
			d.above = true
			continue
		}
		c.add(sp.Cgroup)
		news = true
		if err := d.doubt(sp, V4|V6); err != nil {
			d.s.log.Warn("a namespace is attached while its processes run", "err", err)
		}
	}
	if !d.above {
		d.s.log.Info("there is room for all network namespaces with selected processes again")
	}
	return news
}
