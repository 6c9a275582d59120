package main

import (
	"strconv"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/steer"
	"cgtun/tun"
)

// selections are what the routes capture, in their order.
func selections(routes []config.Route) []cgroupsel.Selection {
	all := make([]cgroupsel.Selection, len(routes))
	for i, r := range routes {
		all[i] = cgroupsel.Selection{
			Cgroups: r.Select.Cgroups, Netns: r.Select.Netns, Create: r.Select.Create,
			Mark: r.Mark, Mask: r.Mask, Closed: r.OnExit == steer.OnExitClosed,
		}
	}
	return all
}

// attachRoutes are the routes as they are attached, but for what the selector
// knows.
func attachRoutes(routes []config.Route) []attach.Route {
	all := make([]attach.Route, len(routes))
	for i, r := range routes {
		all[i] = attach.Route{
			Name: r.Name, Instance: strconv.Itoa(r.Table), Kernel: r.Via.Mode != steer.ViaTun,
			Tun: tun.Options{
				Name: r.Tun.Name, Table: uint32(r.Table), Addresses: r.Tun.Address,
				MTU: r.Tun.MTU, Queues: r.Tun.Queues,
			},
			Plan: steer.Plan{
				Mark: r.Mark, Mask: r.Mask, Table: r.Table, Priority: r.Priority,
				Bypass: r.Select.Bypass, Interfaces: r.Select.Interfaces, Via: r.Via,
				Closed: r.OnExit == steer.OnExitClosed,
			},
		}
	}
	return all
}

// capturing finds the attachments of a namespace: those of all routes.
func capturing(states []attach.State, inode uint64) (in []attach.State) {
	for _, s := range states {
		if s.NetnsIno == inode {
			in = append(in, s)
		}
	}
	return in
}
