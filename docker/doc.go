// Package docker finds docker daemons and says what of them is to be selected:
// the daemon's own cgroup, and those that its builds and containers are in. It
// owns what is known of a daemon and the watch for its begin and end; it selects
// nothing itself. cmd makes one Finder and hands what it finds to cgroupsel.
//
// # Theory of operation
//
// A daemon is a root process that executes dockerd in home's network namespace.
// The kernel tells each exec of that name; what the process really is says /proc:
// its program, its user, its namespaces. Its end is told by its pidfd.
//
// Where its containers will be is known from its command line and its
// daemon.json (--cgroup-parent); whether its default builder is BuildKit, from
// what it answers on its socket. All of that is the daemon's own word: so only
// cgroups below the root of its own cgroup namespace are believed of it, however
// it came by its name.
//
// What a daemon had stays selected when it ends: its containers can outlive it
// (live-restore), and the next one begins in the same place, selected from its
// first instruction on. It goes when another daemon is there.
//
// See dockerd(8), cgroup_namespaces(7), pidfd_open(2), and the Engine API's
// GET /version.
package docker
