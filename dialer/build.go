package dialer

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
)

// Hop is an Outbound that is made of one [[outbound]]: a Direct or a Proxy.
type Hop interface {
	Outbound
	// Type is that of the configuration.
	Type() string
	// Path is the way of a connection, the nearest hop first. The caller does
	// not change it.
	Path() []string
	// State says whether the outbound can be used at all, and if not why, in
	// words for the user. It asks the kernel anew each time, and no server.
	State() (up bool, reason string)
}

// Options are what outbounds have beside their own configuration.
type Options struct {
	// Kept are taken as they are, with all that they know: they and what they go
	// through must have the same configuration as when they were made.
	Kept    map[string]Hop
	Logger  *slog.Logger // when a server begins and ends to refuse the account; nil: none
	Capture []Mark       // marks that lead into a tun
	// Judge says why an address may not be reached on behalf of others than
	// processes of home, by sockets that leave in one of these ways. Nil: there
	// is no such address. Safe for concurrent use.
	Judge func(netip.AddrPort, []Leave) error
}

// New makes an outbound of each configuration, in their order. It looks nothing
// up and dials nobody: a name that is not known and an interface that is not
// there may come later. The first one must be the plain Direct by which the
// servers of proxies without Via are reached. A Via that is none of them is a
// group of them, which Link puts in its place before anybody dials.
func New(configs []Config, o Options) ([]Hop, error) {
	b := builder{configs: map[string]Config{}, made: map[string]Hop{}, opts: o}
	for i, c := range configs {
		if i == 0 {
			b.plain = c.Name
		}
		if _, ok := b.configs[c.Name]; ok {
			return nil, fmt.Errorf("make outbound %q: there are two of that name", c.Name)
		}
		b.configs[c.Name] = c
		if h, ok := o.Kept[c.Name]; ok && !captures(c.Mark, o.Capture) {
			b.made[c.Name] = h // else to make it says what is wrong
		}
	}
	var hops []Hop
	for _, c := range configs {
		h, err := b.make(c.Name, nil)
		if err != nil {
			return nil, err
		}
		hops = append(hops, h)
	}
	return hops, nil
}

type builder struct {
	configs map[string]Config
	made    map[string]Hop
	plain   string
	opts    Options
}

// make makes the outbound of that name, what it leads through first. trail has
// the names that lead to it.
func (b *builder) make(name string, trail []string) (Hop, error) {
	if h, ok := b.made[name]; ok {
		return h, nil
	}
	c := b.configs[name]
	trail = append(trail, name)
	if len(trail) > len(b.configs) {
		return nil, fmt.Errorf("make outbound %q: via leads back to itself: %s", name, strings.Join(trail, " > "))
	}
	var h Hop
	switch {
	case c.Type == TypeDirect || c.Type == "":
		d, err := NewDirect(c, b.opts.Capture...)
		if err != nil {
			return nil, err
		}
		h = d
	default:
		via := c.Via
		if via == "" {
			via = b.plain
		}
		var next Outbound
		if _, ok := b.configs[via]; ok {
			hop, err := b.make(via, trail)
			if err != nil {
				return nil, err
			}
			next = hop
		}
		p, err := NewProxy(c, next, b.opts)
		if err != nil {
			return nil, err
		}
		h = p
	}
	b.made[name] = h
	return h, nil
}

// Link puts groups in the places of hops, made by New, whose Via they are.
func Link(hops []Hop, groups map[string]Outbound) error {
	for _, h := range hops {
		p, ok := h.(*Proxy)
		if !ok || p.next != nil {
			continue
		}
		if p.next, ok = groups[p.via]; !ok {
			return fmt.Errorf("make outbound %q: there is no outbound and no group %q to go through", p.name, p.via)
		}
	}
	return nil
}
