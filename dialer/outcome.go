package dialer

import (
	"time"

	"cgtun/flow"
)

// News is what can be told of a conn after it was connected.
type News uint8

// The news, in the order in which they come; Ended comes always, the others
// may not.
const (
	Answered News = iota + 1 // the server's first byte is there
	Quiet                    // it fell silent in the midst of something, and its peer gives no sign of life
	Failed                   // it ended, or was given up, before the server's first byte
	Ended                    // nobody uses it any more
)

// Outcome is how a path did, for who keeps scores of it.
type Outcome struct {
	News News
	// After is how long the first byte took, from the client's first byte on;
	// with Answered. 0: the server spoke first.
	After time.Duration
	// Reason and ByServer say how it ended: ByServer if the server, or the
	// path to it, ended it. With Failed and Ended.
	Reason   flow.Reason
	ByServer bool
	Up, Down int64         // bytes, with Ended
	Lasted   time.Duration // from connect to end, with Ended
}

// Hidden is a kind of failure that the client did not see.
type Hidden uint8

// The kinds.
const (
	HiddenDial  Hidden = iota // a connect failed, another one did not
	HiddenReset               // a server reset before it had answered
	HiddenClose               // it ended
	HiddenStall               // it was silent
	HiddenKinds
)

// String returns the word of hidden_total.
func (h Hidden) String() string { return [...]string{"dial", "reset", "close", "stall"}[h] }
