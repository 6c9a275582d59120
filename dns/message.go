package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"

	wire "github.com/miekg/dns"
)

// The parts of a message's header (RFC 1035 §4.1.1).
const (
	headerSize = 12

	bitResponse  = 1 << 15
	maskOpcode   = 0xf << 11
	bitTruncated = 1 << 9
	bitRecurse   = 1 << 8
	bitAuthentic = 1 << 5 // RFC 6840 §5.7: the client understands it in answers
	bitNoCheck   = 1 << 4
	maskRcode    = 0xf
)

const (
	typeOPT = 41
	optSize = 11 // of an OPT record without options
	bitDO   = 1 << 15

	// upstreamSize is what we offer to take by UDP: no path cuts it up
	// (RFC 9715).
	upstreamSize = 1232
	// plainSize is what a client without EDNS takes by UDP (RFC 1035 §4.2.1).
	plainSize  = 512
	maxMessage = 65535
)

// query is a client's question, as it lies in its message.
type query struct {
	id      uint16
	flags   uint16 // bitRecurse, bitAuthentic and bitNoCheck of it
	name    []byte // labels, as the client wrote them
	kind    uint16 // QTYPE
	edns    bool
	do      bool
	limit   int    // bytes of an answer
	options []byte // of OPT, those that are not between us and the client alone
}

// parseQuery reads a message that is a question to be answered: one name of the
// Internet class, asked of a resolver. ok is false for everything else, which is
// for the server that it was sent to: answers, updates, notifications, zone
// transfers, signed messages, questions to authorities (without RD), and what is
// no DNS. The result points into msg.
func parseQuery(msg []byte, tcp bool) (q query, ok bool) {
	if len(msg) < headerSize {
		return q, false
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if flags&(bitResponse|maskOpcode|bitTruncated) != 0 || flags&bitRecurse == 0 {
		return q, false
	}
	if !bytes.Equal(msg[4:10], []byte{0, 1, 0, 0, 0, 0}) || msg[10] != 0 || msg[11] > 1 {
		return q, false
	}
	end, ok := skipLabels(msg, headerSize)
	if !ok || len(msg) < end+4 {
		return q, false
	}
	q = query{
		id: binary.BigEndian.Uint16(msg), flags: flags & (bitRecurse | bitAuthentic | bitNoCheck),
		name: msg[headerSize:end], kind: binary.BigEndian.Uint16(msg[end:]), limit: plainSize,
	}
	class := binary.BigEndian.Uint16(msg[end+2:])
	if class != wire.ClassINET || q.kind == wire.TypeAXFR || q.kind == wire.TypeIXFR || q.kind == 0 || q.kind == typeOPT {
		return q, false
	}
	rest := msg[end+4:]
	if msg[11] == 1 {
		if rest, ok = q.readOPT(rest); !ok {
			return q, false
		}
	}
	if tcp {
		q.limit = maxMessage
	}
	return q, len(rest) == 0
}

// readOPT reads the one additional record that a question may have (RFC 6891),
// and returns what is behind it.
func (q *query) readOPT(b []byte) (rest []byte, ok bool) {
	if len(b) < optSize || b[0] != 0 || binary.BigEndian.Uint16(b[1:]) != typeOPT {
		return nil, false
	}
	const version = 6
	n := int(binary.BigEndian.Uint16(b[9:]))
	if b[version] != 0 || len(b) < optSize+n {
		return nil, false
	}
	q.edns = true
	q.limit = max(plainSize, int(binary.BigEndian.Uint16(b[3:])))
	q.do = binary.BigEndian.Uint16(b[7:])&bitDO != 0
	q.options, ok = endToEnd(b[optSize : optSize+n])
	return b[optSize+n:], ok
}

// endToEnd leaves out the options that concern one hop: cookies (RFC 7873),
// keepalive (RFC 7828) and padding (RFC 7830).
func endToEnd(options []byte) (kept []byte, ok bool) {
	for len(options) > 0 {
		if len(options) < 4 {
			return nil, false
		}
		n := 4 + int(binary.BigEndian.Uint16(options[2:]))
		if len(options) < n {
			return nil, false
		}
		switch binary.BigEndian.Uint16(options) {
		case wire.EDNS0COOKIE, wire.EDNS0TCPKEEPALIVE, wire.EDNS0PADDING:
		default:
			kept = append(kept, options[:n]...)
		}
		options = options[n:]
	}
	return kept, true
}

// skipLabels returns where a name that has no pointers ends.
func skipLabels(msg []byte, off int) (end int, ok bool) {
	const maxName = 255
	for start := off; off < len(msg) && off-start < maxName; {
		n := int(msg[off])
		if n == 0 {
			return off + 1, true
		}
		if n > 63 {
			return 0, false
		}
		off += 1 + n
	}
	return 0, false
}

// key tells apart what may have different answers from one server.
func (q *query) key(scope string) string {
	b := make([]byte, 0, len(scope)+len(q.name)+len(q.options)+6)
	b = append(b, scope...)
	b = append(b, 0)
	for _, c := range q.name {
		b = append(b, lower(c))
	}
	b = binary.BigEndian.AppendUint16(b, q.kind)
	b = append(b, byte(q.flags))
	if q.do {
		b = append(b, 1)
	}
	return string(append(b, q.options...))
}

// lower is for ASCII, which is all that names are compared by (RFC 4343). The
// lengths of labels are below 'A'.
func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// text is the name in lower case without the last dot, escaped as in zone files.
func (q *query) text() string {
	name, _, err := wire.UnpackDomainName(q.name, 0)
	if err != nil {
		return ""
	}
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// upstream returns the message that an upstream is asked with.
func (q *query) upstream(id uint16, edns bool) []byte {
	b := make([]byte, headerSize, headerSize+len(q.name)+4+optSize+len(q.options))
	binary.BigEndian.PutUint16(b, id)
	binary.BigEndian.PutUint16(b[2:], q.flags)
	b[5] = 1
	b = append(b, q.name...)
	b = binary.BigEndian.AppendUint16(b, q.kind)
	b = binary.BigEndian.AppendUint16(b, wire.ClassINET)
	if edns {
		b[11] = 1
		b = q.appendOPT(b, upstreamSize, 0, q.options)
	}
	return b
}

func (q *query) appendOPT(b []byte, size, extended int, options []byte) []byte {
	var do uint16
	if q.do {
		do = bitDO
	}
	b = append(b, 0, 0, typeOPT)
	b = binary.BigEndian.AppendUint16(b, uint16(size))
	b = append(b, byte(extended), 0)
	b = binary.BigEndian.AppendUint16(b, do)
	b = binary.BigEndian.AppendUint16(b, uint16(len(options)))
	return append(b, options...)
}

// answer is what came back, without what concerns one client or one hop alone.
// It is not changed once it is made.
type answer struct {
	msg      []byte // with id 0, and without OPT
	ttls     []int  // where in msg the TTLs are
	ttl      uint32 // seconds that it may be kept for
	extended int    // the upper bits of the rcode
	options  []byte // of its OPT, for the client
	addrs    []netip.Addr
	name     string // of the question, if there are addrs
}

var (
	errNotOurs   = errors.New("not the answer to this question")
	errTruncated = errors.New("the answer does not fit into a datagram")
)

// parseAnswer reads what came for a question that was asked with id.
func (q *query) parseAnswer(msg []byte, id uint16) (*answer, error) {
	if len(msg) < headerSize || binary.BigEndian.Uint16(msg) != id {
		return nil, errNotOurs
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if flags&bitResponse == 0 || flags&maskOpcode != 0 {
		return nil, errNotOurs
	}
	if !q.sameQuestion(msg) {
		if flags&maskRcode != 0 && len(msg) == headerSize {
			return q.failed(int(flags & maskRcode)), nil // of a server that could not read it
		}
		return nil, errNotOurs
	}
	if flags&bitTruncated != 0 {
		return nil, errTruncated
	}
	var m wire.Msg
	if err := m.Unpack(msg); err != nil {
		return nil, err
	}
	if _, whole := records(msg); !whole {
		return nil, errNotOurs // the library takes fewer records than are said to come
	}
	a := &answer{msg: slices.Clone(msg)}
	if !a.cutOPT() {
		// Records behind OPT may point over it: written anew.
		plain := m
		plain.Extra = slices.DeleteFunc(slices.Clone(m.Extra), func(rr wire.RR) bool { return rr.Header().Rrtype == typeOPT })
		plain.Compress = true
		packed, err := plain.Pack()
		if err != nil {
			return nil, err
		}
		if err := new(wire.Msg).Unpack(packed); err != nil {
			return nil, err // empty records are read, and written as others
		}
		a.msg = packed
	}
	if opt := m.IsEdns0(); opt != nil {
		a.extended = opt.ExtendedRcode() >> 4
	}
	a.msg[0], a.msg[1] = 0, 0
	if !q.sameQuestion(a.msg) || !a.findTTLs() {
		return nil, errNotOurs
	}
	a.ttl = keepFor(&m)
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *wire.A:
			if addr, ok := netip.AddrFromSlice(rr.A.To4()); ok {
				a.addrs = append(a.addrs, addr)
			}
		case *wire.AAAA:
			if addr, ok := netip.AddrFromSlice(rr.AAAA.To16()); ok {
				a.addrs = append(a.addrs, addr)
			}
		}
	}
	if len(a.addrs) > 0 {
		a.name = q.text()
	}
	return a, nil
}

// sameQuestion says whether a message repeats the question, in whatever case.
func (q *query) sameQuestion(msg []byte) bool {
	end := headerSize + len(q.name)
	if len(msg) < end+4 || binary.BigEndian.Uint16(msg[4:]) != 1 {
		return false
	}
	for i, c := range msg[headerSize:end] {
		if lower(c) != lower(q.name[i]) {
			return false
		}
	}
	return binary.BigEndian.Uint16(msg[end:]) == q.kind && binary.BigEndian.Uint16(msg[end+2:]) == wire.ClassINET
}

// failed is an answer of our own that has no records.
func (q *query) failed(rcode int) *answer {
	b := q.upstream(0, false)
	binary.BigEndian.PutUint16(b[2:], bitResponse|1<<7|q.flags&^bitAuthentic|uint16(rcode)&maskRcode)
	return &answer{msg: b}
}

// record is where one resource record lies.
type record struct {
	start, end int
	kind       uint16
	ttl        int // offset
}

// records lists those of a message. ok is false if it does not end with the
// last one.
func records(msg []byte) (list []record, ok bool) {
	count := func(at int) int { return int(binary.BigEndian.Uint16(msg[at:])) }
	off := headerSize
	for range count(4) {
		if off, ok = skipName(msg, off); !ok || len(msg) < off+4 {
			return nil, false
		}
		off += 4
	}
	for range count(6) + count(8) + count(10) {
		r := record{start: off}
		if off, ok = skipName(msg, off); !ok || len(msg) < off+10 {
			return nil, false
		}
		r.kind, r.ttl = binary.BigEndian.Uint16(msg[off:]), off+4
		off += 10 + count(off+8)
		if off > len(msg) {
			return nil, false
		}
		r.end = off
		list = append(list, r)
	}
	return list, off == len(msg)
}

// skipName returns where a name ends in its record: at its first pointer.
func skipName(msg []byte, off int) (end int, ok bool) {
	for off < len(msg) {
		n := int(msg[off])
		switch {
		case n == 0:
			return off + 1, true
		case n >= 0xc0:
			return off + 2, off+2 <= len(msg)
		case n > 63:
			return 0, false
		}
		off += 1 + n
	}
	return 0, false
}

// cutOPT takes OPT off the end, and keeps its options. ok is false if it is
// somewhere else.
func (a *answer) cutOPT() bool {
	list, ok := records(a.msg)
	if !ok {
		return false
	}
	for i, r := range list {
		if r.kind != typeOPT {
			continue
		}
		if i != len(list)-1 || a.msg[r.start] != 0 {
			return false
		}
		a.options, _ = endToEnd(a.msg[r.start+optSize : r.end])
		a.msg = a.msg[:r.start]
		binary.BigEndian.PutUint16(a.msg[10:], binary.BigEndian.Uint16(a.msg[10:])-1)
	}
	return true
}

func (a *answer) findTTLs() bool {
	list, ok := records(a.msg)
	for _, r := range list {
		a.ttls = append(a.ttls, r.ttl)
	}
	return ok
}

// The most that an answer is kept for, whatever it says: a day, and three hours
// for "there is none" (RFC 2308 §5).
const (
	maxTTL         = 86400
	maxNegativeTTL = 10800
)

// keepFor returns the seconds for which an answer is good: the least TTL of its
// records, or what its SOA says of names that are not (RFC 2308 §5). What no
// SOA comes with is not kept.
func keepFor(m *wire.Msg) uint32 {
	if m.Rcode != wire.RcodeSuccess && m.Rcode != wire.RcodeNameError {
		return 0
	}
	ttl, soa := uint32(maxTTL), false
	for _, section := range [][]wire.RR{m.Answer, m.Ns} {
		for _, rr := range section {
			h := rr.Header()
			if h.Ttl >= 1<<31 { // RFC 2181 §8
				return 0
			}
			ttl = min(ttl, h.Ttl)
			if s, ok := rr.(*wire.SOA); ok {
				soa = true
				if negative(m) {
					ttl = min(ttl, s.Minttl, maxNegativeTTL)
				}
			}
		}
	}
	if negative(m) && !soa {
		return 0
	}
	return ttl
}

// negative says whether a message says that there is nothing of what was asked:
// an alias alone leads nowhere.
func negative(m *wire.Msg) bool {
	if m.Rcode == wire.RcodeNameError {
		return true
	}
	for _, rr := range m.Answer {
		kind := rr.Header().Rrtype
		if kind == m.Question[0].Qtype || m.Question[0].Qtype == wire.TypeANY {
			return false
		}
	}
	return true
}

func (a *answer) rcode() int { return a.extended<<4 | int(a.msg[3])&maskRcode }

// final says whether an answer settles a question. What else a server says is
// its own trouble, and another one may know.
func (a *answer) final() bool {
	switch a.rcode() {
	case wire.RcodeSuccess, wire.RcodeNameError:
		return true
	}
	return false
}

// staleTTL is what an answer is good for that is older than it should be
// (RFC 8767 §4).
const staleTTL = 30

// render writes an answer for a client, age seconds after it came.
func (a *answer) render(q *query, age uint32, stale bool) []byte {
	b := make([]byte, len(a.msg), len(a.msg)+optSize+len(a.options))
	copy(b, a.msg)
	binary.BigEndian.PutUint16(b, q.id)
	// Its question in its own case: some look (draft-vixie-dnsext-dns0x20).
	copy(b[headerSize:], q.name)
	for _, off := range a.ttls {
		ttl := binary.BigEndian.Uint32(b[off:])
		if stale {
			ttl = staleTTL
		} else {
			ttl -= min(ttl, age)
		}
		binary.BigEndian.PutUint32(b[off:], ttl)
	}
	extra := 0
	if q.edns {
		extra = optSize + len(a.options)
	}
	if len(b)+extra > q.limit {
		b = b[:headerSize+len(q.name)+4]
		binary.BigEndian.PutUint16(b[2:], binary.BigEndian.Uint16(b[2:])|bitTruncated)
		clear(b[6:headerSize])
	}
	if q.edns {
		options := a.options
		if len(b)+extra > q.limit {
			options = nil
		}
		binary.BigEndian.PutUint16(b[10:], binary.BigEndian.Uint16(b[10:])+1)
		b = q.appendOPT(b, upstreamSize, a.extended, options)
	}
	return b
}
