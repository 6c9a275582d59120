package dns

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
)

// Names are bounded over all clients: a few thousand datagrams of many sources
// could fill the memory of all flows otherwise.
func TestNamesAreBoundedOverAllClients(t *testing.T) {
	n, now := newNames(), time.Now()
	addr := func(i int) netip.Addr {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(i))
		return netip.AddrFrom4(b)
	}
	for i := range 10 * maxClients {
		var addrs []netip.Addr
		for j := range 2 * maxOfAnswer {
			addrs = append(addrs, addr(i*2*maxOfAnswer+j))
		}
		n.note("home", addr(i%maxClients), "", "a.example", addrs, time.Minute, now)
	}
	count := 0
	for _, e := range n.clients {
		count += len(e.Value.(*client).names)
	}
	if count != n.all || count > maxAll || count < maxAll/2 {
		t.Errorf("%d names, counted as %d, want at most %d", count, n.all, maxAll)
	}
	last := 10*maxClients - 1
	if name, _, _ := n.find("home", addr(last%maxClients), addr(last*2*maxOfAnswer), "", now); name != "a.example" {
		t.Errorf("the last one is %q", name)
	}
	n.forget("home")
	if n.all != 0 || len(n.clients) != 0 || n.order.Len() != 0 {
		t.Errorf("%d names and %d clients are left", n.all, len(n.clients))
	}
}

// Processes of home have one address: whose name it is, is known beside it.
func TestNamesOfOneAddressAreToldApart(t *testing.T) {
	n, now := newNames(), time.Now()
	src, dst := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")
	n.note("home", src, "1000 /a", "a.example", []netip.Addr{dst}, time.Minute, now)
	n.note("home", netip.MustParseAddr("127.0.0.1"), "1000 /a", "b.example", []netip.Addr{dst.Next()}, time.Minute, now)
	for _, dst := range []netip.Addr{dst, dst.Next()} {
		for who, want := range map[string]bool{"1000 /a": true, "1001 /a": false, "1000 /b": false, "": false} {
			if name, sure, own := n.find("home", src, dst, who, now); name == "" || !sure || own != want {
				t.Errorf("%s for %q: %q, sure %v, own %v, want %v", dst, who, name, sure, own, want)
			}
		}
	}
}
