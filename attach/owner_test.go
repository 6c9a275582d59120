package attach_test

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

const holderUID = 54321

var (
	far4 = netip.MustParseAddrPort("203.0.113.1:80")
	far6 = netip.MustParseAddrPort("[2001:db8::1]:80")
)

// The kinds of sockets that a client can have, all behind the device.
var holdings = []holding{
	{Name: "tcp4", Type: unix.SOCK_STREAM, Family: unix.AF_INET, Connect: far4},
	{Name: "tcp6", Type: unix.SOCK_STREAM, Family: unix.AF_INET6, Connect: far6},
	{Name: "tcp4 on a v6 socket", Type: unix.SOCK_STREAM, Family: unix.AF_INET6, Connect: far4},
	{Name: "tcp4 bound to the device", Type: unix.SOCK_STREAM, Family: unix.AF_INET, Connect: far4, Device: "tun0"},
	{Name: "udp4 connected", Type: unix.SOCK_DGRAM, Family: unix.AF_INET, Connect: far4},
	{Name: "udp6 connected", Type: unix.SOCK_DGRAM, Family: unix.AF_INET6, Connect: far6},
	{Name: "udp4 connected on a v6 socket", Type: unix.SOCK_DGRAM, Family: unix.AF_INET6, Connect: far4},
	{Name: "udp4", Type: unix.SOCK_DGRAM, Family: unix.AF_INET, To: far4},
	{Name: "udp6", Type: unix.SOCK_DGRAM, Family: unix.AF_INET6, To: far6},
	{Name: "udp4 on a v6 socket", Type: unix.SOCK_DGRAM, Family: unix.AF_INET6, To: far4},
	{Name: "udp6 bound to the device", Type: unix.SOCK_DGRAM, Family: unix.AF_INET6, To: far6, Device: "tun0"},
}

// startHolder runs a holder in a cgroup under holderUID, and returns the local
// ports of its sockets. end closes them.
func startHolder(t *testing.T, in *labtest.Cgroup) (ports []int, end func()) {
	t.Helper()
	wanted, err := json.Marshal(holdings)
	if err != nil {
		t.Fatal(err)
	}
	cmd := in.Command(exec.Command("/proc/self/exe"))
	cmd.Env = append(os.Environ(), holderEnv+"="+string(wanted))
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: holderUID, Gid: holderUID}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("holder: %v", err)
		}
	}
	if err := json.NewDecoder(out).Decode(&ports); err != nil {
		end()
		t.Fatalf("ports of the holder: %v", err)
	}
	return ports, end
}

// Whatever kind of socket a client has, its cgroup and user are found by what
// is known of its packets, and no more once it is closed.
func TestOwnerIsFound(t *testing.T) {
	atHome(t, func(t *testing.T) {
		labtest.Need(t, labtest.CgroupV2)
		group := labtest.New(t).Cgroup("sel")
		o := options()
		o.CgroupPath = func(id uint64) (string, bool) { return group.Path, id == group.ID }
		r := run(t, o)
		ip(t, "route add 203.0.113.0/24 dev tun0")
		ip(t, "route add 2001:db8::/32 dev tun0")
		addresses := r.home().Addresses
		ports, end := startHolder(t, group)

		var flows []*flow.Flow
		for i, h := range holdings {
			f := flow.New(flow.TCP, netip.AddrPortFrom(addresses[0].Addr(), uint16(ports[i])), far4, attach.Home)
			if h.Type == unix.SOCK_DGRAM {
				f.Proto = flow.UDP
			}
			if h.Connect == far6 || h.To == far6 {
				f.Src, f.Dst = netip.AddrPortFrom(addresses[1].Addr(), uint16(ports[i])), far6
			}
			flows = append(flows, f)
			owner, err := r.Owner(t.Context(), f)
			want := flow.Owner{Cgroup: group.Path, CgroupID: group.ID, UID: holderUID}
			if err != nil || owner == nil || *owner != want {
				t.Errorf("%s: %+v %v, want %+v", h.Name, owner, err, want)
			}
		}
		var sources []netip.AddrPort
		for _, f := range flows {
			if f.Proto == flow.UDP {
				sources = append(sources, f.Src)
			}
		}
		elsewhere := netip.MustParseAddrPort("10.9.0.99:9")
		if left := r.Left(append(sources, elsewhere)); len(left) > 0 {
			t.Errorf("%v are said to have no socket", left)
		}
		end()
		if left := r.Left(append(sources, elsewhere)); !slices.Equal(left, sources) {
			t.Errorf("%v have no socket, want %v", left, sources)
		}
		for i, f := range flows {
			if owner, err := r.Owner(t.Context(), f); owner != nil || err == nil {
				t.Errorf("%s, closed: %+v %v", holdings[i].Name, owner, err)
			}
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

// A flow without a socket has no owner, least of all root: nobody on this machine, or
// one who cannot be told any more.
func TestNobodyIsTheOwner(t *testing.T) {
	atHome(t, func(t *testing.T) {
		r := run(t, options())
		lost := func(name string, f *flow.Flow) {
			t.Helper()
			if owner, err := r.Owner(t.Context(), f); owner != nil || err == nil {
				t.Errorf("%s: %+v, no error", name, owner)
			}
		}
		nobody := func(name string, f *flow.Flow) {
			t.Helper()
			if owner, err := r.Owner(t.Context(), f); owner != nil || err != nil {
				t.Errorf("%s: %+v %v", name, owner, err)
			}
		}
		addrPort := netip.MustParseAddrPort
		for _, proto := range []flow.Proto{flow.TCP, flow.UDP, flow.ICMP} {
			nobody("v4 of another machine, "+proto.String(), flow.New(proto, addrPort("10.9.0.99:9"), far4, attach.Home))
			nobody("v6 of another machine, "+proto.String(), flow.New(proto, addrPort("[fd09::99]:9"), far6, attach.Home))
		}

		for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
			lost("v4 "+proto.String(), flow.New(proto, addrPort("10.9.0.1:9"), far4, attach.Home))
			lost("v6 "+proto.String(), flow.New(proto, addrPort("[fd09::1]:9"), far6, attach.Home))
		}

		src, dst, end, err := closed("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		lost("closed", flow.New(flow.TCP, src, dst, attach.Home))
		end() // into TIME_WAIT
		lost("ended", flow.New(flow.TCP, src, dst, attach.Home))

		l, err := net.Listen("tcp", "10.9.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		lost("listener", flow.New(flow.TCP, l.Addr().(*net.TCPAddr).AddrPort(), far4, attach.Home))

		c, err := net.ListenPacket("udp", "10.9.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		f := flow.New(flow.UDP, c.LocalAddr().(*net.UDPAddr).AddrPort(), far4, "elsewhere")
		nobody("other attachment", f)
		f.Attachment = attach.Home
		if owner, err := r.Owner(t.Context(), f); owner == nil || err != nil {
			t.Errorf("while attached: %+v %v", owner, err)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		nobody("not attached any more", f)
	})
}

func BenchmarkOwner(b *testing.B) {
	m := attach.New(attach.Options{})
	release, err := m.AttachNothing()
	if err != nil {
		b.Fatal(err)
	}
	defer release()
	c, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	f := flow.New(flow.UDP, c.LocalAddr().(*net.UDPAddr).AddrPort(), c.RemoteAddr().(*net.UDPAddr).AddrPort(), attach.Home)
	b.ReportAllocs()
	for b.Loop() {
		if owner, err := m.Owner(context.Background(), f); owner == nil || err != nil {
			b.Fatal(owner, err)
		}
	}
}
