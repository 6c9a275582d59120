package group

import (
	"math"
	"net/netip"
	"slices"
	"time"
)

// ewma is a moving average; 0 is nothing yet.
type ewma struct{ value float64 }

const ewmaWeight = 0.2

func (e *ewma) add(v float64) {
	if e.value == 0 {
		e.value = v
		return
	}
	e.value += ewmaWeight * (v - e.value)
}

// decay is what is left of a weight after a time.
func decay(d time.Duration) float64 {
	return math.Exp2(-d.Seconds() / halfLife.Seconds())
}

func scale(d time.Duration, f float64) time.Duration { return time.Duration(float64(d) * f) }

// times are the last connect times.
type times struct {
	last   [32]time.Duration
	sorted [32]time.Duration // the same
	n      int               // added ever
}

func (t *times) add(d time.Duration) {
	n, at := t.len(), t.n%len(t.last)
	if t.n >= len(t.last) {
		i, _ := slices.BinarySearch(t.sorted[:n], t.last[at])
		copy(t.sorted[i:], t.sorted[i+1:])
		n--
	}
	i, _ := slices.BinarySearch(t.sorted[:n], d)
	copy(t.sorted[i+1:], t.sorted[i:n])
	t.last[at], t.sorted[i] = d, d
	t.n++
}

func (t *times) len() int { return min(t.n, len(t.last)) }

// p95 is 0 if there is nothing yet.
func (t *times) p95() time.Duration {
	n := t.len()
	if n == 0 {
		return 0
	}
	return t.sorted[(n-1)*95/100]
}

// recent are the destinations that were reached last, each once, the newest at
// the end.
type recent struct {
	list []reached
}

type reached struct {
	dst netip.AddrPort
	at  time.Time
}

const maxRecent = 8

func (r *recent) add(dst netip.AddrPort, now time.Time) {
	i := slices.IndexFunc(r.list, func(e reached) bool { return e.dst == dst })
	switch {
	case i >= 0:
		r.list[i].at = now
		return
	case len(r.list) == maxRecent:
		oldest := 0
		for j := range r.list {
			if r.list[j].at.Before(r.list[oldest].at) {
				oldest = j
			}
		}
		r.list[oldest] = reached{dst, now}
		return
	}
	r.list = append(r.list, reached{dst, now})
}

// spell is a time of failures that are told once, and once more with their
// number when it has ended.
type spell struct {
	count int
	since time.Time
	last  time.Time
}

// begin counts, and says whether the spell begins with this.
func (s *spell) begin(now time.Time) bool {
	s.count++
	s.last = now
	if s.count == 1 {
		s.since = now
	}
	return s.count == 1
}

// spellEnds is how long nothing must fail.
const spellEnds = 30 * time.Second

func (s *spell) over(now time.Time) bool { return s.count > 0 && now.Sub(s.last) > spellEnds }
