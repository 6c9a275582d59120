package labtest

import "time"

// SetGoneWithin shortens the wait for a namespace that does not go, and returns
// what undoes it.
func SetGoneWithin(d time.Duration) func() {
	old := goneWithin
	goneWithin = d
	return func() { goneWithin = old }
}

// Sweep takes away what killed test processes left.
func Sweep() error { return sweep() }
