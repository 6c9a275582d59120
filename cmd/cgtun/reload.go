package main

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"cgtun/attach"
	"cgtun/config"
	"cgtun/control"
	"cgtun/dns"
	"cgtun/router"
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
		return fmt.Errorf("reload: nothing is changed: %s cannot change while cgtun runs; restart it to apply the file", strings.Join(fixed, ", "))
	}
	w, err := in.newWays(file, before)
	if err != nil {
		return fmt.Errorf("reload: nothing is changed: %w", err)
	}
	in.level.Set(file.Log.SlogLevel())
	in.router.SetMaxMemory(int64(file.Limits.Memory))
	debug.SetMemoryLimit(int64(in.plain) + router.CollectorLimit(int64(file.Limits.Memory)))
	in.use(w)
	ctx, cancel := context.WithTimeout(ctx, reloadTime)
	defer cancel()
	if err := in.manager.Change(ctx, in.changes(file)); err != nil {
		return fmt.Errorf("reload: rules and outbounds are changed, but not yet what is bypassed everywhere: %w", err)
	}
	in.log.Info("reloaded", "rules", w.set.Len(), "outbounds", len(file.Outbounds), "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// fixed are the keys that differ and cannot change while cgtun runs.
func (in *instance) fixed(file *config.File) (keys []string) {
	routes := file.Routes()
	differ := func(key string, a, b any) {
		if !reflect.DeepEqual(a, b) {
			keys = append(keys, key)
		}
	}
	differ("the number of [[route]]", len(routes), len(in.routes))
	for i := range min(len(routes), len(in.routes)) {
		is, was := routes[i], in.routes[i]
		is.Select.Bypass, was.Select.Bypass = nil, nil
		differ("[route]", is.Config, was.Config)
		differ("[tun]", is.Tun, was.Tun)
		differ("[select] (but for bypass)", is.Select, was.Select)
	}
	differ("[control]", file.Control, in.file.Control)
	differ("log.format", file.Log.Format, in.file.Log.Format)
	return keys
}

// changes are what a file says of the routes that can change.
func (in *instance) changes(file *config.File) []attach.Change {
	routes := file.Routes()
	all := make([]attach.Change, len(routes))
	for i, r := range attachRoutes(routes) {
		all[i].Bypass = routes[i].Select.Bypass
		if in.loopback != nil && !r.Kernel && file.DNS.Mode == dns.ModeForward {
			all[i].Resolver, all[i].OnLink = in.loopback.Port(), in.origins != nil
		}
	}
	return all
}
