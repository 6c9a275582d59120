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

// A client whose owner takes long to be found makes no other one wait.
func TestSlowOwnerDelaysNobodyElse(t *testing.T) {
	l := newLab(func(c *Config) {
		c.Upstreams = []string{"udp://203.0.113.53"}
		c.Hosts = map[string][]netip.Addr{"fixed.example": {netip.MustParseAddr("192.0.2.1")}}
	})
	listener, err := l.r.Listen("home", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	looking, ended := make(chan struct{}), make(chan error)
	go func() {
		ended <- listener.Run(ctx, func(ctx context.Context, _ *flow.Flow) Way {
			close(looking)
			<-ctx.Done()
			return l.way
		})
	}()
	c, err := net.Dial("udp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), listener.Port()).String())
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
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
