package dns

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	wire "github.com/miekg/dns"

	"cgtun/flow"
)

// listen has a Listener run until the test ends, and returns its address.
func (l *lab) listen(t *testing.T, way func(context.Context, *flow.Flow) Way) string {
	t.Helper()
	listener, err := l.r.Listen("home", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- listener.Run(ctx, way) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), listener.Port()).String()
}

// A client whose owner takes long to be found makes no other one wait.
func TestSlowOwnerDelaysNobodyElse(t *testing.T) {
	l := newLab(func(c *Config) {
		c.Upstreams = []string{"udp://203.0.113.53"}
		c.Hosts = map[string][]netip.Addr{"fixed.example": {netip.MustParseAddr("192.0.2.1")}}
	})
	looking := make(chan struct{})
	at := l.listen(t, func(ctx context.Context, _ *flow.Flow) Way {
		close(looking)
		<-ctx.Done()
		return l.way
	})
	c, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	send := func(name string) {
		b, err := question(name, wire.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	send("slow.example")
	<-looking
	send("fixed.example")
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 1000)
	n, err := c.Read(b)
	if err != nil {
		t.Fatalf("while an owner is looked up nobody is answered: %v", err)
	}
	m := new(wire.Msg)
	if err := m.Unpack(b[:n]); err != nil || show(m) != "NOERROR 60 192.0.2.1" {
		t.Errorf("answer %s, %v", show(m), err)
	}
}

// Who asks a resolver on one network of the machine may have another address
// where it connects to what it was told: the name is that of its flow all the same.
func TestNamesOfClientsWithSeveralAddresses(t *testing.T) {
	l := newLab(func(c *Config) {
		c.Hosts = map[string][]netip.Addr{"fixed.example": {netip.MustParseAddr("192.0.2.1")}}
	})
	listener, err := l.r.Listen("home", func(flow.Proto, netip.AddrPort, netip.AddrPort) (netip.AddrPort, error) {
		return netip.MustParseAddrPort("10.2.0.1:53"), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	f := listener.flow(flow.UDP, netip.MustParseAddrPort("10.2.0.2:4000"), netip.MustParseAddr("127.0.0.1"))
	if f == nil || f.Dst != netip.MustParseAddrPort("10.2.0.1:53") {
		t.Fatalf("flow %+v", f)
	}
	l.r.take(f, anybody, mustPack(question("fixed.example", wire.TypeA)), l.way)
	later := &flow.Flow{Src: netip.MustParseAddrPort("10.1.0.2:4001"), Dst: netip.MustParseAddrPort("192.0.2.1:80"), Attachment: "home"}
	if name, sure, _ := l.r.Name(later); name != "fixed.example" || !sure {
		t.Errorf("%q, sure: %v", name, sure)
	}
}

// Connections that are held open and idle keep nobody out.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	l := newLab(func(c *Config) {
		c.Hosts = map[string][]netip.Addr{"fixed.example": {netip.MustParseAddr("192.0.2.1")}}
	})
	at := l.listen(t, func(context.Context, *flow.Flow) Way { return l.way })
	ask := func(c net.Conn) error {
		if err := writeMessage(c, mustPack(question("fixed.example", wire.TypeA))); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err := readMessage(c)
		return err
	}
	for i := range maxStreams + 10 {
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := ask(c); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
}
