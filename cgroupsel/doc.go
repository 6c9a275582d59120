// Package cgroupsel owns what hangs on cgroups: the BPF programs and maps at
// the root of cgroup2, the cgroups that cgtun made, and the cgroup that cgtun
// itself is in. It says who is captured; it knows nothing of routes, devices
// or flows. cmd makes one Selector, attach reads its snapshots, control and
// router ask it for paths.
//
// # Theory of operation
//
// Who is selected is decided in the kernel at the moment a cgroup is made,
// before any process can be in it:
//
//	raw tracepoint cgroup_mkdir    parent, plain paths, globs and units → sel[id] = {mark, mask, selection}
//	raw tracepoint cgroup_release  delete sel[id]; not at rmdir: sockets outlive that
//	sock_create, connect4, connect6 at the root of cgroup2:
//	                               v = sel[current cgroup]; mark = mark &^ v.mask | v.mark
//
// A trie holds "/a/b/" per plain path, so that "/a/b" and all below match and
// "/a/bc" does not; globs and units are one automaton (automaton.go). Who has
// what several select is said in picker.go, once for the program and once for
// user space. The tracepoints are attached first and the tree is walked after;
// both write the same values, so that nothing is missed between. What the
// programs select they tell in a ring, which only says "look again".
//
// Namespaces that select.netns names are a second map of the same programs
// (named.go). They also write whose a socket is (process.go).
//
// Links are not pinned: with the process they are gone, however it dies.
//
// An entry with mask 0 means "not selected": the cgroup of cgtun itself. If
// cgtun was started inside a selected cgroup, or namespaces are selected, it
// makes a child of the one it is in, moves there before the socket programs are attached, and comes back in Close.
//
// Where the kernel refuses a part, the next way is taken and said (Features):
//
//	tracepoints and programs at the root   held: no re-creation slips by
//	programs on each selected cgroup       attached again when inotify tells of a new one
//	none                                   only what steer does with the ids of a Snapshot
//
// Selected tasks live in other network namespaces, too. How those are found, and
// why no packet leaves one of them before it is attached, is told in gate.go
// and hold.go: first, hold, gate. What processes hand to a device themselves goes
// around all of that: see frames.go.
//
// Cgroups and parents that were made here carry the xattr user.cgtun with the
// instance, which is how they are known again: in Close, and by Find and Remove
// after a kill. There is no state file.
//
// See cgroups(7), cgroup_namespaces(7), bpf(2), inotify(7), and
// Documentation/admin-guide/cgroup-v2.rst of the kernel.
package cgroupsel
