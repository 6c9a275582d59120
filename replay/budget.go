package replay

import "sync/atomic"

// Budget bounds the flows that replay at a time: a fifth of those that live, or
// ten. Where everything fails, no more is asked of what is left. Safe for
// concurrent use.
type Budget struct {
	live func() int
	used atomic.Int64
}

const (
	leastBudget = 10
	budgetShare = 5 // one of so many
)

// NewBudget returns a Budget; live is the number of flows.
func NewBudget(live func() int) *Budget { return &Budget{live: live} }

func (b *Budget) take() bool {
	if n := b.used.Add(1); n > int64(max(leastBudget, b.live()/budgetShare)) {
		b.used.Add(-1)
		return false
	}
	return true
}

func (b *Budget) give() { b.used.Add(-1) }
