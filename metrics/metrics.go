// Package metrics serves what cgtun counts to Prometheus, under the names that
// docs/cli.md lists.
//
// Most of it is read from the daemon when somebody asks; what passes by without
// being kept, how long dials take and how flows end, is counted here: router and
// group tell it. No label has a host name or anything else that a captured process
// could choose, so that their number is bounded.
//
// It owns its listener. cmd makes it.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"cgtun/flow"
)

// Snapshot is what the daemon counts by itself, from its start on where the name
// says total.
type Snapshot struct {
	FlowsLive      uint64
	Outbounds      []Outbound
	Attachments    map[string]int // by state
	GateDropsTotal uint64
	DeniedTotal    map[string]uint64 // by reason
	QueriesTotal   map[string]uint64 // by result
	ReloadsTotal   map[string]uint64 // by result
}

// Outbound is how one way out is doing.
type Outbound struct {
	Name                         string
	Up                           bool
	UpBytesTotal, DownBytesTotal uint64
	HiddenTotal                  map[string]uint64 // failures that no client saw, by kind
}

// Metrics gathers. Safe for concurrent use.
type Metrics struct {
	registry *prometheus.Registry
	read     func() Snapshot
	group    func(name string) bool

	ended    *prometheus.CounterVec
	failures *prometheus.CounterVec
	dials    *prometheus.HistogramVec
}

// New returns Metrics that ask read when they are asked. It must not block for
// long. group says which names are those of groups: an outbound is counted, not
// the group that has chosen it.
func New(read func() Snapshot, group func(name string) bool) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(), read: read, group: group,
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cgtun_flows_total", Help: "Flows that have ended, by the outbound that they had or the rule's answer, and by how they ended.",
		}, []string{"proto", "outbound", "result"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cgtun_dial_failures_total", Help: "Connections of TCP that an outbound could not make.",
		}, []string{"outbound", "reason"}),
		dials: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cgtun_dial_seconds", Help: "How long an outbound took to connect, its proxies included.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"outbound"}),
	}
	m.registry.MustRegister(m.ended, m.failures, m.dials, collector{m},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Dialled counts a connection that an outbound made or, unless why is
// flow.Closed, did not make. That the client left is nobody's failure.
func (m *Metrics) Dialled(outbound string, took time.Duration, why flow.Reason) {
	switch {
	case m.group(outbound), why == flow.Canceled:
	case why == flow.Closed:
		m.dials.WithLabelValues(outbound).Observe(took.Seconds())
	default:
		m.failures.WithLabelValues(outbound, why.String()).Inc()
	}
}

// Ended counts a flow. outbound is its last one, or what the rules had for it.
func (m *Metrics) Ended(proto flow.Proto, outbound string, why flow.Reason) {
	m.ended.WithLabelValues(proto.String(), outbound, why.String()).Inc()
}
