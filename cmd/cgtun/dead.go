package main

import (
	"fmt"
	"slices"

	"cgtun/cgroupsel"
	"cgtun/internal/netns"
	"cgtun/steer"
)

// dead is an instance that runs no more and what it left in home.
type dead struct {
	instance string
	closed   bool     // it blocks on purpose, as on_exit = "closed" says
	objects  []string // for people
}

// block says what the closed block of an instance does.
func (d dead) block() string {
	return fmt.Sprintf("instance %s does not run, and as its on_exit is \"closed\" what it selected reaches nothing", d.instance)
}

// openBlock is what ends that.
const openBlock = "start cgtun again, or open the block with: cgtun cleanup"

// deadInstances looks for them; alive names one that is known to live, or none.
func deadInstances(home netns.Ref, alive string) ([]dead, error) {
	objects, err := steer.Find(home)
	if err != nil {
		return nil, fmt.Errorf("look for what dead instances left: %w", err)
	}
	var found []dead
	for _, o := range objects {
		if o.Alive || o.Instance == alive {
			continue
		}
		i := slices.IndexFunc(found, func(d dead) bool { return d.instance == o.Instance })
		if i < 0 {
			i, found = len(found), append(found, dead{instance: o.Instance})
		}
		found[i].closed = found[i].closed || o.Closed
		found[i].objects = append(found[i].objects, o.Kind+" "+o.Text)
	}
	return withPins(found, home, alive)
}

// withPins adds what dead instances pinned: that is for blocks alone.
func withPins(found []dead, home netns.Ref, alive string) ([]dead, error) {
	pins, err := cgroupsel.FindPins()
	if err != nil {
		return nil, fmt.Errorf("look for what dead instances left: %w", err)
	}
	for _, p := range pins {
		if p.PID != 0 || p.Home != home.Cookie() || p.Instance == alive {
			continue
		}
		i := slices.IndexFunc(found, func(d dead) bool { return d.instance == p.Instance })
		if i < 0 {
			i, found = len(found), append(found, dead{instance: p.Instance})
		}
		found[i].closed = true
		found[i].objects = append(found[i].objects, "pinned programs "+p.Dir)
	}
	return found, nil
}

// blocks says which dead instances block what they selected, "" if none is
// seen; without root none is.
func blocks() string {
	home, err := netns.Home()
	if err != nil {
		return ""
	}
	all, _ := deadInstances(home, "")
	text := ""
	for _, d := range all {
		if d.closed {
			text += "; " + d.block()
		}
	}
	return text
}
