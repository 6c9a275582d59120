package bag_test

import (
	"math/rand/v2"
	"testing"

	"cgtun/internal/bag"
)

type thing struct {
	bag.Place
	name int
}

// A bag has what was put in and not taken out, each once, whatever the order.
func TestBag(t *testing.T) {
	const seed = 1
	var b bag.Bag[*thing]
	chance := rand.New(rand.NewPCG(seed, 0))
	in := map[*thing]bool{}
	all := make([]*thing, 8)
	for i := range all {
		all[i] = &thing{name: i}
	}
	for step := range 2000 {
		one := all[chance.IntN(len(all))]
		switch {
		case in[one] || step%3 == 0:
			if got := b.Remove(one); got != in[one] {
				t.Fatalf("step %d: Remove of %d: %v", step, one.name, got)
			}
			delete(in, one)
		default:
			b.Add(one)
			in[one] = true
		}
		seen := map[*thing]bool{}
		for _, one := range b.All() {
			if seen[one] || !in[one] {
				t.Fatalf("step %d: %d is in: %v, and was seen: %v", step, one.name, in[one], seen[one])
			}
			seen[one] = true
		}
		if len(seen) != len(in) {
			t.Fatalf("step %d: %d of %d were seen", step, len(seen), len(in))
		}
	}
}

// Who goes through it from its end, and takes some out, misses nobody.
func TestRemoveWhileLooking(t *testing.T) {
	var b bag.Bag[*thing]
	for i := range 5 {
		b.Add(&thing{name: i})
	}
	seen := map[int]bool{}
	for i := len(b.All()) - 1; i >= 0; i-- {
		one := b.All()[i]
		seen[one.name] = true
		if one.name%2 == 0 {
			b.Remove(one)
		}
	}
	if len(seen) != 5 || len(b.All()) != 2 {
		t.Errorf("seen %v, left %d", seen, len(b.All()))
	}
}
