package dns

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"cgtun/flow"
)

const (
	// nameFor is how long an address keeps the name that it was given for,
	// beyond the TTL of the answer: programs keep addresses for longer.
	nameFor = time.Hour
	// maxNames bounds the addresses that are remembered for one client, and
	// maxClients the clients.
	maxNames   = 2048
	maxClients = 1024
	// maxAll bounds the addresses that are remembered for all of them, and
	// maxOfAnswer those of one answer.
	maxAll      = 65536
	maxOfAnswer = 64
)

// names remembers by what name a client has got an address: one client is a
// source address in an attachment, and all of an attachment whose queries came
// by another family than its flows. Safe for concurrent use.
type names struct {
	mu      sync.Mutex
	clients map[clientKey]*list.Element
	order   list.List // of *client, the one that asked last in front
	all     int       // addresses of all clients
}

type clientKey struct {
	attachment string
	src        netip.Addr // not valid: all of the attachment
}

// clientOf is who sent a flow.
func clientOf(f *flow.Flow) clientKey { return clientKey{f.Attachment, f.Src.Addr().Unmap()} }

type client struct {
	key   clientKey
	names map[netip.Addr]*list.Element
	order list.List // of *named, the newest in front
}

type named struct {
	addr  netip.Addr
	name  string
	by    netip.Addr // who asked
	who   string     // the same, of those of one address
	mixed bool       // another name had the address before, and its time is not over
	until time.Time
}

func newNames() *names { return &names{clients: map[clientKey]*list.Element{}} }

// note remembers what a client was told.
func (n *names) note(attachment string, src netip.Addr, who, name string, addrs []netip.Addr, ttl time.Duration, now time.Time) {
	if len(addrs) == 0 || name == "" {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, key := range []clientKey{{attachment, src}, {attachment, netip.Addr{}}} {
		c := n.client(key)
		before := len(c.names)
		for _, a := range addrs[:min(len(addrs), maxOfAnswer)] {
			c.note(named{addr: a.Unmap(), name: name, by: src, who: who, until: now.Add(ttl + nameFor)}, now)
		}
		n.all += len(c.names) - before
		for n.all > maxAll && n.order.Len() > 1 {
			n.drop(n.order.Back())
		}
	}
}

// drop forgets a client.
func (n *names) drop(e *list.Element) {
	c := n.order.Remove(e).(*client)
	n.all -= len(c.names)
	delete(n.clients, c.key)
}

func (n *names) client(key clientKey) *client {
	if e := n.clients[key]; e != nil {
		n.order.MoveToFront(e)
		return e.Value.(*client)
	}
	if len(n.clients) >= maxClients {
		n.drop(n.order.Back())
	}
	c := &client{key: key, names: map[netip.Addr]*list.Element{}}
	n.clients[key] = n.order.PushFront(c)
	return c
}

func (c *client) note(one named, now time.Time) {
	if e := c.names[one.addr]; e != nil {
		before := e.Value.(*named)
		one.mixed = now.Before(before.until) && (before.mixed || before.name != one.name)
		*before = one
		c.order.MoveToFront(e)
		return
	}
	if len(c.names) >= maxNames {
		delete(c.names, c.order.Remove(c.order.Back()).(*named).addr)
	}
	c.names[one.addr] = c.order.PushFront(&one)
}

// find returns the name under which src has got dst last, "" if it has not,
// whether it has got it under no other one, and whether who has got it.
func (n *names) find(attachment string, src, dst netip.Addr, who string, now time.Time) (name string, sure, own bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	src, dst = src.Unmap(), dst.Unmap()
	if one := n.look(clientKey{attachment, src}, dst, now); one != nil {
		return one.name, !one.mixed, one.who == who
	}
	one := n.look(clientKey{attachment, netip.Addr{}}, dst, now)
	if one == nil || !(one.by.IsLoopback() || one.by.Is4() != src.Is4()) {
		return "", false, false // another client's
	}
	return one.name, !one.mixed, one.who == who
}

func (n *names) look(key clientKey, dst netip.Addr, now time.Time) *named {
	e := n.clients[key]
	if e == nil {
		return nil
	}
	c := e.Value.(*client)
	found := c.names[dst]
	if found == nil {
		return nil
	}
	one := found.Value.(*named)
	if now.After(one.until) {
		delete(c.names, dst)
		c.order.Remove(found)
		n.all--
		return nil
	}
	return one
}

// forget drops what the clients of an attachment were told.
func (n *names) forget(attachment string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for key, e := range n.clients {
		if key.attachment == attachment {
			n.drop(e)
		}
	}
}
