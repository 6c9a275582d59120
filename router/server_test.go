package router_test

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/router"
	"cgtun/rules"
)

// behind is an outbound with a server.
type behind struct {
	*outbound
	server netip.AddrPort
}

func (b behind) IsServer(a netip.AddrPort) bool { return a == b.server }

// The server of an outbound is reached by direct: not through itself, nor through
// another one. What a rule refuses is refused.
func TestServerOfAnOutboundGoesDirect(t *testing.T) {
	asked := map[string]int{}
	out := func(name string) *outbound {
		return &outbound{name, func(context.Context, dialer.Target) (flow.Conn, error) {
			asked[name]++
			return nil, context.DeadlineExceeded
		}}
	}
	server := netip.MustParseAddrPort("198.51.100.1:1080")
	set, err := rules.Compile([]rules.Config{
		{Src: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}, Use: "reject"}, {Use: "group"},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := router.New(router.Options{})
	r.Reload(set, map[string]dialer.Outbound{"direct": out("direct"), "relay": behind{out("relay"), server}, "group": out("group")})
	explain := func(src, dst string) []string {
		_, _, path, _ := r.Explain(&rules.Facts{Flow: &flow.Flow{Proto: flow.TCP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}, Known: rules.FactOwner})
		return path
	}
	for _, tt := range []struct {
		src, dst string
		want     []string
	}{
		{"10.0.0.1:1", "198.51.100.1:1080", []string{"direct"}},
		{"10.0.0.1:1", "198.51.100.1:80", []string{"group"}},
		{"203.0.113.1:1", "198.51.100.1:1080", nil},
	} {
		if got := explain(tt.src, tt.dst); !slices.Equal(got, tt.want) {
			t.Errorf("explain %s to %s: path %q, want %q", tt.src, tt.dst, got, tt.want)
		}
	}
	c := newClient(server.String())
	wait(t, "end of the flow", serve(t, r, c))
	if asked["direct"] != 1 || len(asked) != 1 {
		t.Errorf("dialled %v, want direct alone", asked)
	}
}

// answers is a resolver that knows one name.
type answers struct {
	router.Resolver
	sure bool
	who  string // that has asked for it
}

func (answers) Takes(netip.AddrPort) bool { return false }
func (a answers) Name(f *flow.Flow) (name string, sure, own bool) {
	return "name.example", a.sure, f.Who == a.who
}

// An outbound is given the name that the client looked up, if it was the only one
// for that address, and nobody else's: a proxy would connect to the other one.
func TestOutboundsGetTheNameThatIsSure(t *testing.T) {
	for _, tt := range []struct {
		answers
		want string
	}{{answers{sure: true}, "name.example"}, {answers{sure: false}, ""}, {answers{sure: true, who: "1000 /other"}, ""}} {
		var got string
		out := &outbound{"up", func(_ context.Context, target dialer.Target) (flow.Conn, error) {
			got = target.Name
			return nil, context.DeadlineExceeded
		}}
		r := router.New(router.Options{Resolver: tt.answers})
		set, err := rules.Compile([]rules.Config{{Use: "up"}})
		if err != nil {
			t.Fatal(err)
		}
		r.Reload(set, map[string]dialer.Outbound{"up": out})
		wait(t, "end of the flow", serve(t, r, newClient("198.51.100.1:443")))
		if got != tt.want {
			t.Errorf("sure %v, asked by %q: the outbound was given %q", tt.sure, tt.who, got)
		}
	}
}
