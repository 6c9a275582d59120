package tun_test

import (
	"errors"
	"math"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/tun"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// host makes a namespace with one link, whose addresses are 10.9.0.1 and fd09::1.
func host(t *testing.T) (*labtest.Host, netns.Ref) {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	lab := labtest.New(t)
	h, far := lab.Host("client"), lab.Host("far")
	lab.Link(h, far, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	ref, err := netns.Named(h.Path)
	if err != nil {
		t.Fatal(err)
	}
	return h, ref
}

func open(t *testing.T, ref netns.Ref, o tun.Options) *tun.Device {
	t.Helper()
	d, err := tun.Open(ref, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func prefixes(s ...string) (p []netip.Prefix) {
	for _, a := range s {
		p = append(p, netip.MustParsePrefix(a))
	}
	return p
}

func TestDeviceIsUpWithItsAddressesAndAddsNoRoute(t *testing.T) {
	for _, queues := range []int{1, 2} {
		h, ref := host(t)
		before := h.Run("ip", "route") + h.Run("ip", "-6", "route")
		d := open(t, ref, tun.Options{Name: "tun7", Table: 777, MTU: 1400, Queues: queues,
			Addresses: prefixes("10.77.0.1/24", "fd77::1/64")})
		if got := len(d.Queues()); got != queues {
			t.Fatalf("%d queues, want %d", got, queues)
		}
		shown := h.Run("ip", "-details", "address", "show", "dev", "tun7")
		for _, want := range []string{"mtu 1400", "alias cgtun_777", "UP", "10.77.0.1/24", "fd77::1/64", "noprefixroute", "vnet_hdr on", "persist off"} {
			if !strings.Contains(shown, want) {
				t.Errorf("no %q in:\n%s", want, shown)
			}
		}
		if strings.Contains(shown, "fe80") {
			t.Errorf("a link-local address nobody asked for:\n%s", shown)
		}
		if after := h.Run("ip", "route") + h.Run("ip", "-6", "route"); after != before {
			t.Errorf("routes changed:\n%s\nwere:\n%s", after, before)
		}
		d.Close()
		labtest.Eventually(t, time.Second, func() bool {
			return !strings.Contains(h.Run("ip", "link"), "tun7")
		}, "device outlives Close")
	}
}

func TestDefaultAddressesAreTheNextFree(t *testing.T) {
	h, ref := host(t)
	first := open(t, ref, tun.Options{Name: "tun0", Table: 101})
	second := open(t, ref, tun.Options{Name: "tun1", Table: 102})
	if len(first.Addresses()) != 2 || len(second.Addresses()) != 2 {
		t.Fatalf("addresses %v and %v, want two each", first.Addresses(), second.Addresses())
	}
	for i, p := range first.Addresses() {
		if p == second.Addresses()[i] {
			t.Errorf("both have %s", p)
		}
	}
	h.Sysctl("net.ipv6.conf.all.disable_ipv6", "1")
	h.Sysctl("net.ipv6.conf.default.disable_ipv6", "1")
	third := open(t, ref, tun.Options{Name: "tun2", Table: 103})
	if a := third.Addresses(); len(a) != 1 || !a[0].Addr().Is4() {
		t.Errorf("addresses %v where IPv6 is off, want one v4", a)
	}
}

func TestWhatIsTakenIsNamedAndLeftAlone(t *testing.T) {
	h, ref := host(t)
	h.Run("ip", "route", "add", "10.50.0.0/16", "via", "10.9.0.2")
	for _, tt := range []struct {
		name   string
		o      tun.Options
		what   string
		holder string
	}{
		{"name", tun.Options{Name: "eth0"}, "device", "veth"},
		{"address", tun.Options{Addresses: prefixes("10.9.0.9/32")}, "address", "eth0"},
		{"route", tun.Options{Addresses: prefixes("10.50.1.1/24")}, "address", "10.50.0.0/16"},
		{"v6", tun.Options{Addresses: prefixes("fd09::9/128")}, "address", "fd09::"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := h.Run("ip", "address")
			d, err := tun.Open(ref, tt.o)
			if err == nil {
				d.Close()
			}
			var taken *tun.TakenError
			if !errors.As(err, &taken) || taken.What != tt.what || !strings.Contains(taken.Holder, tt.holder) {
				t.Errorf("got %v, want a taken %s of %s", err, tt.what, tt.holder)
			}
			if after := h.Run("ip", "address"); after != before {
				t.Errorf("changed:\n%s\nwere:\n%s", after, before)
			}
		})
	}
}

// Moved in, a device leads into its namespace, also when no name does any more,
// takes what is free there, and does not keep it alive.
func TestMovedDeviceEndsWithItsNamespace(t *testing.T) {
	h, ref := host(t)
	h.Run("ip", "link", "add", "tun0", "type", "veth", "peer", "name", "tun1")
	from, stage, err := netns.Private()
	if err != nil {
		t.Fatal(err)
	}
	defer stage.Close()
	for _, queues := range []int{1, 2} {
		o := tun.Options{Table: 101, Queues: queues, From: from, Yield: true, Addresses: prefixes("10.9.0.1/24")}
		d := open(t, ref, o)
		if d.Name() != "tun2" || len(d.Addresses()) != 2 {
			t.Errorf("%s with %v; want tun2 with default addresses", d.Name(), d.Addresses())
		}
		if out := h.Run("ip", "-details", "link", "show", "tun2"); !strings.Contains(out, "UP") || !strings.Contains(out, "alias cgtun_101") {
			t.Errorf("not as it should be:\n%s", out)
		}
		d.Close()
	}
	if _, err := tun.Open(ref, tun.Options{Table: 101, From: from}); err == nil {
		t.Error("took a name that is taken")
	}

	// A namespace that only a process holds, with one end of a veth.
	holder := h.Start("unshare", "-n", "sleep", "60")
	pid := strconv.Itoa(holder.Pid)
	labtest.Eventually(t, 10*time.Second, func() bool {
		a, errA := os.Readlink("/proc/" + pid + "/ns/net")
		b, errB := os.Readlink("/proc/self/ns/net")
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		return errA == nil && errB == nil && a != b && string(comm) == "sleep\n"
	}, "the process is in a namespace of its own")
	h.Run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", pid)
	inner, err := netns.Named("/proc/" + pid + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, inner, tun.Options{Table: math.MaxUint32, From: from})
	read := make(chan error, 1)
	go func() {
		_, _, err := d.Queues()[0].ReadPacket([][]byte{make([]byte, 70000)})
		read <- err
	}()
	if err := d.Netns().Do(func() error { return nil }); err != nil || d.Netns().Cookie() != inner.Cookie() {
		t.Errorf("the device leads to %v: %v", d.Netns(), err)
	}
	holder.Stop()
	select {
	case err := <-read:
		if !errors.Is(err, netns.ErrGone) {
			t.Errorf("reader got %v, want ErrGone", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the namespace lives on")
	}
	labtest.Eventually(t, 10*time.Second, func() bool {
		_, err := h.Try("ip", "link", "show", "near")
		return err != nil
	}, "its veth has gone")
	if err := d.Netns().Do(func() error { return nil }); !errors.Is(err, netns.ErrGone) {
		t.Errorf("the device leads somewhere: %v", err)
	}
}

func TestLeftoverOfAKilledStartIsTakenAway(t *testing.T) {
	h, ref := host(t)
	h.Run("ip", "tuntap", "add", "dev", "cgt101", "mode", "tun")
	open(t, ref, tun.Options{Name: "tun0", Table: 101})
	if out := h.Run("ip", "link"); strings.Contains(out, "cgt101") {
		t.Errorf("still there:\n%s", out)
	}
}

func TestCloseEndsTheReader(t *testing.T) {
	_, ref := host(t)
	d := open(t, ref, tun.Options{Table: 101})
	done := make(chan error)
	go func() {
		_, _, err := d.Queues()[0].ReadPacket([][]byte{make([]byte, 2048)})
		done <- err
	}()
	d.Close()
	select {
	case err := <-done:
		if !errors.Is(err, os.ErrClosed) || !tun.IsEnd(err) {
			t.Errorf("reader got %v, want os.ErrClosed", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("reader waits on")
	}
}

// A large send of a local socket comes as one segment with its sum open, and a
// packet with an open sum is taken by the kernel.
func TestSegmentsAndOpenChecksumsPass(t *testing.T) {
	h, ref := host(t)
	d := open(t, ref, tun.Options{Table: 101})
	h.Run("ip", "route", "add", "192.0.2.0/24", "dev", d.Name())
	c, err := h.Dial("udp", "192.0.2.7:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	small, rest := make([]byte, 24), make([]byte, 2000)
	o, n, err := d.Queues()[0].ReadPacket([][]byte{small, rest})
	if err != nil {
		t.Fatal(err)
	}
	if n != 33 || string(rest[4:9]) != "hello" || !o.NeedsCsum || o.CsumStart != 20 || o.CsumOffset != 6 {
		t.Fatalf("read %d bytes %q with %+v", n, rest[:9], o)
	}
	// Back to where it came from, with the same half-made sum.
	pkt := append(small, rest[:9]...)
	copy(pkt[12:], []byte{192, 0, 2, 7})
	copy(pkt[16:], c.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort().Addr().AsSlice())
	copy(pkt[22:], pkt[20:22])
	pkt[20], pkt[21] = 0, 9
	if err := d.Queues()[0].WritePacket(o, [][]byte{pkt[:20], pkt[20:]}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
}

// What is made inside a namespace keeps it; who lets go hears of its end as of any
// other.
func TestLetGo(t *testing.T) {
	h, ref := host(t)
	d := open(t, ref, tun.Options{Table: 101, Queues: 2})
	read := make(chan error, 2)
	for _, q := range d.Queues() {
		go func() {
			_, _, err := q.ReadPacket([][]byte{make([]byte, 2000)})
			read <- err
		}()
	}
	if err := d.LetGo(); err != nil {
		t.Error(err)
	}
	for range d.Queues() {
		if err := <-read; !errors.Is(err, netns.ErrGone) {
			t.Errorf("a reader heard %v", err)
		}
	}
	if err := d.Control(func(uintptr) {}); err == nil {
		t.Error("there is still a descriptor")
	}
	labtest.Eventually(t, time.Second, func() bool { return !strings.Contains(h.Run("ip", "link"), "tun0") }, "the device has gone")
}
