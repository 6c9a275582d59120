package metrics_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/metrics"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// What is told and what is read come out together; a group is not an outbound,
// and a client that leaves is no failure.
func TestServe(t *testing.T) {
	m := metrics.New(func() metrics.Snapshot {
		return metrics.Snapshot{
			Outbounds:   []metrics.Outbound{{Name: `a"b`, UpBytesTotal: 7, HiddenTotal: map[string]uint64{"reset": 2}}},
			DeniedTotal: map[string]uint64{"home": 3},
		}
	}, func(name string) bool { return name == "auto" })
	m.Dialled("a", 20*time.Millisecond, flow.Closed)
	m.Dialled("a", time.Second, flow.TimedOut)
	m.Dialled("a", time.Second, flow.Canceled)
	m.Dialled("auto", time.Second, flow.Closed)
	m.Ended(flow.UDP, "a", flow.Closed)

	l, err := metrics.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, l) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	client := &http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	answer, err := client.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`cgtun_dial_seconds_bucket{outbound="a",le="0.025"} 1`,
		`cgtun_dial_seconds_count{outbound="a"} 1`,
		`cgtun_dial_failures_total{outbound="a",reason="timed out"} 1`,
		`cgtun_flows_total{outbound="a",proto="udp",result="closed"} 1`,
		`cgtun_bytes_total{direction="up",outbound="a\"b"} 7`,
		`cgtun_hidden_failures_total{kind="reset",outbound="a\"b"} 2`,
		`cgtun_outbound_up{outbound="a\"b"} 0`,
		`cgtun_denied_total{reason="home"} 3`,
	} {
		if !strings.Contains(string(body), "\n"+want+"\n") {
			t.Errorf("there is no %s", want)
		}
	}
	for _, wrong := range []string{`"auto"`, `"canceled"`} {
		if strings.Contains(string(body), wrong) {
			t.Errorf("%s is told", wrong)
		}
	}
}

// An address that is taken is an error that says what to do.
func TestListenTaken(t *testing.T) {
	l, err := metrics.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := metrics.Listen(l.Addr().String()); err == nil || !strings.Contains(err.Error(), "[control] metrics") {
		t.Errorf("%v", err)
	}
}
