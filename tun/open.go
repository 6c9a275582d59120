package tun

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// From if_tun.h; USO came with kernel 6.2.
const (
	offloadCsum = 0x01
	offloadTSO4 = 0x02
	offloadTSO6 = 0x04
	offloadUSO4 = 0x20
	offloadUSO6 = 0x40

	offloadTCP = offloadCsum | offloadTSO4 | offloadTSO6
	offloadAll = offloadTCP | offloadUSO4 | offloadUSO6
)

// ipv6AddrGenNone is IN6_ADDR_GEN_MODE_NONE of if_link.h.
const ipv6AddrGenNone = 1

// temporaryName is what the device is called until it is ready.
func temporaryName(table uint32) string {
	return temporaryPrefix + strconv.FormatUint(uint64(table), 10)
}

// movedName is the same for a device that is moved: the kernel draws the end, and
// the largest table leaves four digits for it in the 15 bytes of a name.
func movedName(table uint32) string {
	return temporaryPrefix + strconv.FormatUint(uint64(table), 36) + "_%d"
}

const temporaryPrefix = "cgt"

// busyTime is how long the descriptor that made a device may live on: in a process
// that is being started and has not reached its exec.
const busyTime = 100 * time.Millisecond

// openQueues makes a device under a temporary name, in which %d stands for the
// next free number, and returns its name and queues. It is down and goes with
// the queues.
func openQueues(h *netlink.Handle, name string, n int) (_ string, queues []*Queue, err error) {
	made, err := water.New(water.Config{
		DeviceType: water.TUN,
		PlatformSpecificParams: water.PlatformSpecificParams{
			Name: name, Persist: true, MultiQueue: n > 1,
		},
	})
	if err != nil {
		return "", nil, fmt.Errorf("make device: %w", err)
	}
	name = made.Name()
	if err := made.Close(); err != nil {
		return "", nil, errors.Join(fmt.Errorf("close the descriptor that made the device: %w", err), removeLeftover(h, name))
	}
	defer func() {
		if err == nil {
			return
		}
		for _, q := range queues {
			q.Close()
		}
		// Still persistent: closing was not enough.
		err = errors.Join(err, removeLeftover(h, name))
	}()
	for end := time.Now().Add(busyTime); len(queues) < n; {
		q, err := attachQueue(name, n > 1)
		if errors.Is(err, unix.EBUSY) && time.Now().Before(end) {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return "", queues, err
		}
		queues = append(queues, q)
	}
	var perr error
	if err := queues[0].raw.Control(func(fd uintptr) {
		perr = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 0)
	}); err != nil || perr != nil {
		return "", queues, fmt.Errorf("tie the device to the process: %w", errors.Join(err, perr))
	}
	return name, queues, nil
}

// attachQueue opens one queue with the header flag.
func attachQueue(name string, multi bool) (*Queue, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	if err := setUpQueue(fd, name, multi); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return newQueue(fd, name)
}

func setUpQueue(fd int, name string, multi bool) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("attach queue: %w", err)
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	req.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("attach queue: %w", err)
	}
	err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadAll)
	if errors.Is(err, unix.EINVAL) {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadTCP)
	}
	if err != nil {
		return fmt.Errorf("switch offloads on: %w", err)
	}
	return nil
}

// removeLeftover takes away what a killed start has left under our temporary
// name. A live one holds that name for a moment only, and never where another
// looks at the same time.
func removeLeftover(h *netlink.Handle, name string) error {
	link, err := find(h, name)
	if err != nil || link == nil {
		return err
	}
	if link.Type() != "tuntap" && link.Type() != "tun" {
		return &TakenError{What: "device", Value: name, Holder: "another " + link.Type() + " device"}
	}
	if err := h.LinkDel(link); err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}
