// Package dns answers the queries that clients send to port 53, and remembers
// by what names they got addresses. It owns the [dns] table, the cache and the
// sockets to upstreams, which it opens through outbounds.
//
// # Theory of operation
//
// Take looks at one message. A question to a resolver is answered: from the
// configuration, from the cache, or by upstreams. Everything else that comes to
// port 53 is not ours, and goes on as a flow to the server that it was sent to
// (parseQuery).
//
// Which upstreams, in this order: those of the first [[dns.route]] whose suffix
// the name has; those of [dns]; else the server that was asked, by the outbound
// that the rules give to the client's flow to it, and where it does not answer
// the resolvers of this machine. Answers are kept by what was asked, and whom:
// so split horizons stay true, and "dig @SERVER" too.
//
// A question that is not in the cache is put by the first client that asks it;
// others with the same one wait for that (flight). Upstreams are raced: the best
// one first, by each member of a group, the next when it has failed or after the
// stagger, which follows its round trips; each in a socket of its own, so that each has another port. One
// that did not answer while another one did goes last for a while (health). An
// upstream that says SERVFAIL or REFUSED has failed, and its word is passed on
// only if nobody has a better one.
//
// An answer that is too old is given with a TTL of 30 s when nothing has
// answered for 1.8 s (RFC 8767); without one the client gets SERVFAIL before 5 s
// have passed.
//
// What comes back must have the question, the id and the peer that were asked
// (RFC 5452); what has not is dropped, and waited on.
//
// router calls it, for the clients; cmd makes it. It resolves nothing for
// cgtun's own use.
package dns

// port is that of DNS.
const port = 53
