// Package bag keeps things that come and go, in no order: to put one in, to take it out
// and to look at all is cheap, and nothing is hashed.
package bag

// Place is embedded by what is kept. The zero value is in no bag. It is in one at a time,
// and under the lock of that.
type Place struct{ at int } // 0: in none, else one more than the index

func (p *Place) place() *Place { return p }

// Bag is one. The zero value is empty and ready. It is not safe for concurrent use.
type Bag[T interface{ place() *Place }] struct{ list []T }

// Add puts in what is in none.
func (b *Bag[T]) Add(one T) {
	b.list = append(b.list, one)
	one.place().at = len(b.list)
}

// Remove takes one out, and says whether it was in.
func (b *Bag[T]) Remove(one T) bool {
	p := one.place()
	if p.at == 0 {
		return false
	}
	last := len(b.list) - 1
	moved := b.list[last]
	b.list[p.at-1], moved.place().at = moved, p.at
	p.at = 0
	clear(b.list[last:])
	b.list = b.list[:last]
	return true
}

// All returns what is in, until the next Add or Remove, and for reading only. Who goes
// through it from its end may remove the one that he is at.
func (b *Bag[T]) All() []T { return b.list }
