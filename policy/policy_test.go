package policy_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/policy"
)

// plainly is how an outbound's sockets leave that says nothing of it.
var plainly = []dialer.Leave{{}}

// to is a flow from another namespace.
func to(dst string) *flow.Flow {
	return flow.New(flow.TCP, netip.MustParseAddrPort("192.0.2.77:1000"), netip.AddrPortFrom(netip.MustParseAddr(dst), 80), "other")
}

func kindOf(t testing.TB, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	var denied *flow.Denied
	if !errors.As(err, &denied) {
		t.Fatalf("error %v is no *flow.Denied", err)
	}
	if flow.ReasonOf(err) != flow.Prohibited {
		t.Errorf("error %v: reason %v, want %v", err, flow.ReasonOf(err), flow.Prohibited)
	}
	return denied.Kind
}

func newJudge(t testing.TB, o policy.Options) *policy.Judge {
	t.Helper()
	j, err := policy.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestNobodyReachesWhatIsOfOneHostAlone(t *testing.T) {
	j := newJudge(t, policy.Options{Home: "home"})
	for _, tt := range []struct{ dst, kind string }{
		{"127.0.0.1", "loopback"}, {"127.255.255.255", "loopback"}, {"::1", "loopback"},
		{"0.0.0.0", "unspecified"}, {"0.255.0.1", "unspecified"}, {"::", "unspecified"},
		{"169.254.1.1", "link_local"}, {"fe80::1", "link_local"}, {"fe80::1%eth0", "link_local"}, {"febf::1", "link_local"},
		{"169.254.169.254", "metadata"}, {"fd00:ec2::254", "metadata"},
		{"224.0.0.1", "multicast"}, {"239.1.2.3", "multicast"}, {"ff02::1", "multicast"}, {"255.255.255.255", "broadcast"},
		// The forms that a v4 address can have in v6.
		{"::ffff:127.0.0.1", "loopback"}, {"::ffff:169.254.169.254", "metadata"}, {"::ffff:0.0.0.0", "unspecified"},
		{"::127.0.0.1", "loopback"}, {"::169.254.169.254", "metadata"}, {"::2", "unspecified"},
		{"64:ff9b::127.0.0.1", "loopback"}, {"64:ff9b::a9fe:a9fe", "metadata"}, {"64:ff9b::e000:1", "multicast"},
		{"2002:7f00:1::", "loopback"}, {"2002:a9fe:a9fe::1", "metadata"}, {"2002:e000:1::5", "multicast"},
		// Neighbours of all of them.
		{"1.0.0.0", ""}, {"126.255.255.255", ""}, {"128.0.0.0", ""}, {"169.253.255.255", ""}, {"169.255.0.0", ""},
		{"223.255.255.255", ""}, {"fec0::1", ""}, {"fd00:ec2::253", ""}, {"203.0.113.1", ""}, {"2001:db8::1", ""},
		{"64:ff9b::203.0.113.1", ""}, {"64:ff9b:1::127.0.0.1", ""}, {"2002:cb00:7101::", ""}, {"2003:7f00:1::", ""}, {"::1:7f00:1:0", ""},
	} {
		// By no route: this machine may have any.
		err := j.Judge(to(tt.dst), nil)
		if got := kindOf(t, err); got != tt.kind {
			t.Errorf("%s: got %q (%v), want %q", tt.dst, got, err, tt.kind)
		}
	}
}

func TestAllowOpens(t *testing.T) {
	allow := []netip.Prefix{
		netip.MustParsePrefix("127.0.0.2/32"), netip.MustParsePrefix("::ffff:169.254.0.0/112"), netip.MustParsePrefix("64:ff9b::7f00:300/120"),
	}
	j := newJudge(t, policy.Options{Allow: allow})
	for _, tt := range []struct{ dst, kind string }{
		{"127.0.0.2", ""}, {"::ffff:127.0.0.2", ""}, {"2002:7f00:2::1", ""}, {"127.0.0.1", "loopback"}, {"127.0.0.3", "loopback"},
		{"169.254.169.254", ""}, {"64:ff9b::127.0.3.1", ""}, {"127.0.3.1", "loopback"}, {"::1", "loopback"},
	} {
		if got := kindOf(t, j.Judge(to(tt.dst), plainly)); got != tt.kind {
			t.Errorf("%s: got %q, want %q", tt.dst, got, tt.kind)
		}
	}
}

// FuzzJudge compares with what the standard library says of an address, and of
// the v4 address in its text.
func FuzzJudge(f *testing.F) {
	for _, a := range []string{"127.0.0.1", "::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:a9fe:a9fe::", "203.0.113.1", "2001:db8::1"} {
		f.Add(netip.MustParseAddr(a).AsSlice())
	}
	f.Add([]byte{1})
	j := newJudge(f, policy.Options{})
	bad := func(a netip.Addr) bool {
		return a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() ||
			a.Is4() && (a.As4()[0] == 0 || a == netip.MustParseAddr("255.255.255.255"))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, _ := netip.AddrFromSlice(raw) // not of 4 or 16 bytes: the zero Addr
		fl := flow.New(flow.UDP, netip.AddrPort{}, netip.AddrPortFrom(a, 1), "other")
		kind := kindOf(t, j.Judge(fl, nil))
		want := bad(a.Unmap())
		if a.Is6() && !a.Is4In6() {
			b := a.As16()
			switch {
			case slices.Equal(b[:12], make([]byte, 12)), slices.Equal(b[:12], []byte{0, 0x64, 0xff, 0x9b, 11: 0}):
				want = want || bad(netip.AddrFrom4([4]byte(b[12:])))
			case b[0] == 0x20 && b[1] == 2:
				want = want || bad(netip.AddrFrom4([4]byte(b[2:6])))
			}
		}
		switch kind {
		case "home", "broadcast", "metadata": // of this machine, or no property that netip knows
		default:
			if (kind != "") != want {
				t.Errorf("%v: denied as %q, want denied %v", a, kind, want)
			}
		}
		if want && kind == "" {
			t.Errorf("%v passes", a)
		}
	})
}

func BenchmarkJudge(b *testing.B) {
	j := newJudge(b, policy.Options{Home: "home"})
	for _, bench := range []struct {
		name, dst string
		leaves    []dialer.Leave
	}{
		{"table", "203.0.113.9", nil},
		{"table6", "2002:cb00:7101::", nil},
		{"denied", "127.0.0.1", nil},
		{"route", "203.0.113.9", plainly},
	} {
		b.Run(bench.name, func(b *testing.B) {
			f := to(bench.dst)
			b.ReportAllocs()
			for b.Loop() {
				_ = j.Judge(f, bench.leaves)
			}
		})
	}
	b.Run("asked", func(b *testing.B) {
		f := to("203.0.113.9")
		j.LookAgain() // nothing is remembered from now on: Run is not called
		for b.Loop() {
			_ = j.Judge(f, plainly)
		}
	})
}
