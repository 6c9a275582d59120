package policy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ownProtocol is the protocol number of cgtun's routes.
const ownProtocol = 197

// picture is what is known of home as of one look: the tables, and what was
// asked of routes and links since.
type picture struct {
	denied *bart.Table[kind]
	own    map[netip.Addr]bool // home's addresses
	stale  atomic.Bool         // home may have changed: ask anew

	mu     sync.RWMutex
	routes map[query]answer
	links  map[int]answer
}

// query is what a route depends on; answer what came of it. The zero answer: it
// is not denied.
type (
	query struct {
		dst, source netip.Addr
		mark        uint32
	}
	answer struct {
		kind kind
		link string // with container
	}
)

// maxRoutes bounds the routes that are remembered. A look-up takes as long as a
// few system calls.
const maxRoutes = 4096

// maxAsking is how many questions are asked of the kernel at a time: each reads into
// 64 KiB of stack.
const maxAsking = 32

// interruptions is how often in a row a dump may be cut short by changes.
const interruptions = 20

// look reads what home has. The kernel may say that a list changed while it was
// read; then it is read again.
func (j *Judge) look() (p *picture, err error) {
	for range interruptions {
		if p, err = j.lookOnce(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return p, err
}

func (j *Judge) lookOnce() (*picture, error) {
	p := &picture{denied: newTable(), own: map[netip.Addr]bool{}, routes: map[query]answer{}, links: map[int]answer{}}
	for _, a := range j.opts.Devices() {
		p.add(netip.PrefixFrom(a, a.BitLen()), device)
	}
	// All that is local, which is more than the addresses (AnyIP).
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list local routes: %w", err)
	}
	for _, r := range routes {
		if prefix, ok := prefixOf(r.Dst); ok {
			p.add(prefix, kindOf(r.Type))
		}
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if prefix, ok := prefixOf(a.IPNet); ok {
			p.add(netip.PrefixFrom(prefix.Addr(), prefix.Addr().BitLen()), home)
			p.own[prefix.Addr()] = true
		}
	}
	return p, nil
}

// add denies a prefix, but for what is denied already: that has the better word.
func (p *picture) add(prefix netip.Prefix, k kind) {
	if k == "" {
		return
	}
	if _, ok := p.denied.LookupPrefix(prefix); !ok {
		p.denied.Insert(prefix, k)
	}
}

// kindOf is what the type of a route says of its destination.
func kindOf(routeType int) kind {
	switch routeType {
	case unix.RTN_LOCAL, unix.RTN_ANYCAST:
		return home
	case unix.RTN_BROADCAST:
		return broadcast
	case unix.RTN_MULTICAST:
		return multicast
	}
	return ""
}

// route says what the kernel would make of a socket's destination. Where it has
// no route, dialling will tell.
func (j *Judge) route(p *picture, q query) answer {
	fresh := p.stale.Load()
	if !fresh {
		p.mu.RLock()
		known, ok := p.routes[q]
		p.mu.RUnlock()
		if ok {
			return known
		}
	}
	j.asking <- struct{}{}
	a := j.ask(p, q, fresh)
	<-j.asking
	// Asked before anybody said that it may have changed.
	if !p.stale.Load() {
		p.mu.Lock()
		if len(p.routes) >= maxRoutes {
			clear(p.routes)
		}
		p.routes[q] = a
		p.mu.Unlock()
	}
	return a
}

func (j *Judge) ask(p *picture, q query, fresh bool) answer {
	o := netlink.RouteGetOptions{Mark: q.mark}
	if q.source.IsValid() && q.source.Is4() == q.dst.Is4() {
		o.SrcAddr = q.source.AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(q.dst.AsSlice(), &o)
	if err != nil {
		return answer{}
	}
	for _, r := range routes {
		if k := kindOf(r.Type); k != "" {
			return answer{kind: k}
		}
		indexes := []int{r.LinkIndex}
		for _, hop := range r.MultiPath {
			indexes = append(indexes, hop.LinkIndex)
		}
		for _, index := range indexes {
			if a := j.leads(p, index, fresh); a.kind != "" {
				return a
			}
		}
	}
	return answer{}
}

// leads says whether a link leads to containers.
func (j *Judge) leads(p *picture, index int, fresh bool) answer {
	if index == 0 {
		return answer{}
	}
	if !fresh {
		p.mu.RLock()
		known, ok := p.links[index]
		p.mu.RUnlock()
		if ok {
			return known
		}
	}
	name, err := j.containerSide(index)
	if err != nil {
		// It went this moment, and so did the route.
		return answer{}
	}
	a := answer{}
	if name != "" {
		a = answer{container, name}
	}
	p.mu.Lock()
	p.links[index] = a
	p.mu.Unlock()
	return a
}

// containerName are the names that container engines give to their bridges.
var containerName = regexp.MustCompile(`^(docker0|br-[0-9a-f]{12}|virbr.*|cni.*|podman.*|lxcbr.*|lxdbr.*)$`)

// containerSide returns the name of a link that leads to containers: by its name,
// or as the near end of a veth into an attached namespace, or as the bridge of
// one. "": it does not, or is wanted, as it is by an outbound or a default route.
func (j *Judge) containerSide(index int) (string, error) {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return "", err
	}
	name := l.Attrs().Name
	if j.named[name] {
		return "", nil
	}
	if !containerName.MatchString(name) {
		into, err := j.intoAttached(l)
		if err != nil || !into {
			return "", err
		}
	}
	filter := &netlink.Route{LinkIndex: index, Table: unix.RT_TABLE_UNSPEC}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return "", err
	}
	for _, r := range routes {
		prefix, ok := prefixOf(r.Dst)
		if r.Type == unix.RTN_UNICAST && r.Protocol != ownProtocol && (!ok || prefix.Bits() == 0) {
			return "", nil
		}
	}
	return name, nil
}

// intoAttached says whether a link is the near end of a veth(4) into an attached
// namespace, or a bridge with such a port.
func (j *Judge) intoAttached(l netlink.Link) (bool, error) {
	attached := j.opts.Attached()
	if len(attached) == 0 {
		return false, nil
	}
	into := func(l netlink.Link) bool { return l.Type() == "veth" && attached[l.Attrs().NetNsID] }
	if l.Type() != "bridge" {
		return into(l), nil
	}
	all, err := netlink.LinkList()
	if err != nil {
		return false, err
	}
	for _, port := range all {
		if port.Attrs().MasterIndex == l.Attrs().Index && into(port) {
			return true, nil
		}
	}
	return false, nil
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if a = a.Unmap(); !ok || bits != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, ones), true
}
