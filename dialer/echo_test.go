package dialer_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"cgtun/dialer"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// Sources of pings hear the replies and errors of their own requests and of
// nobody else's, by ping sockets and by raw ones.
func TestEchoesAreToldApart(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	lab := labtest.New(t)
	client, server := lab.Host("client"), lab.Host("server")
	lab.Link(client, server, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	server.Forward()
	server.Sysctl("net.ipv4.icmp_ratelimit", "0")
	server.Sysctl("net.ipv6.icmp.ratelimit", "0")
	server.Run("ip", "route", "add", "unreachable", "10.99.0.0/24")
	server.Run("ip", "route", "add", "unreachable", "fd99::/64")
	client.Run("ip", "route", "add", "10.99.0.0/24", "via", "10.9.0.2")
	client.Run("ip", "route", "add", "fd99::/64", "via", "fd09::2")
	for by, groups := range map[string]string{"raw": "1 0", "ping": "0 2147483647"} {
		client.Sysctl("net.ipv4.ping_group_range", groups)
		for _, tt := range []struct {
			alive, gone    string
			request, reply byte
		}{{"10.9.0.2", "10.99.0.1", 8, 0}, {"fd09::2", "fd99::1", 128, 129}} {
			alive, gone := netip.AddrPortFrom(netip.MustParseAddr(tt.alive), 0), netip.AddrPortFrom(netip.MustParseAddr(tt.gone), 0)
			var conns [2]*dialer.PacketConn
			for i := range conns {
				d, err := dialer.NewDirect(dialer.Config{Name: "d"})
				if err == nil {
					err = client.Do(func() (err error) {
						conns[i], err = d.OpenEcho(t.Context(), dialer.Target{Addr: alive})
						return err
					})
				}
				if err != nil {
					t.Fatalf("%s: %v", by, err)
				}
				defer conns[i].Close()
			}
			// With a right checksum: raw sockets keep it right.
			ask := func(c *dialer.PacketConn, peer netip.AddrPort, seq byte) {
				msg := []byte{tt.request, 0, 0, 0, 0, 0, 0, seq}
				sum := ^(uint16(tt.request)<<8 + uint16(seq))
				msg[2], msg[3] = byte(sum>>8), byte(sum)
				for { // an error of the last one may be in the way
					_, err := c.WriteBatch([]flow.Datagram{{Peer: peer, Data: msg, TTL: 9}})
					var other *flow.PeerError
					if err == nil || !errors.As(err, &other) {
						break
					}
				}
			}
			for round := byte(1); round < 20; round++ {
				for i, c := range conns {
					ask(c, alive, 2*round+byte(i))
				}
				ask(conns[0], gone, 2*round)
			}
			type heard struct {
				replies, errs int
			}
			results := make(chan heard, 2)
			for i, c := range conns {
				go func() {
					var h heard
					stop := time.AfterFunc(time.Second, func() { c.Close() })
					defer stop.Stop()
					dgs := []flow.Datagram{{Data: make([]byte, 100)}}
					for {
						dgs[0].Data = dgs[0].Data[:cap(dgs[0].Data)]
						n, err := c.ReadBatch(dgs)
						var peer *flow.PeerError
						switch {
						case errors.As(err, &peer):
							if peer.Peer != gone || peer.ICMP == nil || peer.ICMP.From.String() != tt.alive || len(peer.ICMP.Quote) < 8 || peer.ICMP.Quote[7]&1 != 0 {
								t.Errorf("%s: error %+v (%+v)", by, peer, peer.ICMP)
							}
							h.errs++
						case err != nil:
							results <- h
							return
						case n == 1:
							if d := dgs[0]; d.Data[0] != tt.reply || d.Data[7]&1 != byte(i) || d.Peer != alive {
								t.Errorf("%s: %d heard % x from %s", by, i, d.Data, d.Peer)
							}
							h.replies++
						}
					}
				}()
			}
			all := heard{}
			for range conns {
				h := <-results
				all.replies += h.replies
				all.errs += h.errs
			}
			// The kernel says five times in a row that there is no way (ip_error).
			if all.replies != 38 || all.errs == 0 || all.errs > 19 {
				t.Errorf("%s, %s: %+v, want 38 replies and some of 19 errors", by, tt.alive, all)
			}
		}
	}
}
