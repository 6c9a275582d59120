package metrics

import "github.com/prometheus/client_golang/prometheus"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("cgtun_"+name, help, labels, nil)
}

var (
	flows       = desc("flows", "Flows that live.")
	bytesTotal  = desc("bytes_total", "Bytes of flows; up is from client to server.", "outbound", "direction")
	hidden      = desc("hidden_failures_total", "Failures that no client saw.", "kind", "outbound")
	up          = desc("outbound_up", "1: the outbound is used; 0: it is down or ejected.", "outbound")
	attachments = desc("attachments", "Network namespaces that cgtun is attached to.", "state")
	gateDrops   = desc("gate_drops_total", "Packets that were dropped because their namespace was not attached yet.")
	denied      = desc("denied_total", "Flows that a rule or the policy of destinations refused.", "reason")
	queries     = desc("dns_queries_total", "DNS queries of captured processes.", "result")
	reloads     = desc("reloads_total", "Times that the configuration was read again.", "result")
)

// collector shows a Snapshot.
type collector struct{ *Metrics }

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{flows, bytesTotal, hidden, up, attachments, gateDrops, denied, queries, reloads} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.read()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(flows, float64(s.FlowsLive))
	for _, o := range s.Outbounds {
		count(bytesTotal, o.UpBytesTotal, o.Name, "up")
		count(bytesTotal, o.DownBytesTotal, o.Name, "down")
		for kind, n := range o.HiddenTotal {
			count(hidden, n, kind, o.Name)
		}
		is := 0.0
		if o.Up {
			is = 1
		}
		gauge(up, is, o.Name)
	}
	for state, n := range s.Attachments {
		gauge(attachments, float64(n), state)
	}
	count(gateDrops, s.GateDropsTotal)
	for reason, n := range s.DeniedTotal {
		count(denied, n, reason)
	}
	for result, n := range s.QueriesTotal {
		count(queries, n, result)
	}
	for result, n := range s.ReloadsTotal {
		count(reloads, n, result)
	}
}
