package main_test

import (
	"fmt"
	"strings"
	"testing"
)

// What Prometheus reads is what has happened, under the names that it relies on.
func TestMetrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.server.ServeEcho(":7000")
	const at = "127.0.0.1:9101"
	text := w.config(`
[[rule]]
cidr = ["203.0.113.200/32"]
use = "reject"
` + second)
	d := w.start(strings.Replace(text, "[control]", fmt.Sprintf("[control]\nmetrics = %q", at), 1))
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000), Say: "hello"}); a.Heard != "hello" {
		t.Fatalf("%+v", a)
	}
	w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7001)})
	w.probe(inside, probe{Do: "dial", Network: "tcp", To: "203.0.113.200:80"})
	if out, errs, code := w.cgtun("reload"); code != 0 {
		t.Errorf("reload: %d %s %s", code, out, errs)
	}
	got := w.run(outside, "curl", "-sS", "http://"+at+"/metrics")
	for _, want := range []string{
		"cgtun_flows 0",
		`cgtun_flows_total{outbound="second",proto="tcp",result="closed"} 1`,
		`cgtun_flows_total{outbound="second",proto="tcp",result="refused"} 1`,
		`cgtun_flows_total{outbound="reject",proto="tcp",result="prohibited"} 1`,
		`cgtun_bytes_total{direction="up",outbound="second"} 5`,
		`cgtun_bytes_total{direction="down",outbound="second"} 5`,
		`cgtun_dial_seconds_count{outbound="second"} 1`,
		`cgtun_dial_failures_total{outbound="second",reason="refused"} 1`,
		`cgtun_outbound_up{outbound="second"} 1`,
		`cgtun_attachments{state="up"} 1`,
		"cgtun_gate_drops_total 0",
		`cgtun_denied_total{reason="rule"} 1`,
		`cgtun_dns_queries_total{result="answered"} 0`,
		`cgtun_reloads_total{result="ok"} 1`,
		"process_open_fds",
	} {
		if !strings.Contains(got, "\n"+want) {
			t.Errorf("there is no %s", want)
		}
	}
	if t.Failed() {
		t.Log(got)
	}
	if code := w.run(outside, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://"+at+"/"); code != "404" {
		t.Errorf("/ answers %s", code)
	}
	d.stop()
}
