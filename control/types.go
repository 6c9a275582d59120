package control

import (
	"encoding/json"
	"time"

	"cgtun/flow"
)

// List is a list that is [] in JSON when it is empty, never null.
type List[T any] []T

// MarshalJSON implements json.Marshaler.
func (l List[T]) MarshalJSON() ([]byte, error) {
	if l == nil {
		return []byte("[]"), nil
	}
	return json.Marshal([]T(l))
}

// Text is a string of which the empty value means unknown: null in JSON.
type Text string

// MarshalJSON implements json.Marshaler.
func (t Text) MarshalJSON() ([]byte, error) {
	if t == "" {
		return []byte("null"), nil
	}
	return json.Marshal(string(t))
}

// ID is a number of the kernel's, such as an inode, of which 0 means unknown:
// null in JSON.
type ID uint64

// MarshalJSON implements json.Marshaler.
func (i ID) MarshalJSON() ([]byte, error) {
	if i == 0 {
		return []byte("null"), nil
	}
	return json.Marshal(uint64(i))
}

// Time is a time that is RFC 3339 in UTC in JSON, and null when it is zero.
type Time struct{ time.Time }

// MarshalJSON implements json.Marshaler.
func (t Time) MarshalJSON() ([]byte, error) {
	if t.IsZero() {
		return []byte("null"), nil
	}
	return t.UTC().MarshalJSON()
}

// State is what the daemon as a whole is doing.
type State string

// The states. Degraded: something configured is not in force.
const (
	Starting State = "starting"
	Ready    State = "ready"
	Degraded State = "degraded"
	Stopping State = "stopping"
)

// Status is the daemon's picture of itself.
type Status struct {
	Version     string             `json:"version"`
	PID         int                `json:"pid"`
	Instance    int                `json:"instance"` // the first route's table
	Config      Text               `json:"config"`   // path of the file
	State       State              `json:"state"`
	Since       Time               `json:"since"` // start of the process
	Routes      List[Route]        `json:"routes"`
	Cgroups     List[CgroupStatus] `json:"cgroups"`
	Docker      List[DockerStatus] `json:"docker"` // the daemons that are selected, or were and have ended
	Attachments List[Attachment]   `json:"attachments"`
	Outbounds   List[Outbound]     `json:"outbounds"`
	Groups      List[Group]        `json:"groups"`
	Counters    Counters           `json:"counters"`
	Limits      Limits             `json:"limits"`
	Missing     List[Missing]      `json:"missing"` // what the kernel refuses
}

// Missing is a part of the kernel that was tried and is not there.
type Missing struct {
	Feature string `json:"feature"`
	Kernel  string `json:"kernel"` // the first version that has it
	Lost    string `json:"lost"`
	Error   Text   `json:"error"`
}

// Route is one [[route]] of the configuration.
type Route struct {
	Name     string `json:"name"`
	Mark     uint32 `json:"mark"`
	Mask     uint32 `json:"mask"`
	Table    int    `json:"table"`
	Priority int    `json:"priority"`
	Via      any    `json:"via"` // as in the configuration: a string, or an object
	OnExit   string `json:"on_exit"`
}

// CgroupStatus is one configured cgroup.
type CgroupStatus struct {
	Path    string `json:"path"`
	ID      ID     `json:"id"` // unknown while it is not there
	Present bool   `json:"present"`
	Held    bool   `json:"held"` // a re-creation cannot slip by
}

// DockerStatus is one docker daemon of which something is selected.
type DockerStatus struct {
	PID     int          `json:"pid"`
	Version Text         `json:"version"` // unknown until it has answered
	Cgroup  string       `json:"cgroup"`  // its own
	Running bool         `json:"running"` // false: it has ended, and what it had stays selected
	Selects string       `json:"selects"` // builds, all
	Cgroups List[string] `json:"cgroups"` // what is selected of it by path, present or not
	Error   Text         `json:"error"`   // what of it is not captured
}

// Attachment is what cgtun has in one network namespace.
type Attachment struct {
	ID        string       `json:"id"` // "home" for one
	NetnsIno  ID           `json:"netns_ino"`
	Netns     Text         `json:"netns"`     // its name in /run/netns
	Container Text         `json:"container"` // first 12 digits, also of a step of BuildKit
	Route     Text         `json:"route"`
	Device    Text         `json:"device"`
	Address   List[string] `json:"address"`
	Capture   string       `json:"capture"` // tun, tproxy, kernel
	State     string       `json:"state"`   // up, offline, failed, gated
	Error     Text         `json:"error"`
	V4        bool         `json:"v4"`
	V6        bool         `json:"v6"`
	Flows     int          `json:"flows"` // live ones
	UpBytes   uint64       `json:"up_bytes"`
	DownBytes uint64       `json:"down_bytes"`
	Since     Time         `json:"since"`
}

// Outbound is how one way out is doing.
type Outbound struct {
	Name          string   `json:"name"`
	Type          string   `json:"type"`
	State         string   `json:"state"` // up, ejected, down
	Error         Text     `json:"error"` // why it is not up, where that is known
	Score         *float64 `json:"score"`
	ConnectMS     *float64 `json:"connect_ms"`
	MPTCP         bool     `json:"mptcp"`
	DialsTotal    uint64   `json:"dials_total"`
	FailuresTotal uint64   `json:"failures_total"`
	HiddenTotal   uint64   `json:"hidden_total"`
	UpBytes       uint64   `json:"up_bytes"`
	DownBytes     uint64   `json:"down_bytes"`
}

// Group is a group of outbounds and the order in which it would try them now.
type Group struct {
	Name      string       `json:"name"`
	Type      string       `json:"type"`
	Outbounds List[string] `json:"outbounds"`
	Order     List[string] `json:"order"`
	Note      Text         `json:"note"` // for the user
}

// Counters count from the start of the daemon, but FlowsLive.
type Counters struct {
	FlowsTotal     uint64 `json:"flows_total"`
	FlowsLive      uint64 `json:"flows_live"`
	RefusedTotal   uint64 `json:"refused_total"`
	DeniedTotal    uint64 `json:"denied_total"`
	GateDropsTotal uint64 `json:"gate_drops_total"`
	// AcceptedFirstTotal counts clients that were accepted before their outbound
	// was asked, because a rule hung on a name that only they could tell.
	AcceptedFirstTotal uint64 `json:"accepted_first_total"`
	HiddenTotal        Hidden `json:"hidden_total"`
	// TurnedAwayTotal counts packets, flows and events that a check or a
	// bound turned away, by its name.
	TurnedAwayTotal Counts `json:"turned_away_total"`
}

// Counts are named counts: {} in JSON when there are none, never null.
type Counts map[string]uint64

// MarshalJSON implements json.Marshaler. Keys are in order.
func (c Counts) MarshalJSON() ([]byte, error) {
	if c == nil {
		return []byte("{}"), nil
	}
	return json.Marshal(map[string]uint64(c))
}

// Hidden counts failures that the client did not see, by kind.
type Hidden struct {
	Dial   uint64 `json:"dial"`
	Reset  uint64 `json:"reset"`
	Close  uint64 `json:"close"`
	Stall  uint64 `json:"stall"`
	DNS    uint64 `json:"dns"`
	Resume uint64 `json:"resume"`
}

// Limits are the bounds that the daemon works within.
type Limits struct {
	Nofile      uint64 `json:"nofile"`
	MemoryBytes uint64 `json:"memory_bytes"`
}

// PIDStatus says whether one process is captured, and why (not).
type PIDStatus struct {
	PID        int    `json:"pid"`
	Cgroup     Text   `json:"cgroup"`
	NetnsIno   ID     `json:"netns_ino"`
	Attachment Text   `json:"attachment"`
	Captured   bool   `json:"captured"`
	Why        string `json:"why"`
}

// FlowList is the answer of flows.
type FlowList struct {
	Flows List[flow.Info] `json:"flows"`
}

// ExplainRequest asks what would become of a flow.
type ExplainRequest struct {
	Host   string `json:"host"`             // name or address, without brackets
	Port   uint16 `json:"port,omitempty"`   // 0: not said
	Proto  string `json:"proto,omitempty"`  // tcp, udp, icmp; empty: tcp
	Cgroup string `json:"cgroup,omitempty"` // empty: the one that run uses by default
}

// Explain is the answer: what would become of that flow, and why.
type Explain struct {
	Host      string       `json:"host"`
	Port      *uint16      `json:"port"` // nil: not said
	Proto     string       `json:"proto"`
	Cgroup    Text         `json:"cgroup"`
	Addresses List[string] `json:"addresses"`
	Captured  bool         `json:"captured"`
	Why       string       `json:"why"`
	Rule      *int         `json:"rule"` // from 1; nil: none matched
	Line      *int         `json:"line"` // of that rule in the file
	Use       Text         `json:"use"`
	Path      List[string] `json:"path"`
	Needs     Text         `json:"needs"`  // name or owner: what would have to be known to say it
	Choice    Text         `json:"choice"` // of a group: whom it would ask, and why
}
