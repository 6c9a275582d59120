package steer_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
	"cgtun/steer"
)

// Whom a client meant is told, also of two that it has asked from one socket.
func TestOrigins(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("nft"))
	host := labtest.New(t).Host("a")
	for _, a := range []string{"10.7.0.2/24", "fd07::2/64"} {
		host.Run("ip", "addr", "add", a, "dev", "lo", "nodad")
	}
	host.Run("nft", "add table inet t; add chain inet t out { type nat hook output priority -99; }; "+
		"add rule inet t out ip daddr 10.7.0.0/24 udp dport 53 dnat ip to 127.0.0.1:5300; add rule inet t out ip6 daddr fd07::/64 udp dport 53 dnat ip6 to [::1]:5300")
	for _, tt := range []struct{ here, from string }{{"127.0.0.1", "10.7.0.2"}, {"::1", "fd07::2"}} {
		here, from := netip.MustParseAddr(tt.here), netip.MustParseAddr(tt.from)
		var got []string
		err := host.Do(func() error {
			o, err := steer.OpenOrigins()
			if err != nil {
				return err
			}
			defer o.Close()
			server, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(here, 5300)))
			if err != nil {
				return err
			}
			defer server.Close()
			client, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)))
			if err != nil {
				return err
			}
			defer client.Close()
			for range 2 {
				for dst, i := from.Next(), 0; i < 2; dst, i = dst.Next(), i+1 {
					if _, err := client.WriteToUDPAddrPort([]byte("?"), netip.AddrPortFrom(dst, 53)); err != nil {
						return err
					}
					_ = server.SetReadDeadline(time.Now().Add(10 * time.Second))
					_, peer, err := server.ReadFromUDPAddrPort(make([]byte, 10))
					if err != nil {
						return err
					}
					meant, err := o.Of(unix.IPPROTO_UDP, peer, netip.AddrPortFrom(here, 5300))
					if err != nil {
						return err
					}
					got = append(got, fmt.Sprint(meant == netip.AddrPortFrom(dst, 53)))
					_, _ = server.WriteToUDPAddrPort([]byte("!"), peer)
					_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
					_, by, err := client.ReadFromUDPAddrPort(make([]byte, 10))
					if err != nil {
						return err
					}
					got = append(got, fmt.Sprint(by == netip.AddrPortFrom(dst, 53)))
				}
			}
			if _, err := o.Of(unix.IPPROTO_UDP, netip.AddrPortFrom(from, 1), netip.AddrPortFrom(here, 5300)); !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("of nobody: %w", err)
			}
			return nil
		})
		if want := "[true true true true true true true true]"; err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v", tt.from, got, err)
		}
	}
}
