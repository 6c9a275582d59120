package report_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cgtun/flow"
	"cgtun/report"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func of[T any](v T) *T { return &v }

func TestFlowsAreSummedUp(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	a, b := netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("192.0.2.2:443")
	var s report.Sum
	for _, f := range []flow.Info{
		{ID: 1, Dst: a, Cgroup: of("/x"), Path: []string{"up", "relay"}, Reason: of("closed"), UpBytes: 1, DownBytes: 10, Start: start, AgeMS: 1000},
		{ID: 1, Dst: a, Cgroup: of("/x"), Path: []string{"up", "relay"}, Reason: of("closed"), UpBytes: 1, DownBytes: 10, Start: start, AgeMS: 1000},
		{ID: 2, Dst: b, Name: of("b.example"), Cgroup: of("/x"), Path: []string{"direct"}, UpBytes: 2, DownBytes: 200, Start: start.Add(time.Second), AgeMS: 3000, Replays: 2},
		{ID: 3, Dst: b, Path: []string{}, Reason: of("refused"), Start: start.Add(5 * time.Second)},
	} {
		s.Add(&f)
	}
	got, err := json.Marshal(s.Report(start, start.Add(time.Minute)))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"since":"2026-01-02T03:04:05Z","until":"2026-01-02T03:05:05Z","units":[` +
		`{"cgroup":"/x","start":"2026-01-02T03:04:05Z","end":"2026-01-02T03:04:09Z","flows_total":2,"up_bytes":3,"down_bytes":210,` +
		`"hosts":[{"host":"b.example","flows_total":1,"up_bytes":2,"down_bytes":200,"paths":{"direct":1}},{"host":"192.0.2.1","flows_total":1,"up_bytes":1,"down_bytes":10,"paths":{"relay":1}}],` +
		`"failures":[{"kind":"replay","outbound":"direct","hidden":true,"count":2}]},` +
		`{"cgroup":null,"start":"2026-01-02T03:04:10Z","end":"2026-01-02T03:04:10Z","flows_total":1,"up_bytes":0,"down_bytes":0,` +
		`"hosts":[{"host":"192.0.2.2","flows_total":1,"up_bytes":0,"down_bytes":0,"paths":{}}],"failures":[{"kind":"refused","outbound":null,"hidden":false,"count":1}]}]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A hostile number of hosts, cgroups and kinds takes no more room than a report has.
func TestAReportIsBounded(t *testing.T) {
	var s report.Sum
	for i := range 3000 {
		f := flow.Info{ID: uint64(i), Dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1), Reason: of(fmt.Sprint(i)), DownBytes: 1}
		if i%2 == 0 {
			f.Cgroup = of(fmt.Sprintf("/%d", i))
		}
		s.Add(&f)
	}
	r := s.Report(time.Time{}, time.Now())
	var bytes int64
	for _, u := range r.Units {
		bytes += u.DownBytes
		if len(u.Hosts) > 1025 || len(u.Failures) > 128 {
			t.Errorf("%d hosts, %d kinds of failures", len(u.Hosts), len(u.Failures))
		}
	}
	if len(r.Units) > 1025 || bytes != 3000 {
		t.Errorf("%d units of %d bytes", len(r.Units), bytes)
	}
}
