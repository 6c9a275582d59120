package cgroupsel_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"

	"golang.org/x/sys/unix"
)

// What helperFrames hands to a device, in this order.
var frameKinds = []struct {
	name   string
	ether  uint16
	dst    net.IP
	bypass bool   // PACKET_QDISC_BYPASS
	as     uint16 // what it is said to be; 0: what it is
}{
	{name: "v4", ether: unix.ETH_P_IP, dst: net.IPv4(203, 0, 113, 1)},
	{name: "v6", ether: unix.ETH_P_IPV6, dst: net.ParseIP("2001:db8::1")},
	{name: "v4 said to be ARP", ether: unix.ETH_P_IP, dst: net.IPv4(203, 0, 113, 1), as: unix.ETH_P_ARP},
	{name: "in a VLAN", ether: unix.ETH_P_8021Q, dst: net.IPv4(203, 0, 113, 1)},
	{name: "v4 beside the queues", ether: unix.ETH_P_IP, dst: net.IPv4(203, 0, 113, 1), bypass: true},
	{name: "ARP", ether: unix.ETH_P_ARP},
	{name: "broadcast", ether: unix.ETH_P_IP, dst: net.IPv4bcast},
	{name: "multicast", ether: unix.ETH_P_IPV6, dst: net.ParseIP("ff02::1")},
}

// helperFrames hands one frame of each kind to the device in its first argument,
// and asks for AF_XDP. It says how each went.
func helperFrames() error {
	dev, err := net.InterfaceByName(os.Args[1])
	if err != nil {
		return err
	}
	for _, k := range frameKinds {
		as := k.as
		if as == 0 {
			as = k.ether
		}
		fmt.Printf("%s: %v\n", k.name, sendFrame(dev, k.ether, k.dst, k.bypass, as))
	}
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, 283, unix.XDP_TX_RING, 64)
		unix.Close(fd)
	}
	fmt.Printf("AF_XDP: %v\n", err)
	return nil
}

func sendFrame(dev *net.Interface, ether uint16, dst net.IP, bypass bool, as uint16) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if bypass {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, 20, 1); err != nil {
			return err
		}
	}
	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, dev.HardwareAddr...)
	frame = binary.BigEndian.AppendUint16(frame, ether)
	packet := make([]byte, 60)
	if v4 := dst.To4(); v4 != nil {
		packet[0] = 0x45
		copy(packet[16:], v4)
	} else {
		packet[0] = 0x60
		copy(packet[24:], dst)
	}
	return unix.Sendto(fd, append(frame, packet...), 0, &unix.SockaddrLinklayer{Protocol: as<<8 | as>>8, Ifindex: dev.Index, Halen: 6})
}

// sendsIn is what helperFrames says of the eth0 of a namespace.
func sendsIn(t *testing.T, space *labtest.Host, c *labtest.Cgroup) string {
	t.Helper()
	cmd := exec.Command("nsenter", "--net="+space.Path, self(t), "eth0")
	cmd.Env = helperEnviron("frames")
	out, err := c.Command(cmd).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// saysOfFrames is what it says where what may not pass is dropped and refused so.
func saysOfFrames(dropped, refused error) string {
	var all strings.Builder
	for _, k := range frameKinds {
		err := dropped
		switch {
		case k.bypass:
			err = refused
		case k.ether == unix.ETH_P_ARP, strings.HasSuffix(k.name, "cast"):
			err = nil
		}
		fmt.Fprintf(&all, "%s: %v\n", k.name, err)
	}
	fmt.Fprintf(&all, "AF_XDP: %v\n", refused)
	return all.String()
}

// What a selected process hands to a device itself is dropped there, but for ARP
// and what is bypassed everywhere; nobody else's is, and none when the device is
// let go.
func TestFramesOfSelectedAreKept(t *testing.T) {
	lab, _, _ := newLab(t)
	sel, other := lab.Cgroup("sel"), lab.Cgroup("other")
	s := newSelector(t, cgroupsel.Options{Selections: one(sel.Path)})
	space, _ := newSpace(lab, "s")
	ref, err := netns.Named(space.Path)
	if err != nil {
		t.Fatal(err)
	}
	eth0 := cgroupsel.Device{Index: device(t, space, "eth0"), Ethernet: true}
	sends := func(c *labtest.Cgroup) string { t.Helper(); return sendsIn(t, space, c) }
	says := saysOfFrames
	free, kept := says(nil, nil), says(unix.ENOBUFS, unix.EPERM)
	for _, tt := range []struct {
		name    string
		all     int
		devices []cgroupsel.Device
		sel     string
		other   string
	}{
		{"guarded", cgroupsel.AnyCgroup, []cgroupsel.Device{eth0}, kept, free},
		{"again", cgroupsel.AnyCgroup, []cgroupsel.Device{eth0}, kept, free},
		{"all inside", 0, []cgroupsel.Device{eth0}, kept, strings.ReplaceAll(kept, "operation not permitted", "<nil>")},
		{"not Ethernet", cgroupsel.AnyCgroup, []cgroupsel.Device{{Index: eth0.Index}}, strings.NewReplacer("ARP: <nil>", "ARP: "+unix.ENOBUFS.Error(), "cast: <nil>", "cast: "+unix.ENOBUFS.Error()).Replace(kept), free},
		{"let go", cgroupsel.AnyCgroup, nil, says(nil, unix.EPERM), free},
	} {
		if err := s.GuardFrames(ref, tt.all, tt.devices...); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		before := s.Counters().Frames
		if got := sends(sel); got != tt.sel {
			t.Errorf("%s, selected:\n%swant\n%s", tt.name, got, tt.sel)
		}
		if n := s.Counters().Frames - before; n != uint64(strings.Count(tt.sel, "not permitted")+strings.Count(tt.sel, "no buffer")) {
			t.Errorf("%s: %d counted", tt.name, n)
		}
		if got := sends(other); got != tt.other {
			t.Errorf("%s, not selected:\n%swant\n%s", tt.name, got, tt.other)
		}
	}
	if err := s.GuardFrames(ref, cgroupsel.AnyCgroup, eth0, cgroupsel.Device{Index: 4711}); err != nil {
		t.Errorf("with a device that has gone: %v", err)
	}
	s.Forget(ref)
	if got := sends(sel); got != says(nil, unix.EPERM) {
		t.Errorf("forgotten:\n%s", got)
	}
}
