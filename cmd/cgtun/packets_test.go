package main_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
)

// fragmentsOf cuts a datagram up into three fragments, the last one first.
func fragmentsOf(src, dst netip.Addr, from, to uint16, data []byte) (all [][]byte) {
	udp := binary.BigEndian.AppendUint16(nil, from)
	udp = binary.BigEndian.AppendUint16(udp, to)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(data)))
	udp = append(append(udp, 0, 0), data...)
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, unix.IPPROTO_UDP, byte(len(udp)>>8), byte(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	const size = 800
	for off := 0; off < len(udp); off += size {
		part := udp[off:min(off+size, len(udp))]
		word := uint16(off)
		if off+size < len(udp) {
			word |= 1
		}
		var pkt []byte
		if src.Is4() {
			pkt = []byte{0x45, 0, byte((20 + len(part)) >> 8), byte(20 + len(part)), 0x12, 0x34, byte(word >> 11 & 0x1f), byte(word >> 3), 64, unix.IPPROTO_UDP, 0, 0}
			if word&1 != 0 {
				pkt[6] |= 0x20
			}
		} else {
			pkt = []byte{0x60, 0, 0, 0, byte((8 + len(part)) >> 8), byte(8 + len(part)), 44, 64}
		}
		pkt = append(append(pkt, src.AsSlice()...), dst.AsSlice()...)
		if src.Is4() {
			binary.BigEndian.PutUint16(pkt[10:], checksum(pkt))
		} else {
			pkt = append(pkt, unix.IPPROTO_UDP, 0, byte(word>>8), byte(word), 0, 0, 0x12, 0x34)
		}
		all = append([][]byte{append(pkt, part...)}, all...)
	}
	return all
}

// rawPacket is an IP packet of a protocol.
func rawPacket(src, dst netip.Addr, proto byte, data []byte) []byte {
	if src.Is6() {
		ip := []byte{0x60, 0, 0, 0, byte(len(data) >> 8), byte(len(data)), proto, 64}
		return append(append(append(ip, src.AsSlice()...), dst.AsSlice()...), data...)
	}
	ip := []byte{0x45, 0, byte((20 + len(data)) >> 8), byte(20 + len(data)), 0, 1, 0, 0, 64, proto, 0, 0}
	ip = append(append(ip, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, data...)
}

// errorQueue has a socket keep its ICMP errors, and returns a function that waits
// for one.
func errorQueue(t *testing.T, c *net.UDPConn) func() unix.Errno {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVERR, 1)
		_ = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVERR, 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() (errno unix.Errno) {
		t.Helper()
		labtest.Eventually(t, 10*time.Second, func() bool {
			_ = raw.Control(func(fd uintptr) {
				oob := make([]byte, 256)
				_, k, _, _, err := unix.Recvmsg(int(fd), nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
				if err != nil {
					return
				}
				list, _ := unix.ParseSocketControlMessage(oob[:k])
				for _, m := range list {
					if m.Header.Type == unix.IP_RECVERR || m.Header.Type == unix.IPV6_RECVERR {
						errno = unix.Errno(binary.NativeEndian.Uint32(m.Data))
					}
				}
				_, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			})
			return errno != 0
		}, "an ICMP error is told")
		return errno
	}
}
