package router_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/group"
	"cgtun/internal/labtest"
	"cgtun/router"
)

// One who dials into a black hole takes no place from others, however many
// addresses of a /64 he has, and his oldest dials make room for his own.
func TestDialsInFlightAreBounded(t *testing.T) {
	hole := func(name string) *outbound {
		return &outbound{name, func(ctx context.Context, _ dialer.Target) (flow.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
	}
	t.Run("one outbound", func(t *testing.T) { testDialsInFlight(t, hole("up")) })
	for _, stagger := range []time.Duration{0, time.Millisecond, time.Minute} {
		t.Run(fmt.Sprintf("a group with a stagger of %v", stagger), func(t *testing.T) {
			c := group.Config{
				Name: "up", Type: group.TypeRace, Outbounds: []string{"a", "b"},
				Stagger: stagger, Attempt: 2 * time.Minute, Deadline: 2 * time.Minute,
			}
			g, err := group.New(c, []dialer.Outbound{hole("a"), hole("b")}, group.NewScores(slog.New(slog.DiscardHandler), nil))
			if err != nil {
				t.Fatal(err)
			}
			testDialsInFlight(t, g)
		})
	}
}

func testDialsInFlight(t *testing.T, out dialer.Outbound) {
	r := route(t, router.Options{MaxDials: 8, MaxDialsPerSource: 5, MaxSockets: 1000}, out)
	live := map[string][]*client{}
	dial := func(who, attachment string, n int) {
		for i := range n {
			c := newClient("198.51.100.1:80")
			src := netip.MustParseAddr(strings.ReplaceAll(who, "N", fmt.Sprint(len(live[who])+1)))
			c.flow = flow.New(flow.TCP, netip.AddrPortFrom(src, uint16(4000+i)), c.flow.Dst, attachment)
			live[who] = append(live[who], c)
			was := r.Counters()
			serve(t, r, c)
			labtest.Eventually(t, 5*time.Second, func() bool {
				now := r.Counters()
				return now.DialsLive+int(now.DialsEvicted) == was.DialsLive+int(was.DialsEvicted)+1 && int(now.FlowsLive) == now.DialsLive
			}, "the dial is in flight")
		}
	}
	// want says how many of each still dial, and that those who do not are the
	// oldest.
	want := func(when string, n map[string]int) {
		t.Helper()
		for who, clients := range live {
			for i, c := range clients {
				accepted, why := c.told(t)
				gone := i < len(clients)-n[who]
				if accepted || gone && why != flow.TimedOut || !gone && why != flow.Closed {
					t.Errorf("%s: dial %d of %d of %s was told %v", when, i, len(clients), who, why)
				}
			}
		}
	}
	const many, few, one, again, last = "2001:db8::N", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"
	dial(many, "a", 9)
	want("one source", map[string]int{many: 5})
	dial(few, "a", 2)
	dial(one, "a", 1)
	want("full", map[string]int{many: 5, few: 2, one: 1})
	dial(again, "b", 1)
	want("one more", map[string]int{many: 4, few: 2, one: 1, again: 1})
	dial(many, "a", 1)
	want("who has most makes room for himself", map[string]int{many: 4, few: 2, one: 1, again: 1})
	dial(last, "b", 3)
	want("even", map[string]int{many: 2, few: 2, one: 1, again: 1, last: 2})
	n := r.Counters()
	if n.DialsLive != 8 || n.DialsEvicted != 9 || n.RefusedTotal != 9 {
		t.Errorf("counters %+v", n)
	}
	if s := r.Outbounds()["up"]; s.FailuresTotal != 0 {
		t.Errorf("%d failures of the outbound", s.FailuresTotal)
	}
}
