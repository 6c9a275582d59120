package flow

import (
	"net/netip"
	"time"
)

// The states of a flow, as in Info.
const (
	StateDialing = "dialing" // the client waits for an answer
	StateOpen    = "open"    // bytes move
	StateClosing = "closing" // one side has ended
	StateClosed  = "closed"
)

// Info is a snapshot of a flow, as `cgtun flows --json` prints it. Pointers
// are nil, and JSON null, where the answer is not known.
type Info struct {
	ID         uint64         `json:"id"`
	Proto      string         `json:"proto"`
	Src        netip.AddrPort `json:"src"`
	Dst        netip.AddrPort `json:"dst"`
	Name       *string        `json:"name"`
	NameFrom   *string        `json:"name_from"` // dns, sni, host or quic
	Attachment string         `json:"attachment"`
	Cgroup     *string        `json:"cgroup"`
	PID        *int           `json:"pid"`
	Process    *string        `json:"process"`
	UID        *uint32        `json:"uid"`
	Rule       *int           `json:"rule"` // from 1; nil also when none matched
	Use        *string        `json:"use"`  // nil until the rules have decided
	Path       []string       `json:"path"` // never nil
	State      string         `json:"state"`
	Reason     *string        `json:"reason"`   // nil while the flow lives
	Replays    int            `json:"replays"`  // times that the client's first bytes were sent again
	UpBytes    int64          `json:"up_bytes"` // client to server
	DownBytes  int64          `json:"down_bytes"`
	Start      time.Time      `json:"start"`  // UTC
	AgeMS      int64          `json:"age_ms"` // of a closed flow: how long it lived
}

// Event is a change of a flow, one line of `cgtun flows -f`.
type Event struct {
	Event string `json:"event"` // EventOpen, EventUpdate or EventClose
	Flow  Info   `json:"flow"`
}

// The kinds of Event.
const (
	EventOpen   = "open"   // the flow is new, or lived when the watch began
	EventUpdate = "update" // what is known of it has changed
	EventClose  = "close"
)
