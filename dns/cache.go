package dns

import (
	"container/list"
	"sync"
	"time"
)

const (
	// staleFor is how long an answer is kept beyond its time, for when nothing
	// answers (RFC 8767 §5 advises one to three days).
	staleFor = 24 * time.Hour
	// entryBytes is what the entries of a cache may take in the mean.
	entryBytes = 1024
	// entryOverhead is what an entry takes beside its message and key.
	entryOverhead = 400
)

// cache has the answers that came last, by query.key. Safe for concurrent use.
type cache struct {
	mu      sync.Mutex
	entries int // most
	bytes   int // in use
	byKey   map[string]*list.Element
	order   list.List // of *cached, the one used last in front
}

// cached is an answer in the cache. It is not changed.
type cached struct {
	key  string
	a    *answer
	came time.Time
	ttl  time.Duration
}

func (c *cached) size() int {
	return len(c.key) + len(c.a.msg) + len(c.a.options) + 8*len(c.a.ttls) + 24*len(c.a.addrs) + entryOverhead
}

func (c *cached) fresh(now time.Time) bool { return now.Sub(c.came) < c.ttl }

func newCache(entries int) *cache { return &cache{entries: entries, byKey: map[string]*list.Element{}} }

// get returns what is there, fresh or stale, or nil.
func (c *cache) get(key string, now time.Time) *cached {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.byKey[key]
	if e == nil {
		return nil
	}
	entry := e.Value.(*cached)
	if now.Sub(entry.came) > entry.ttl+staleFor {
		c.remove(e)
		return nil
	}
	c.order.MoveToFront(e)
	return entry
}

// put keeps an answer for ttl, in the place of the ones that were used longest
// ago.
func (c *cache) put(entry *cached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.byKey[entry.key]; e != nil {
		c.remove(e)
	}
	c.byKey[entry.key] = c.order.PushFront(entry)
	c.bytes += entry.size()
	c.fit()
}

// resize sets how many entries there may be.
func (c *cache) resize(entries int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries = entries
	c.fit()
}

func (c *cache) fit() {
	for len(c.byKey) > c.entries || c.bytes > c.entries*entryBytes {
		c.remove(c.order.Back())
	}
}

func (c *cache) remove(e *list.Element) {
	entry := c.order.Remove(e).(*cached)
	delete(c.byKey, entry.key)
	c.bytes -= entry.size()
}
