package stack

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// TCP in fragments. Netstack reassembles them, and would take any checksum for
// right: it was told that all packets are verified before. So they wait here
// until they are complete and their sum is right, and go to netstack together.
// Local sockets send none: raw ones do, and networks that are forwarded to us.

const (
	// maxFragmented bounds the segments that are not complete, of 64 KiB each.
	maxFragmented = 64
	// fragmentTime is how long a segment may take (RFC 8200 §4.5: 60 s, Linux
	// 30 s).
	fragmentTime = 30 * time.Second
)

// fragments has the segments that are not complete. Readers share it.
type fragments struct {
	s *Stack

	mu       sync.Mutex
	segments map[fragmentID]*fragmented
}

type fragmentID struct {
	src, dst netip.Addr
	id       uint32
}

// fragmented is a segment of which some fragments are there.
type fragmented struct {
	began   time.Time
	parts   []fragment
	bytes   int // of payload
	total   int // 0: the last fragment is not there
	invalid bool
}

// fragment is a packet of its own, with payload at that offset of the segment.
type fragment struct {
	at, size int
	more     bool
	pkt      []byte
	payload  []byte // of pkt
}

// take takes a fragment of which pkt is the whole packet, and copies it.
func (f *fragments) take(h ipHeader, pkt []byte) {
	id, part, ok := parseFragment(h, pkt)
	if !ok {
		f.s.count.malformed.Add(1)
		return
	}
	f.mu.Lock()
	seg := f.segments[id]
	if seg == nil || time.Since(seg.began) > fragmentTime {
		seg = f.addLocked(id)
	}
	seg.add(part)
	complete := seg.invalid || seg.total > 0 && seg.bytes >= seg.total
	if complete {
		delete(f.segments, id)
	}
	f.mu.Unlock()
	switch {
	case !complete:
	case !seg.contiguous():
		f.s.count.malformed.Add(1)
	case !seg.sumOK(h):
		f.s.count.badSum.Add(1)
	default:
		for _, p := range seg.parts {
			f.s.inject(p.pkt)
		}
	}
}

// addLocked makes room by the oldest.
func (f *fragments) addLocked(id fragmentID) *fragmented {
	if f.segments == nil {
		f.segments = make(map[fragmentID]*fragmented)
	}
	if _, again := f.segments[id]; !again && len(f.segments) >= maxFragmented {
		var oldest fragmentID
		for other, seg := range f.segments {
			if o := f.segments[oldest]; o == nil || seg.began.Before(o.began) {
				oldest = other
			}
		}
		delete(f.segments, oldest)
		f.s.count.fragmented.Add(1)
	}
	seg := &fragmented{began: time.Now()}
	f.segments[id] = seg
	return seg
}

// add adds a fragment, unless it is there.
func (s *fragmented) add(p fragment) {
	for _, old := range s.parts {
		if old.at == p.at && old.size == p.size && old.more == p.more {
			return
		}
	}
	end := p.at + p.size
	if !p.more {
		s.invalid = s.invalid || s.total > 0
		s.total = end
	}
	s.parts = append(s.parts, p)
	s.bytes += p.size
}

// contiguous says whether the fragments are one segment, and brings them into
// order. Those that overlap are none (RFC 5722, RFC 8200 §4.5).
func (s *fragmented) contiguous() bool {
	slices.SortFunc(s.parts, func(a, b fragment) int { return cmp.Compare(a.at, b.at) })
	next := 0
	for _, p := range s.parts {
		if p.at != next {
			return false
		}
		next += p.size
	}
	return !s.invalid && next == s.total
}

// sumOK checks the sum of a contiguous segment. All fragments but the last are
// of even length.
func (s *fragmented) sumOK(h ipHeader) bool {
	sum := pseudoSum(protoTCP, h.src, h.dst, s.total)
	for _, p := range s.parts {
		sum = checksum.Checksum(p.payload, sum)
	}
	return sum == 0xffff
}

// parseFragment reads what makes a fragment one. False: it cannot be one of TCP,
// or has other headers behind the fragment header.
func parseFragment(h ipHeader, pkt []byte) (id fragmentID, p fragment, ok bool) {
	id = fragmentID{src: h.src, dst: h.dst}
	var word uint16
	if h.src.Is4() {
		word = binary.BigEndian.Uint16(pkt[6:])
		p.more = word&0x2000 != 0
		p.at = int(word&0x1fff) * 8
		id.id = uint32(binary.BigEndian.Uint16(pkt[4:]))
	} else {
		at := h.off - 8
		if h.named != at {
			return id, p, false
		}
		word = binary.BigEndian.Uint16(pkt[at+2:])
		p.more = word&1 != 0
		p.at = int(word &^ 7)
		id.id = binary.BigEndian.Uint32(pkt[at+4:])
	}
	p.size = h.end - h.off
	ok = p.size > 0 && p.at+p.size <= 65535 && (!p.more || p.size%8 == 0)
	if ok {
		p.pkt = append([]byte(nil), pkt[:h.end]...)
		p.payload = p.pkt[h.off:]
	}
	return id, p, ok
}
