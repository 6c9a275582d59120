// Package steer makes marked packets take a routing table of their own. It
// owns what lives in one namespace's kernel tables: an nft table, ip rules,
// the routes of one table, and the sysctls and link group of our own device.
// It owns no device and no cgroup, and decides nothing: a Plan says what, and
// Apply makes it so. attach calls it; cmd calls Find and Remove.
//
// See nft(8), ip-rule(8), ip-route(8), and Documentation/networking/
// ip-sysctl.rst of the kernel for src_valid_mark and rp_filter.
//
// # The nft table
//
// Chain out decides for each packet that a local process sends. Marks may have
// been set before, by BPF programs; the table completes them: sockets older
// than the selection, answers of servers, packets without a socket.
//
//	own socket of cgtun                    as it is
//	answer to what came in from outside    unmarked
//	to a bypassed prefix                   unmarked
//	answer or ICMP error, ct mark M        mark M: the kernel's own have no socket
//	TCP, SYN of a selected cgroup          ct mark M
//	TCP, SYN that is marked already        ct mark M
//	TCP, ct mark M                         mark M, with or without a socket
//	anything else of a selected cgroup     mark M
//
// Chain post is the guard: a marked packet leaves by our device or not at all
// (SO_BINDTODEVICE needs no capability), and what enters the device has a
// source of this namespace. What comes out of the device reaches this
// namespace's own sockets and those behind the plan's interfaces, and nothing
// else: chains pre and forward. It gets ct mark M, so that it is answered the
// way it came, and is marked, for rp_filter=1 looks the way back up with the
// mark.
//
// Chains enter and through decide on what is forwarded in through an interface
// as out does on what a program sends; the source must be one that is routed
// back by an interface. Chain keep comes before the nat chains of others: who
// is masqueraded everywhere else keeps his address in our device. A chain of
// others that drops what is forwarded cannot be overruled from here: Checks
// names it.
//
// Chain names, in home, gives what selected cgroups ask of resolvers on loopback
// to a port of our own and leaves the address as it is; and what they ask of
// those on home's own networks to that port of 127.0.0.1 or ::1. It comes behind docker's
// chain, of priority -100, so that 127.0.0.11 stays docker's.
//
// # The routes
//
// The table's default route has the source address that the main table would
// choose. A socket that is marked from its birth gets its source by this
// route; a UDP server that is, and answers or connects back to who came in
// from outside, must do so from the address that was asked.
//
// # Bits of the ct mark
//
// The ct mark belongs to everybody, so each test and each set is masked. Two
// things are kept in it:
//
//   - Bit 30: the connection came in from outside, over a device that is no
//     cgtun's (ours carry a link group). All instances share it, because it
//     means the same for each of them.
//   - The mark under its mask, bit 30 left out: this connection was captured
//     by that instance. It is the same value at the same place as in the
//     packet's mark, for two reasons. Marks of two instances never overlap,
//     so neither do these, whatever the masks are. And the firewalls that
//     copy ct mark to mark or back (CONNMARK) find a value that is right.
//
// A connection's SYN starts anew: what an earlier connection of the same
// addresses and ports left there is cleared first.
//
// # Ways
//
// Where the way is one of the kernel (Via), the guard lets its device pass in
// place of ours, and the table ends in a route that blocks, so that who is
// marked learns at once that there is no way. Packets keep the address that
// they have: to masquerade is the admin's. To a transparent proxy the table
// makes all addresses local on lo, and chain enter hands to its listener what
// is marked; what it does not serve is refused, for else services of this
// machine would answer for others.
//
// # Life
//
// In home the nft table is owned by the netlink socket of its Steering: it ends
// with the process however that dies, and "nft flush ruleset" skips it. The
// routes lead through our device and end with it, those that throw too, as they
// hang on a nexthop object of it. So after kill -9 there are left ip rules that
// lead to an empty table. Of a way by the kernel the routes stay as well; nobody
// is marked for them. Find sees all this, and Remove, or the next Open in this
// namespace, takes it away.
//
// In another namespace nothing may be held, as that would keep it alive: the
// table is plain, without a guard, and names the home that it is of. After kill
// -9 it still marks, for ip rules that lead to an empty table. What guards there
// while we live is cgroupsel's gate.
//
// A closed plan leaves on purpose what blocks: a table that is persistent as
// well as owned (Linux 6.9; before, a plain one), guard included, the ip rules,
// what throws, and a route that blocks. The next start takes it over without a
// gap, and leaves it if it fails; Remove opens it. A family without a way out (Plan.No4, No6) is fenced
// then: what is marked goes by the routes of the main table, but by no default
// route that comes, and loses its mark in chain post. Once its owner is dead, "nft
// flush ruleset" takes the table; the programs that cgroupsel pins still hold then.
package steer
