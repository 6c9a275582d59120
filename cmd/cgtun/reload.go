package main

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
	"cgtun/dns"
	"cgtun/router"
	"cgtun/steer"
)

// reloadTime is how long it may take to change what is steered.
const reloadTime = 5 * time.Second

// reloads count them by what became of them.
type reloads struct {
	ok, bad atomic.Uint64 // bad: the file has mistakes
	refused atomic.Uint64 // it could not be put in force
}

// Reload implements control.Source: everything is read, checked and made first,
// and put in force then. What fails before that changes nothing.
func (in *instance) Reload(ctx context.Context) error {
	in.reloading.Lock()
	defer in.reloading.Unlock()
	err := in.reload(ctx)
	var mistakes *control.Error
	switch {
	case err == nil:
		in.reloads.ok.Add(1)
	case errors.As(err, &mistakes) && mistakes.Exit == exitUsage:
		in.reloads.bad.Add(1)
	default:
		in.reloads.refused.Add(1)
	}
	return err
}

func (in *instance) reload(ctx context.Context) error {
	if in.state.Load() != control.Ready {
		return errNotUp
	}
	began := time.Now()
	file, err := in.load()
	var bad config.Errors
	if errors.As(err, &bad) {
		return &control.Error{Exit: exitUsage, Text: bad.Error()}
	}
	if err != nil {
		return err
	}
	before := in.now.Load()
	if fixed := in.fixed(file); len(fixed) > 0 {
		return fmt.Errorf("reload: nothing is changed: %s %w", strings.Join(fixed, ", "), cgroupsel.ErrFixed)
	}
	w, err := in.newWays(file, before)
	if err != nil {
		return fmt.Errorf("reload: nothing is changed: %w", err)
	}
	if err := in.steer(ctx, file); err != nil {
		return fmt.Errorf("reload: nothing is changed: %w", err)
	}
	in.level.Set(file.Log.SlogLevel())
	in.router.SetMaxMemory(int64(file.Limits.Memory))
	debug.SetMemoryLimit(int64(in.plain) + router.CollectorLimit(int64(file.Limits.Memory)))
	in.use(w)
	if in.docker != nil {
		in.followDocker(in.docker.Daemons())
	}
	in.log.Info("reloaded", "rules", w.set.Len(), "outbounds", len(file.Outbounds), "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// fixed are the keys that differ and cannot change while cgtun runs.
func (in *instance) fixed(file *config.File) (keys []string) {
	differ := func(key string, a, b any) {
		if !reflect.DeepEqual(a, b) {
			keys = append(keys, key)
		}
	}
	routes, now := file.Routes(), in.routes()
	differ("the number of [[route]]", len(routes), len(now))
	for i := range min(len(routes), len(now)) {
		is, was := routes[i], now[i]
		differ("route.name", is.Name, was.Name)
		differ("route.via", is.Via, was.Via)
		differ("route.on_exit", is.OnExit, was.OnExit)
		if was.OnExit == steer.OnExitClosed {
			// What outlives us is known by it.
			differ("route.table with on_exit = \"closed\"", is.Table, was.Table)
		}
		differ("[tun]", is.Tun, was.Tun)
	}
	if in.docker == nil {
		differ("select.docker = false", dockerMode(routes), dockerMode(now))
	}
	differ("[control]", file.Control, in.first.Control)
	differ("log.format", file.Log.Format, in.first.Log.Format)
	return keys
}

// steer has the kernel select and steer as a file says, or as before if that
// cannot be. The plans of before and after are both in force while marks change:
// so what is selected in both is captured all the time.
func (in *instance) steer(ctx context.Context, file *config.File) (err error) {
	ctx, cancel := in.untilStop(ctx)
	defer cancel()
	was, earlier := in.plans(in.file()), in.earlier
	chosen, selected := selections(file.Routes()), selections(in.routes())
	if err := in.selector.CanReselect(chosen); err != nil {
		return err
	}
	in.earlier = in.withEarlier(file.Routes())
	plans := in.plans(file)
	defer func() {
		if err != nil {
			in.earlier = earlier
		}
	}()
	if err := in.manager.CanChange(plans); err != nil {
		return err
	}
	same := reflect.DeepEqual(chosen, selected)
	err = in.manager.Change(ctx, plans)
	if err == nil && !same {
		err = in.selector.Reselect(ctx, chosen)
	}
	if err == nil && !same {
		err = in.manager.Change(ctx, in.plans(file)) // once more, with the picture of that
	}
	if err == nil {
		return nil
	}
	ctx, cancelBack := in.untilStop(context.Background())
	defer cancelBack()
	if !same {
		err = errors.Join(err, in.selector.Reselect(ctx, selected))
	}
	return errors.Join(err, in.manager.Change(ctx, was))
}

// untilStop bounds a change of what is steered, which ends when cgtun does.
func (in *instance) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, reloadTime)
	go func() {
		select {
		case <-in.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// withEarlier are the marks that routes had before, with those of now that are not
// theirs any more.
func (in *instance) withEarlier(routes []config.Route) [][]steer.Mark {
	all := make([][]steer.Mark, len(routes))
	for i, r := range in.routes() {
		mark := steer.Mark{Value: r.Mark & r.Mask, Mask: r.Mask}
		if in.earlier != nil {
			all[i] = slices.Clone(in.earlier[i])
		}
		if !slices.Contains(all[i], mark) {
			all[i] = append(all[i], mark)
		}
		now := steer.Mark{Value: routes[i].Mark & routes[i].Mask, Mask: routes[i].Mask}
		if all[i] = slices.DeleteFunc(all[i], func(m steer.Mark) bool { return m == now }); len(all[i]) == 0 {
			all[i] = nil // as at the start
		}
	}
	return all
}

// plans are what is to be steered of each route.
func (in *instance) plans(file *config.File) []steer.Plan {
	routes := file.Routes()
	plans := make([]steer.Plan, len(routes))
	self, ok := in.selector.Self()
	for i, r := range attachRoutes(routes) {
		plans[i] = r.Plan
		if ok {
			plans[i].Self = steer.Cgroup{Path: self.Path, ID: self.ID, Level: self.Level}
		}
		if in.earlier != nil {
			plans[i].Earlier = in.earlier[i]
		}
		if in.loopback != nil && !r.Kernel && file.DNS.Mode == dns.ModeForward {
			plans[i].Resolver = in.loopback.Port()
		}
	}
	return plans
}
