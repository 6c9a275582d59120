// Package control is the daemon's control socket, the words that are spoken
// there, and the client for it: what is going on, as JSON.
//
// It owns the unix socket and its clients, and nothing of what it tells:
// whoever runs the daemon implements Source. cmd/cgtun makes the Server in the
// daemon and uses Client in the commands.
//
// # Protocol
//
// One request per connection, one JSON object; then one reply, one JSON
// object in a line, and the server closes. A reply has "result" or "error";
// an error has its text and the exit code of the command that asked. The
// watching of flows answers with many such lines and goes on until either
// side closes. The protocol is between one version's client and server: what
// scripts may rely on is the output of the commands.
//
// # Who may ask
//
// The socket is 0660 root:cgtun where that group exists and 0600 otherwise;
// beside that each client is judged by SO_PEERCRED and SO_PEERGROUPS
// (socket(7), unix(7)): root may change the daemon, the group may read and may
// put its own processes into a selected cgroup.
//
// # Bounds
//
// A request is at most 1 MiB and comes within 5 s; each reply, or line of a
// stream, is taken within 5 s; 64 clients at once, a quarter of which only
// root can have, so that nobody in the group locks root out. What is turned
// away is counted.
package control
