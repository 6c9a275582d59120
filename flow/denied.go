package flow

import "fmt"

// Denied is why the destination policy refuses a flow.
type Denied struct {
	Kind string // one word out of few, for counts: "loopback"
	Why  string // what is wrong with the destination, in words for the user
}

func (e *Denied) Error() string { return fmt.Sprintf("denied by the destination policy: %s", e.Why) }

// FlowReason lets ReasonOf find the reason.
func (e *Denied) FlowReason() Reason { return Prohibited }
