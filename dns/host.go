package dns

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	wire "github.com/miekg/dns"
)

const (
	resolvConf = "/etc/resolv.conf"
	// resolvedConf has what systemd-resolved asks itself, while resolvConf
	// names its stub (systemd-resolved.service(8)).
	resolvedConf = "/run/systemd/resolve/resolv.conf"
	// hostEvery is how often the files are looked at.
	hostEvery = time.Second
)

// host are the resolvers of this machine, as its files have them now.
type host struct {
	read func(string) ([]byte, error) // os.ReadFile, but for tests

	mu     sync.Mutex
	looked time.Time
	addrs  []netip.AddrPort
}

func newHost() *host { return &host{read: os.ReadFile} }

// stub says whether an address is systemd-resolved's own listener.
func stub(a netip.Addr) bool {
	return a == netip.AddrFrom4([4]byte{127, 0, 0, 53}) || a == netip.AddrFrom4([4]byte{127, 0, 0, 54})
}

// servers returns the resolvers, the stub replaced by what it asks. The slice is
// not to be changed.
func (h *host) servers(now time.Time) []netip.AddrPort {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.looked.IsZero() && now.Sub(h.looked) < hostEvery {
		return h.addrs
	}
	h.looked = now
	addrs := h.list(resolvConf)
	if len(addrs) == 0 || slices.ContainsFunc(addrs, stub) {
		if real := h.list(resolvedConf); len(real) > 0 {
			addrs = append(real, addrs...)
			addrs = slices.DeleteFunc(addrs, stub)
		}
	}
	h.addrs = nil
	for _, a := range addrs {
		if ap := netip.AddrPortFrom(a, port); !slices.Contains(h.addrs, ap) {
			h.addrs = append(h.addrs, ap)
		}
	}
	return h.addrs
}

// maxHost bounds the resolvers that are read from a file: three is what the C
// library uses.
const maxHost = 8

func (h *host) list(path string) (addrs []netip.Addr) {
	data, err := h.read(path)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(data)) {
		line := strings.Fields(line)
		if len(line) < 2 || line[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(line[1]); err == nil && len(addrs) < maxHost {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// local says whether a resolver is one that no proxy reaches: it is asked from
// here.
func local(a netip.Addr) bool {
	return a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast()
}

// fixed answers from the names of the configuration.
func (s *settings) fixed(q *query) *answer {
	if len(s.hosts) == 0 || q.kind == wire.TypeNone {
		return nil
	}
	addrs, ok := s.hosts[q.text()]
	if !ok {
		return nil
	}
	name, _, err := wire.UnpackDomainName(q.name, 0)
	if err != nil {
		return nil
	}
	var m wire.Msg
	m.SetQuestion(name, q.kind)
	m.Response, m.RecursionAvailable, m.Authoritative = true, true, true
	for _, a := range addrs {
		h := wire.RR_Header{Name: name, Class: wire.ClassINET, Ttl: fixedTTL}
		switch {
		case a.Is4() && (q.kind == wire.TypeA || q.kind == wire.TypeANY):
			h.Rrtype = wire.TypeA
			m.Answer = append(m.Answer, &wire.A{Hdr: h, A: a.AsSlice()})
		case a.Is6() && (q.kind == wire.TypeAAAA || q.kind == wire.TypeANY):
			h.Rrtype = wire.TypeAAAA
			m.Answer = append(m.Answer, &wire.AAAA{Hdr: h, AAAA: a.AsSlice()})
		}
	}
	m.Compress = true
	packed, err := m.Pack()
	if err != nil {
		return nil
	}
	a, err := q.parseAnswer(packed, m.Id)
	if err != nil {
		return nil
	}
	return a
}

// fixedTTL is that of the configuration's own answers, in seconds.
const fixedTTL = 60
